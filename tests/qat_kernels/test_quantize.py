"""quantize: the codes behind fake_quant, bit for bit, including at ties and far outside the range."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import qat_kernels

BothBackends = Callable[[Callable[[], Any]], tuple[Any, Any]]


@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_are_those_of_fake_quant(backend: str, device: str, bits: int, group_size: int) -> None:
    groups = 1 if group_size == -1 else 3
    weight = torch.randn(5, 96, device=device)
    scale = torch.rand(5, groups, device=device) * 8 / 2**bits + 0.01
    zero_point = torch.rand(5, groups, device=device) * 2**bits
    codes = qat_kernels.quantize(weight, scale, zero_point, bits=bits, group_size=group_size)
    fake = qat_kernels.fake_quant(weight, scale, zero_point, bits=bits, group_size=group_size)
    z = zero_point.round().clamp(0, 2**bits - 1).unsqueeze(-1)
    rebuilt = (codes.view(5, groups, -1).float() - z) * scale.unsqueeze(-1)
    assert codes.dtype == torch.uint8
    assert codes.max() == 2**bits - 1
    assert torch.equal(rebuilt.view(5, 96), fake)


def test_ties_go_to_even(backend: str, device: str) -> None:
    steps = torch.arange(-8, 8, device=device) + 0.5
    codes = qat_kernels.quantize(
        (steps * 0.25).unsqueeze(0),
        torch.full((1, 1), 0.25, device=device),
        torch.full((1, 1), 8.5, device=device),  # a tie too: 8
        bits=4,
        group_size=-1,
    )
    assert codes.tolist() == [[min(max(round(step) + 8, 0), 15) for step in steps.tolist()]]


def test_division_is_exact(backend: str, device: str) -> None:
    """Ties of w / s in fp32 that a multiplication by 1 / s would send to the other code."""
    scale = np.float32(0.1) * np.linspace(0.5, 1.5, 64, dtype=np.float32)[:, None]
    steps = np.arange(-100, 100, dtype=np.float32) + np.float32(0.5)
    weight = steps[None, :] * scale
    expected = np.rint(weight / scale) + 128
    assert (np.rint(weight * (1 / scale)) + 128 != expected).any()
    codes = qat_kernels.quantize(
        torch.from_numpy(weight).to(device),
        torch.from_numpy(scale).to(device),
        torch.full((64, 1), 128.0, device=device),
        bits=8,
        group_size=-1,
    )
    assert np.array_equal(codes.cpu().numpy(), expected.astype(np.uint8))


@pytest.mark.filterwarnings("ignore:overflow encountered in divide")  # numpy's, in the interpreter
def test_far_outside_the_range_is_clipped(backend: str, device: str) -> None:
    weight = torch.tensor([[1e9, -1e9, 1e38, -1e38, 0.0, 5e6, -5e6, float("inf")]], device=device)
    scale, zero_point = torch.full((1, 1), 1e-3, device=device), torch.full((1, 1), 2.0, device=device)
    codes = qat_kernels.quantize(weight, scale, zero_point, bits=3, group_size=-1)
    assert codes.tolist() == [[7, 0, 7, 0, 2, 7, 0, 7]]


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r"divide in_features = 64\. Got: 60"):
        qat_kernels.quantize(torch.ones(1, 64), torch.ones(1, 1), torch.ones(1, 1), bits=2, group_size=60)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [2, 8])
def test_real_size(both_backends: BothBackends, bits: int) -> None:
    weight = torch.randn(4096, 11008, device="cuda")
    scale = torch.rand(4096, 172, device="cuda") * 8 / 2**bits + 0.01
    zero_point = torch.rand(4096, 172, device="cuda") * 2**bits
    expected, actual = both_backends(lambda: qat_kernels.quantize(weight, scale, zero_point, bits=bits, group_size=64))
    assert torch.equal(actual, expected)
