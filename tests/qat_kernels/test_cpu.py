"""The compiled ops of a CPU beside the reference: equal codes, sums within rounding, and when the reference is taken.

The tests of every op run over this backend too (`backend` in conftest.py); here are its own hazards.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from qat_kernels import cpu, cpu_build, fake_quant, pack, quantized_matmul, reference

BITS = [2, 3, 4, 8]
ROWS, COLUMNS = 37, 192  # an odd number of rows; groups of 8, 24, 64 and the row


@pytest.fixture(autouse=True)
def whatever_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    if cpu_build.library() is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setattr(cpu, "SMALLEST", 0)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads for the rest of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def grid(bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Scales in and beyond their bounds, zero points off the integers and outside the grid."""
    shape = (ROWS, COLUMNS // (COLUMNS if group_size == -1 else group_size))
    scale = torch.rand(shape) * 0.4 + 0.05
    scale[0], scale[1] = -1.0, 1e5
    return scale, (torch.rand(shape) * 1.6 - 0.3) * (2**bits - 1)


def packed_weight(bits: int, group_size: int, columns: int = COLUMNS) -> tuple[Tensor, Tensor, Tensor]:
    shape = (ROWS, columns // (columns if group_size == -1 else group_size))
    codes = torch.randint(0, 2**bits, (ROWS, columns), dtype=torch.uint8)
    zero_point = torch.randint(0, 2**bits, shape, dtype=torch.uint8)
    return pack(codes, bits=bits), torch.rand(shape) * 0.1 + 0.01, zero_point


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [6, 24, 64, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fake_quant_equals_the_reference_bit_for_bit(bits: int, group_size: int, dtype: torch.dtype) -> None:
    scale, zero_point = grid(bits, group_size)
    weight = torch.randn(ROWS, COLUMNS) * 0.5
    weight[2:20] = (torch.randint(-40, 40, (18, COLUMNS)) + 0.5) * scale[2:20].repeat_interleave(
        COLUMNS // scale.shape[1], dim=1
    )  # ties, where a reciprocal or a rounding away from zero would show
    kind: dict[str, Any] = {"bits": bits, "group_size": group_size}
    ours = cpu.fake_quant(weight, scale, zero_point, **kind, out_dtype=dtype)
    assert torch.equal(ours, reference.fake_quant(weight, scale, zero_point, **kind, out_dtype=dtype))

    grad = torch.randn(ROWS, COLUMNS).to(dtype)
    mine = cpu.fake_quant_backward(grad, weight, scale, zero_point, **kind)
    expected = reference.fake_quant_backward(grad, weight, scale, zero_point, **kind)
    assert torch.equal(mine[0], expected[0])
    for sums, exact in zip(mine[1:], expected[1:], strict=True):
        torch.testing.assert_close(sums, exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [6, 24, 64, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dequantize_equals_the_reference_bit_for_bit(bits: int, group_size: int, dtype: torch.dtype) -> None:
    weight = packed_weight(bits, group_size)
    kind: dict[str, Any] = {"bits": bits, "group_size": group_size, "in_features": COLUMNS, "dtype": dtype}
    assert torch.equal(cpu.dequantize(*weight, **kind), reference.dequantize(*weight, **kind))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("group_size", "columns"), [(6, 192), (24, 192), (64, 192), (-1, 192), (-1, 40), (-1, 19)])
@pytest.mark.parametrize("count", [1, 2, 7, 16, 17])
def test_a_few_rows_and_many_give_the_product_with_the_dense_weight(
    bits: int, group_size: int, columns: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "BLOCK_ELEMENTS", 5 * columns)  # several blocks, the last one smaller
    weight = packed_weight(bits, group_size, columns)
    kind: dict[str, Any] = {"bits": bits, "group_size": group_size}
    x = torch.randn(count, columns)
    dense = reference.dequantize(*weight, **kind, in_features=columns, dtype=torch.float32).double()
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)):
        y = cpu.quantized_matmul(x.to(dtype), *weight, **kind)
        expected = x.to(dtype).double() @ dense.T
        assert y.dtype == dtype
        assert float((y - expected).norm() / expected.norm()) < tolerance, dtype
        upstream = torch.randn(count, ROWS).to(dtype)
        d_x = cpu.input_grad(upstream, *weight, **kind, in_features=columns)
        expected = upstream.double() @ dense
        assert d_x.dtype == dtype
        assert float((d_x - expected).norm() / expected.norm()) < tolerance, dtype


@pytest.mark.parametrize("group_size", [8, 24, 32])
@pytest.mark.parametrize("bits", BITS)
def test_nothing_beyond_the_last_packed_row_is_read(bits: int, group_size: int) -> None:
    """Behind the codes lies a page that may not be read; with three bits the last unit is three bytes, not a word."""
    packed, scale, zero_point = packed_weight(bits, group_size, 96)
    memory = mmap.mmap(-1, 2 * mmap.PAGESIZE)
    start = mmap.PAGESIZE - packed.nbytes
    memory[start : mmap.PAGESIZE] = packed.numpy().tobytes()
    last = torch.frombuffer(memory, dtype=torch.int32, count=packed.numel(), offset=start).view_as(packed)
    libc, behind = ctypes.CDLL(None, use_errno=True), last.data_ptr() + last.nbytes
    assert libc.mprotect(ctypes.c_void_p(behind), mmap.PAGESIZE, 0) == 0, ctypes.get_errno()
    x, kind = torch.randn(3, 96), {"bits": bits, "group_size": group_size}

    def run(weight: Tensor) -> list[Tensor]:
        dense = cpu.dequantize(weight, scale, zero_point, **kind, in_features=96, dtype=torch.float32)
        return [dense, cpu.quantized_matmul(x, weight, scale, zero_point, **kind)]

    assert all(torch.equal(here, there) for here, there in zip(run(last), run(packed), strict=True))


def test_strided_tensors_are_read_as_they_look() -> None:
    scale, zero_point = grid(4, 24)
    weight = torch.randn(COLUMNS, ROWS).T
    kind: dict[str, Any] = {"bits": 4, "group_size": 24}
    ours = cpu.fake_quant(weight, scale.T.contiguous().T, zero_point, **kind, out_dtype=torch.float32)
    assert torch.equal(ours, reference.fake_quant(weight, scale, zero_point, **kind, out_dtype=torch.float32))
    grad = torch.ones(1, 1).expand(ROWS, COLUMNS)
    mine = cpu.fake_quant_backward(grad, weight, scale, zero_point, **kind)
    assert torch.equal(mine[0], reference.fake_quant_backward(grad, weight, scale, zero_point, **kind)[0])


@pytest.mark.parametrize("where", ["weight", "scale", "zero_point"])
def test_a_nan_stays_one(where: str) -> None:
    scale, zero_point = grid(2, 64)
    tensors = {"weight": torch.randn(ROWS, COLUMNS), "scale": scale, "zero_point": zero_point}
    tensors[where][5, 1] = float("nan")
    for dtype in (torch.float32, torch.bfloat16):
        out = cpu.fake_quant(**tensors, bits=2, group_size=64, out_dtype=dtype)
        expected = reference.fake_quant(**tensors, bits=2, group_size=64, out_dtype=dtype)
        assert torch.equal(out.isnan(), expected.isnan())
        assert bool(out.isnan().any())


def test_results_are_made_where_the_weight_is() -> None:
    """Not on torch's default device, whose memory the library cannot write."""
    scale, zero_point = grid(4, 24)
    weight, x, packed = torch.randn(ROWS, COLUMNS), torch.randn(2, COLUMNS), packed_weight(4, 24)
    kind: dict[str, Any] = {"bits": 4, "group_size": 24}
    with torch.device("meta"):
        made = [
            cpu.fake_quant(weight, scale, zero_point, **kind, out_dtype=torch.float32),
            cpu.dequantize(*packed, **kind, in_features=COLUMNS, dtype=torch.float32),
            cpu.quantized_matmul(x, *packed, **kind),
        ]
    assert {tensor.device.type for tensor in made} == {"cpu"}


def test_results_do_not_depend_on_the_number_of_threads(threads: Callable[[int], None]) -> None:
    scale, zero_point = grid(3, 24)
    weight, grad, x = torch.randn(ROWS, COLUMNS), torch.randn(ROWS, COLUMNS), torch.randn(5, COLUMNS)
    packed = packed_weight(3, 24)
    results = []
    for count in (1, 2, 3):
        threads(count)
        kind: dict[str, Any] = {"bits": 3, "group_size": 24}
        grads = cpu.fake_quant_backward(grad, weight, scale, zero_point, **kind)
        results.append((*grads, cpu.quantized_matmul(x, *packed, **kind)))
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def test_small_weights_and_tensors_without_memory_take_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    monkeypatch.setattr(cpu.cpu_build, "library", lambda: called.append("library"))
    weight = packed_weight(4, 64)
    monkeypatch.setattr(cpu, "SMALLEST", ROWS * COLUMNS + 1)
    quantized_matmul(torch.randn(1, COLUMNS), *weight, bits=4, group_size=64)
    monkeypatch.setattr(cpu, "SMALLEST", ROWS * COLUMNS)
    meta = [torch.empty(ROWS, COLUMNS, device="meta"), *(torch.empty(ROWS, 3, device="meta") for _ in range(2))]
    assert fake_quant(*meta, bits=4, group_size=64).shape == (ROWS, COLUMNS)
    assert called == []
    quantized_matmul(torch.randn(1, COLUMNS), *weight, bits=4, group_size=64)
    assert called, "at the bound the library is asked for"


def test_without_a_library_the_reference_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu.cpu_build, "library", lambda: None)
    weight, kind = packed_weight(4, 64), {"bits": 4, "group_size": 64}
    x = torch.randn(3, COLUMNS)
    assert torch.equal(quantized_matmul(x, *weight, **kind), reference.quantized_matmul(x, *weight, **kind))
    dequantized: list[int] = []

    def watched(packed: torch.Tensor, *rest: torch.Tensor, **options: Any) -> torch.Tensor:
        dequantized.append(len(packed))
        return reference.dequantize(packed, *rest, **options)

    monkeypatch.setattr(cpu, "dequantize", watched)
    monkeypatch.setattr(cpu, "BLOCK_ELEMENTS", ROWS * COLUMNS // 2)
    assert torch.allclose(quantized_matmul(x, *weight, **kind), reference.quantized_matmul(x, *weight, **kind))
    assert max(dequantized) <= ROWS // 2, "no whole dense weight, with a compiler or without"
