"""The three kernels over packed weights, each with fixed settings, against the dense reference.

Shapes leave the last tile of every axis short, groups fit tiles in every way (shorter, equal, longer, none), and the
splits leave a program without work.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import qat_kernels
from qat_kernels import reference

pytest.importorskip("triton")

from qat_kernels import interleave, triton_gemv, triton_linear, triton_matmul, triton_scale_grad, tuning

BothBackends = Callable[[Callable[[], Any]], tuple[Any, Any]]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}  # relative to the largest element
SHAPES = [(5, 64, 64), (35, 192, 32), (3, 96, -1), (3, 110, 10), (2, 384, 96), (9, 256, 128)]
TILE = {"block_m": 16, "block_n": 32, "block_k": 64, "num_warps": 4, "num_stages": 2}


class Case:
    """A random packed weight [N, K], x [M, K] and grad_out [M, N]."""

    def __init__(self, shape: tuple[int, int, int], bits: int, count: int, dtype: torch.dtype, device: str) -> None:
        rows, columns, group_size = shape
        groups = 1 if group_size == -1 else columns // group_size
        codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, device=device)
        self.packed = qat_kernels.pack(codes, bits=bits)
        self.scale = (torch.rand(rows, groups, device=device) + 0.5) / 2**bits
        self.zero_point = torch.randint(0, 2**bits, (rows, groups), dtype=torch.uint8, device=device)
        self.weight = (self.packed, self.scale, self.zero_point)
        self.grid = {"bits": bits, "group_size": group_size}
        self.columns = columns
        self.x = torch.randn(count, columns, device=device).to(dtype)
        self.grad_out = torch.randn(count, rows, device=device).to(dtype)
        self.dense = reference.dequantize(*self.weight, **self.grid, in_features=columns, dtype=torch.float32)

    def gemv(self, **settings: int) -> Tensor:
        words = interleave.interleave(self.packed, bits=self.grid["bits"], in_features=self.columns)
        return triton_gemv.gemv(self.x, words, self.scale, self.zero_point, **self.grid, **settings)


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype
    largest = expected.abs().max().item()
    torch.testing.assert_close(actual.float(), expected, rtol=0, atol=TOLERANCE[dtype] * largest)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(5, 64, 64), (35, 192, 32), (3, 96, -1), (3, 48, 16), (2, 96, 32), (9, 256, 128), (2, 4224, 64)], ids=str
)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gemv(triton_device: str, bits: int, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    case = Case(shape, bits, 1, dtype, triton_device)
    y = case.gemv(rows=4, batch=1, splits=1, num_warps=1)
    assert_close(y, case.x.float() @ case.dense.t(), dtype)


@pytest.mark.parametrize(("count", "splits"), [(1, 8), (3, 1), (5, 2)])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gemv_of_several_rows_and_splits(triton_device: str, bits: int, count: int, splits: int) -> None:
    case = Case((3, 4288, 64), bits, count, torch.float16, triton_device)
    settings = {"rows": 4, "batch": 1 if count == 1 else 4, "splits": splits, "num_warps": 1}
    y = case.gemv(**settings)
    assert_close(y, case.x.float() @ case.dense.t(), torch.float16)
    assert torch.equal(case.gemv(**settings), y)


@pytest.mark.parametrize("magnitude", [2.0**-40, 2.0**40])
def test_gemv_of_small_and_large_activations(triton_device: str, magnitude: float) -> None:
    """Codes enter as subnormals and activations carry the power of two that undoes it: neither end may be lost."""
    case = Case((4, 128, 64), 3, 1, torch.float32, triton_device)
    case.x *= magnitude
    y = case.gemv(rows=4, batch=1, splits=1, num_warps=1)
    assert_close(y, case.x @ case.dense.t(), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_matmul_and_both_gradients(
    triton_device: str, bits: int, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    case = Case(shape, bits, 19, dtype, triton_device)
    x, grad_out = case.x.float(), case.grad_out.float()
    y = triton_matmul.matmul(case.x, *case.weight, **case.grid, splits=1, **TILE)
    assert_close(y, x @ case.dense.t(), dtype)
    d_x = triton_matmul.input_grad(case.grad_out, *case.weight, **case.grid, in_features=case.columns, **TILE)
    assert_close(d_x, grad_out @ case.dense, dtype)
    arguments = (case.grad_out, case.x, case.packed, case.zero_point)
    d_scale = triton_scale_grad.scale_grad(*arguments, **case.grid, **TILE)
    assert_close(d_scale, reference.scale_grad(grad_out, x, case.packed, case.zero_point, **case.grid), torch.float32)


@pytest.mark.parametrize("splits", [2, 5])
def test_split_matmul_and_long_groups_repeat_exactly(triton_device: str, splits: int) -> None:
    case = Case((3, 320, 160), 3, 5, torch.float16, triton_device)

    def run() -> list[Tensor]:
        arguments = (case.grad_out, case.x, case.packed, case.zero_point)
        return [
            triton_matmul.matmul(case.x, *case.weight, **case.grid, splits=splits, **TILE),
            triton_matmul.input_grad(case.grad_out, *case.weight, **case.grid, in_features=320, **TILE),
            triton_scale_grad.scale_grad(*arguments, **case.grid, **TILE),
        ]

    first = run()
    assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
    assert_close(first[0], case.x.float() @ case.dense.t(), torch.float16)
    arguments = (case.grad_out.float(), case.x.float(), case.packed, case.zero_point)
    assert_close(first[2], reference.scale_grad(*arguments, **case.grid), torch.float32)


@pytest.mark.parametrize("shape", [(7, 192, 32), (5, 352, 11), (4, 96, -1), (5, 160, 160)], ids=str)
@pytest.mark.parametrize("bits", [2, 3])
def test_dense_blocks_are_never_the_whole_weight(
    triton_device: str, bits: int, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(shape, bits, 6, torch.float32, triton_device)
    monkeypatch.setattr(triton_linear, "DENSE_BYTES", 2 * case.columns * case.x.element_size())
    made: list[int] = []
    last: list[weakref.ref[Tensor]] = []
    whole = triton_linear.triton_dequantize.dequantize

    def remember(*arguments: Any, **options: Any) -> Tensor:
        assert all(part() is None for part in last), "the block before is still there"
        part = whole(*arguments, **options)
        made.append(part.numel())
        last[:] = [weakref.ref(part)]
        return part

    monkeypatch.setattr(triton_linear.triton_dequantize, "dequantize", remember)
    assert_close(triton_linear._dense_matmul(case.x, *case.weight, **case.grid), case.x @ case.dense.t(), torch.float32)
    assert max(made) <= 2 * case.columns
    assert sum(made) == case.dense.numel()
    made.clear()
    d_x = triton_linear._dense_input_grad(case.grad_out, *case.weight, **case.grid, in_features=case.columns)
    assert_close(d_x, case.grad_out @ case.dense, torch.float32)
    assert sum(made) == case.dense.numel()


@pytest.mark.parametrize(
    ("count", "prepared", "dtype", "kernel"),
    [
        (1, True, torch.float16, "gemv"),
        (1, True, torch.float32, "gemv"),
        (1, False, torch.float16, "matmul"),
        (3, True, torch.float16, "matmul"),
        (3, True, torch.float32, "dense"),
        (5, True, torch.float16, "dense"),
    ],
)
def test_the_batch_chooses_the_kernel(
    triton_device: str, monkeypatch: pytest.MonkeyPatch, count: int, prepared: bool, dtype: torch.dtype, kernel: str
) -> None:
    table = tuning.default()
    routes = {"quantized_matmul": {"gemv": 2, "matmul": 4}}
    monkeypatch.setattr(tuning, "table_for", lambda device: tuning.Table(table.path, (), True, routes, table.settings))
    monkeypatch.setenv("QAT_KERNELS", "triton")
    called = []
    for name, module, function in [
        ("gemv", triton_gemv, "gemv"),
        ("matmul", triton_matmul, "matmul"),
        ("dense", triton_linear, "_dense_matmul"),
    ]:
        original = getattr(module, function)
        monkeypatch.setattr(
            module, function, lambda *a, name=name, f=original, **o: (called.append(name), f(*a, **o))[1]
        )
    case = Case((6, 128, 64), 4, count, dtype, triton_device)
    words = qat_kernels.prepare(case.packed, **case.grid, in_features=128) if prepared else None
    y = qat_kernels.quantized_matmul(case.x, *case.weight, **case.grid, prepared=words)
    assert called == [kernel]
    assert_close(y, case.x.float() @ case.dense.t(), dtype)


def test_the_bounds_checker_sees_every_access(triton_device: str, in_bounds: list[int]) -> None:
    if triton_device == "cuda":
        pytest.skip("compute-sanitizer checks bounds on a GPU")
    case = Case((4, 64, 64), 2, 1, torch.float32, triton_device)
    words = interleave.interleave(case.packed, bits=2, in_features=64)
    before = in_bounds[0]
    settings = {"rows": 4, "batch": 1, "splits": 1, "num_warps": 1}
    triton_gemv.gemv(case.x, words, case.scale, case.zero_point, **case.grid, **settings)
    assert in_bounds[0] - before == 4 * 8 + 64 + 4 + 4 + 4  # lanes, x, scales, zero points, y
    with pytest.raises(Exception, match="a kernel left its tensors"):
        triton_gemv.gemv(case.x, words, case.scale, case.zero_point[:2].clone(), **case.grid, **settings)


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 4, 16, 128, 2048])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_real_size(both_backends: BothBackends, bits: int, count: int) -> None:
    case = Case((4096, 11008, 64), bits, count, torch.bfloat16, "cuda")

    def run() -> list[Tensor]:
        words = qat_kernels.prepare(case.packed, **case.grid, in_features=11008)
        x, scale = case.x.detach().requires_grad_(), case.scale.detach().requires_grad_()
        with torch.no_grad():
            decoded = qat_kernels.quantized_matmul(x, *case.weight, **case.grid, prepared=words)
        y = qat_kernels.quantized_matmul(x, case.packed, scale, case.zero_point, **case.grid)
        return [decoded, y, *torch.autograd.grad(y, [x, scale], case.grad_out)]

    expected, actual = both_backends(run)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=2**-6 * e.abs().max().item())
