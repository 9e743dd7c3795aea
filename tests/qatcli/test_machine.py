"""What a machine has left: the control groups of either version, and where they are not."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path

import pytest
import torch

from qatcli import machine

GIB = 2**30


def group(path: Path, limit: str, used: int, cache: int = 0, *, names: tuple[str, str] = ("max", "current")) -> None:
    path.mkdir(parents=True, exist_ok=True)
    (path / f"memory.{names[0]}").write_text(f"{limit}\n")
    (path / f"memory.{names[1]}").write_text(f"{used}\n")
    (path / "memory.stat").write_text(f"anon {used - cache}\nactive_file {cache // 2}\ninactive_file {cache // 2}\n")


def joined(tmp_path: Path, line: str) -> Path:
    file = tmp_path / "cgroup"
    file.write_text(line + "\n")
    return file


def test_the_tightest_group_counts_and_page_cache_is_free(tmp_path: Path) -> None:
    root = tmp_path / "fs"
    group(root / "user" / "job", str(8 * GIB), 6 * GIB, cache=2 * GIB)
    group(root / "user", str(5 * GIB), 2 * GIB)
    group(root, "max", 9 * GIB)
    assert machine.cgroup_memory(root, joined(tmp_path, "0::/user/job")) == 3 * GIB
    group(root / "user", "max", 2 * GIB)
    assert machine.cgroup_memory(root, joined(tmp_path, "0::/user/job")) == 4 * GIB


def test_in_a_container_the_limit_is_at_the_top(tmp_path: Path) -> None:
    root = tmp_path / "fs"
    group(root, str(3 * GIB), GIB)
    assert machine.cgroup_memory(root, joined(tmp_path, "0::/")) == 2 * GIB
    assert machine.cgroup_memory(root, joined(tmp_path, "0::/host/path/not/mounted")) == 2 * GIB


def test_version_one(tmp_path: Path) -> None:
    root = tmp_path / "fs"
    names = ("limit_in_bytes", "usage_in_bytes")
    group(root / "memory" / "job", str(4 * GIB), GIB, names=names)
    group(root / "memory", "9223372036854771712", GIB, names=names)
    assert machine.cgroup_memory(root, joined(tmp_path, "5:cpu:/x\n4:memory:/job")) == 3 * GIB


def test_version_one_counts_the_page_cache_of_the_groups_in_it(tmp_path: Path) -> None:
    root = tmp_path / "fs"
    group(root / "memory" / "job", str(4 * GIB), 3 * GIB, names=("limit_in_bytes", "usage_in_bytes"))
    statistics = {"active_file": 0, "inactive_file": 0, "total_active_file": GIB, "total_inactive_file": GIB}
    lines = "".join(f"{name} {count}\n" for name, count in statistics.items())
    (root / "memory" / "job" / "memory.stat").write_text(lines)
    assert machine.cgroup_memory(root, joined(tmp_path, "4:memory:/job")) == 3 * GIB


def test_a_group_over_its_limit_has_nothing_left(tmp_path: Path) -> None:
    group(tmp_path / "fs", str(GIB), 2 * GIB)
    assert machine.cgroup_memory(tmp_path / "fs", joined(tmp_path, "0::/")) == 0


@pytest.mark.parametrize("line", ["0::/", "1:cpu:/", ""])
def test_no_limit(tmp_path: Path, line: str) -> None:
    (tmp_path / "fs").mkdir()
    assert machine.cgroup_memory(tmp_path / "fs", joined(tmp_path, line)) is None
    assert machine.cgroup_memory(tmp_path / "fs", tmp_path / "absent") is None


@pytest.mark.parametrize(("limit", "expected"), [(None, 1000), (400, 400), (4000, 1000)])
def test_host_memory_is_the_lesser(monkeypatch: pytest.MonkeyPatch, limit: int | None, expected: int) -> None:
    memory = namedtuple("memory", "available")
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: memory(1000))
    monkeypatch.setattr(machine, "cgroup_memory", lambda: limit)
    assert machine.host_memory() == expected


def test_disk_space_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    assert machine.existing(tmp_path / "a" / "b") == tmp_path
    assert machine.disk_space(tmp_path / "a" / "b") > 0


def test_a_model_fits_that_leaves_some_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "host_memory", lambda: 1000)
    assert machine.fits(950, torch.device("cpu"))
    assert not machine.fits(951, torch.device("cpu"))
    monkeypatch.setattr(machine, "device_memory", lambda _: 500)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert machine.fits(475, torch.device("cuda"))
    assert not machine.fits(476, torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.fits(76 * 2**30, torch.device("cuda"))
    assert not machine.fits(77 * 2**30, torch.device("cuda"))
