"""Peaks of memory: of a stage, and of one part of it beyond what was in use when the part began.

The system and the device keep one peak each, which has to be restarted for a part; what it said before is kept here.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    import torch

PROC_STATUS, PROC_CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_highest: dict[str, int] = {}  # before the latest restart


def release_memory() -> None:
    """Give back to the system what earlier stages of this process held and freed; C's allocator keeps it."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):  # not every C library has it
        ctypes.CDLL(None).malloc_trim(0)


def start_peak(device: torch.device) -> None:
    """Start a new peak, where the system lets us."""
    release_memory()
    _highest.clear()
    _restart(device)


def peak_memory(device: torch.device) -> dict[str, int]:
    """Bytes since `start_peak`: the process's resident peak, and the device's peak."""
    return {name: max(count, _highest.get(name, 0)) for name, count in _peak(device).items()}


@contextmanager
def part_peak(device: torch.device) -> Iterator[dict[str, int]]:
    """The dict it gives holds, at the end, how far the part rose above what was in use at its beginning.

    Without the host's bytes where the system does not restart their peak: an earlier part may have been higher.
    """
    _highest.update(peak_memory(device))
    release_memory()  # else what an earlier part freed is taken again, and nothing rises
    host_too = _restart(device)
    before = _in_use(device)
    rise: dict[str, int] = {}
    yield rise
    peak = _peak(device).items()
    rise.update({name: max(0, count - before[name]) for name, count in peak if host_too or name != "host_bytes"})


def _peak(device: torch.device) -> dict[str, int]:
    import torch

    lines = PROC_STATUS.read_text().splitlines() if PROC_STATUS.exists() else []
    host = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)
    peak = {"host_bytes": host or psutil.Process().memory_info().rss}
    if device.type == "cuda":
        peak["device_bytes"] = torch.cuda.max_memory_allocated(device)
    return peak


def _in_use(device: torch.device) -> dict[str, int]:
    import torch

    used = {"host_bytes": psutil.Process().memory_info().rss}
    if device.type == "cuda":
        used["device_bytes"] = torch.cuda.memory_allocated(device)
    return used


def _restart(device: torch.device) -> bool:
    """Whether the host's peak began anew, too."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        PROC_CLEAR.write_text("5")
    except OSError:
        return False
    return True
