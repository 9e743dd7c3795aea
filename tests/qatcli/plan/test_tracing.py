"""Bytes of a pass, found on tensors without data: equal to what can be counted by hand."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qatcli.packed import ModuleQuant
from qatcli.plan.tracing import LINEARS, LiveBytes, Passes, trace, without_data

QUANT = ModuleQuant(2, 32, 64, 64)
B, T, H = 2, 8, 64
HIDDEN = B * T * H * 4  # bytes of hidden states in fp32


class Block(nn.Module):
    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, hidden: Tensor) -> Tensor:
        return F.relu(self.linear(hidden))


def passes(kind: str | None, *, stream_dtype: torch.dtype = torch.float32) -> Passes:
    with without_data() as live:
        linear = nn.Linear(64, 64, bias=False)
        block = Block(linear if kind is None else LINEARS[kind](linear, QUANT))
        return trace(live, block, {}, shape=(B, T, H), stream_dtype=stream_dtype, dtype=torch.float32)


def test_live_bytes_follow_tensors_and_not_views() -> None:
    with without_data() as live:
        a = torch.empty(10, 10)
        view = a[2:].t()
        assert (live.now, live.peak) == (400, 400)
        b = a + 1
        del b
        assert (live.now, live.peak) == (400, 800)
        del a
        assert live.now == 400, "the view keeps it"
        del view
        assert live.now == 0


def test_no_memory_is_taken() -> None:
    with without_data() as live:
        assert torch.empty(2**20, 2**20).sum().shape == ()
    assert live.peak == 4 * 2**40 + 4


def test_a_forward_pass_without_gradients() -> None:
    assert passes(None).forward == 2 * HIDDEN  # the linear's output and the activation's


def test_what_a_dense_block_keeps() -> None:
    assert passes(None).kept == HIDDEN  # relu's result, which is the output; the input was there before


def test_fake_quantization_makes_a_weight_of_its_own_and_gradients() -> None:
    weight, dense = 64 * 64 * 4, passes(None)
    found = passes("fake_quant")
    assert found.forward == weight + HIDDEN  # and gone when the activation is made
    assert found.kept == dense.kept + weight
    gradients = weight + 2 * (64 * 2 * 4)
    assert found.training >= found.kept + gradients


def test_packed_linears_keep_their_inputs_and_no_weight() -> None:
    weight = 64 * 64 * 4
    found = passes("packed")
    assert found.kept == passes(None).kept
    assert found.kept + weight <= found.training <= found.kept + 2 * weight + 6 * HIDDEN


def test_seeds_are_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    passes(None)
    assert torch.equal(torch.rand(1), expected)


def test_a_mode_counts_only_while_it_is_on() -> None:
    live: Any = LiveBytes()
    torch.empty(100)
    assert live.peak == 0
