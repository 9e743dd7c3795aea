"""scale_grad against the dense weight gradient in double precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import qat_kernels
from qat_kernels import reference


def make_arguments(shape: tuple[int, int, int], bits: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """grad_out, x, codes, zero_point."""
    rows, columns, group_size = shape
    groups = 1 if group_size == -1 else columns // group_size
    return [
        torch.randn(9, rows, device=device).to(dtype),
        torch.randn(9, columns, device=device).to(dtype),
        torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, device=device),
        torch.randint(0, 2**bits, (rows, groups), dtype=torch.uint8, device=device),
    ]


def expected_scale_grad(grad_out: Tensor, x: Tensor, codes: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient in double precision, and the sum of the magnitudes of its terms, which bounds rounding errors."""
    steps = codes.view(*zero_point.shape, -1).double() - zero_point.unsqueeze(-1)
    d_weight = (grad_out.double().t() @ x.double()).view(steps.shape)
    magnitude = (grad_out.double().abs().t() @ x.double().abs()).view(steps.shape)
    return (d_weight * steps).sum(-1), (magnitude * steps.abs()).sum(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 32, 32), (6, 96, 32), (5, 100, -1)], ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_is_the_weight_gradient_summed_over_groups(
    backend: str, device: str, bits: int, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    grad_out, x, codes, zero_point = make_arguments(shape, bits, dtype, device)
    packed = qat_kernels.pack(codes, bits=bits)
    actual = qat_kernels.scale_grad(grad_out, x, packed, zero_point, bits=bits, group_size=shape[2])
    expected, magnitude = expected_scale_grad(grad_out, x, codes, zero_point)
    assert actual.dtype == torch.float32
    assert ((actual - expected).abs() <= torch.finfo(dtype).eps * magnitude).all()


def test_blocks_of_rows_do_not_change_the_result(backend: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    grad_out, x, codes, zero_point = make_arguments((7, 96, 32), 2, torch.float32, device)
    packed = qat_kernels.pack(codes, bits=2)
    monkeypatch.setattr(reference, "GRAD_BLOCK_ELEMENTS", 2 * 96)  # 4 blocks of which the last is shorter
    actual = qat_kernels.scale_grad(grad_out, x, packed, zero_point, bits=2, group_size=32)
    expected, magnitude = expected_scale_grad(grad_out, x, codes, zero_point)
    assert ((actual - expected).abs() <= torch.finfo(torch.float32).eps * magnitude).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad_out": torch.ones(2, 4)}, r"grad_out must have shape \(2, 3\). Got: \(2, 4\)"),
        ({"grad_out": torch.ones(2, 3).half()}, "grad_out must be torch.float32. Got: torch.float16"),
        ({"x": torch.ones(64)}, r"x must have 2 dimensions. Got: shape \(64,\)"),
        ({"zero_point": torch.ones(3, 1, dtype=torch.uint8)}, r"zero_point must have shape \(3, 2\). Got: \(3, 1\)"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "grad_out": torch.ones(2, 3),
        "x": torch.ones(2, 64),
        "packed": torch.zeros(3, 4, dtype=torch.int32),
        "zero_point": torch.ones(3, 2, dtype=torch.uint8),
        "bits": 2,
        "group_size": 32,
    }
    with pytest.raises(ValueError, match=message):
        qat_kernels.scale_grad(**{**arguments, **change})
