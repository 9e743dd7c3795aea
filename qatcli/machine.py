"""What this machine has left for a stage: host memory under every limit that holds, device memory, disk."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    import torch

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
CPUINFO = Path("/proc/cpuinfo")
UNSEEN_GPU = 80 * 2**30  # bytes of one that a plan is made for and that is not here, a guess
SHARE = 0.95  # of the free memory that a model may take: the rest is the least that computing takes


def host_memory() -> int:
    """Bytes of host memory that this process can still take: what the system has available, or a control group less."""
    left = cgroup_memory()
    available = int(psutil.virtual_memory().available)
    return available if left is None else min(available, left)


def cgroup_memory(root: Path = CGROUPS, membership: Path = MEMBERSHIP) -> int | None:
    """Bytes that the control groups of this process (v2, or v1's memory controller) leave it; None without a limit.

    Page cache counts as free: the kernel takes it back before it kills.
    """
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    left = []
    for _, controllers, name in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if controllers == "":
            top, limit, usage = root, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            top, limit, usage = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        # Inside a container the path may name a group that is not mounted there; what is mounted at the top is ours.
        inner = top / name.lstrip("/")
        for group in {top, *(parent for parent in (inner, *inner.parents) if parent.is_relative_to(top))}:
            found = _left_in(group, limit, usage)
            if found is not None:
                left.append(found)
    return min(left, default=None)


def device_memory(device: torch.device) -> int:
    """Bytes free on a CUDA device, those included that torch keeps in reserve."""
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def fits(size: int, device: torch.device) -> bool:
    """Whether a model of so many bytes leaves anything of the memory that is free where it would be."""
    import torch

    if device.type == "cpu":
        return size <= SHARE * host_memory()
    return size <= SHARE * (device_memory(device) if torch.cuda.is_available() else UNSEEN_GPU)


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    lines = CPUINFO.read_text(encoding="utf-8").splitlines() if CPUINFO.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def disk_space(directory: Path) -> int:
    """Bytes free on the file system that `directory` is on, or will be on when it is made."""
    return shutil.disk_usage(existing(directory)).free


def existing(directory: Path) -> Path:
    """`directory`, or the nearest of its parents that exists."""
    path = directory.absolute()
    return next(parent for parent in (path, *path.parents) if parent.exists())


def _left_in(group: Path, limit: str, usage: str) -> int | None:
    try:
        most = (group / limit).read_text(encoding="utf-8").strip()
        used = int((group / usage).read_text(encoding="utf-8"))
        statistics = dict(line.split() for line in (group / "memory.stat").read_text(encoding="utf-8").splitlines())
    except (OSError, ValueError):
        return None
    if most == "max" or int(most) >= 2**60:  # how v1 says that there is no limit
        return None
    # v1 counts a group's own pages under these names, and with those of the groups in it, as usage does, under total_
    cache = sum(int(statistics.get(f"total_{key}", statistics.get(key, 0))) for key in ("active_file", "inactive_file"))
    return max(0, int(most) - used + cache)
