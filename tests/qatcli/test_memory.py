"""Peaks of a stage and of its parts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qatcli import memory
from qatcli.memory import part_peak, peak_memory, start_peak

CPU = torch.device("cpu")
SIZE = 64 * 2**20


def _touch() -> None:
    torch.ones(SIZE, dtype=torch.uint8)


@pytest.fixture(autouse=True)
def _restartable() -> None:
    try:
        memory.PROC_CLEAR.write_text("5")
    except OSError:
        pytest.skip("this system does not restart a process's peak")


def test_where_the_peak_cannot_be_restarted_none_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "PROC_CLEAR", tmp_path / "absent" / "clear_refs")
    with part_peak(CPU) as rise:
        _touch()
    assert rise == {}


def test_a_part_counts_from_its_own_beginning() -> None:
    held = torch.ones(SIZE, dtype=torch.uint8)
    with part_peak(CPU) as rise:
        assert rise == {}
        _touch()
    assert 0.9 * SIZE < rise["host_bytes"] < 1.9 * SIZE
    assert len(held) == SIZE


def test_a_part_counts_memory_that_an_earlier_one_gave_back() -> None:
    torch.ones(SIZE // 4, dtype=torch.uint8)  # C's allocator keeps what is smaller than the largest that it gave back
    above = []
    for _ in range(2):
        with part_peak(CPU) as rise:
            tensors = [torch.ones(SIZE // 64, dtype=torch.uint8) for _ in range(64)]
        assert 0.9 * SIZE < rise["host_bytes"] < 1.9 * SIZE
        above.append(torch.ones(SIZE // 64, dtype=torch.uint8))  # without it the end of the heap is given back
        del tensors


def test_a_part_does_not_hide_the_peak_before_it() -> None:
    start_peak(CPU)
    _touch()
    before = peak_memory(CPU)["host_bytes"]
    with part_peak(CPU):
        pass
    assert abs(peak_memory(CPU)["host_bytes"] - before) < SIZE // 8  # the system counts in batches of pages
    start_peak(CPU)
    assert peak_memory(CPU)["host_bytes"] < before
