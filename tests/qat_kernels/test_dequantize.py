"""dequantize: packed codes to weights, exact in every dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import qat_kernels
from qat_kernels import reference

BothBackends = Callable[[Callable[[], Any]], tuple[Any, Any]]

SHAPES = [(1, 32, 32), (5, 96, 32), (3, 100, -1), (4, 1100, 11)]


def make_weight(shape: tuple[int, int, int], bits: int, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """codes [N, K], fp32 scale [N, G], zero_point [N, G]."""
    rows, columns, group_size = shape
    groups = 1 if group_size == -1 else columns // group_size
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, device=device)
    zero_point = torch.randint(0, 2**bits, (rows, groups), dtype=torch.uint8, device=device)
    return codes, torch.rand(rows, groups, device=device) + 0.01, zero_point


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_is_codes_minus_zero_point_times_scale(
    backend: str,
    device: str,
    rounds_to_bf16: bool,
    bits: int,
    shape: tuple[int, int, int],
    dtype: torch.dtype | None,
) -> None:
    rows, columns, group_size = shape
    codes, scale, zero_point = make_weight(shape, bits, device)
    weight = qat_kernels.dequantize(
        qat_kernels.pack(codes, bits=bits),
        scale,
        zero_point,
        bits=bits,
        group_size=group_size,
        in_features=columns,
        dtype=dtype,
    )
    steps = codes.view(rows, scale.shape[1], -1).double() - zero_point.unsqueeze(-1)
    exact = (steps * scale.double().unsqueeze(-1)).view(rows, columns)
    expected = exact.float().to(dtype or torch.float32)
    assert weight.dtype == (dtype or torch.float32)
    if dtype != torch.bfloat16 or rounds_to_bf16:
        assert torch.equal(weight, expected)
    else:
        torch.testing.assert_close(weight, expected, rtol=2**-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_default_dtype_is_that_of_the_scale(backend: str, device: str, dtype: torch.dtype) -> None:
    codes, scale, zero_point = make_weight((2, 64, 32), 2, device)
    packed = qat_kernels.pack(codes, bits=2)
    weight = qat_kernels.dequantize(packed, scale.to(dtype), zero_point, bits=2, group_size=32, in_features=64)
    assert weight.dtype == dtype


def test_blocks_of_rows_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    codes, scale, zero_point = make_weight((7, 96, 32), 3)
    packed = qat_kernels.pack(codes, bits=3)
    monkeypatch.setenv("QAT_KERNELS", "reference")
    whole = qat_kernels.dequantize(packed, scale, zero_point, bits=3, group_size=32, in_features=96)
    monkeypatch.setattr(reference, "BLOCK_ELEMENTS_CPU", 2 * 96)
    assert torch.equal(qat_kernels.dequantize(packed, scale, zero_point, bits=3, group_size=32, in_features=96), whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 6}, r"bits must be one of \(2, 3, 4, 8\). Got: 6"),
        ({"group_size": 48}, "divide in_features = 64. Got: 48"),
        ({"in_features": 128}, "packed must have 8 words per row for 128 values of 2 bits. Got: 4"),
        ({"scale": torch.ones(3, 1)}, r"scale must have shape \(3, 2\). Got: \(3, 1\)"),
        ({"zero_point": torch.ones(3, 2)}, "zero_point must be torch.uint8. Got: torch.float32"),
        ({"dtype": torch.float64}, "dtype must be .* Got: torch.float64"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "packed": torch.zeros(3, 4, dtype=torch.int32),
        "scale": torch.ones(3, 2),
        "zero_point": torch.ones(3, 2, dtype=torch.uint8),
        "bits": 2,
        "group_size": 32,
        "in_features": 64,
    }
    with pytest.raises(ValueError, match=message):
        qat_kernels.dequantize(**{**arguments, **change})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_real_size(both_backends: BothBackends, bits: int, dtype: torch.dtype) -> None:
    codes, scale, zero_point = make_weight((4096, 11008, 64), bits, "cuda")
    packed = qat_kernels.pack(codes, bits=bits)
    expected, actual = both_backends(
        lambda: qat_kernels.dequantize(
            packed, scale, zero_point, bits=bits, group_size=64, in_features=11008, dtype=dtype
        )
    )
    assert torch.equal(actual, expected)
