"""timing: what is timed, how often, and over how many weights."""

from __future__ import annotations

import pytest
import torch

from qat_kernels import timing


def test_every_call_is_made_equally_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "LEAST_SECONDS", 0.0)
    made: list[str] = []
    taken = timing.seconds(torch.device("cpu"), [lambda: made.append("a"), lambda: made.append("b")], repeats=3)
    assert made == ["a", "b"] * 4  # once more, to warm up
    assert taken > 0


def test_one_weight_is_enough_on_a_cpu() -> None:
    assert timing.copies(torch.device("cpu"), 1) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_graph_is_timed_on_a_gpu() -> None:
    device = torch.device("cuda")
    source = torch.zeros(2**26, device=device)
    target = torch.empty_like(source)
    assert timing.copies(device, source.nbytes) >= 1
    taken = timing.seconds(device, [lambda: target.copy_(source)])
    assert 1e9 < 2 * source.nbytes / taken < 1e14
