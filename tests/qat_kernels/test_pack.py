"""pack: the dense little-endian bitstream, against big-integer arithmetic and against golden vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qat_kernels

BothBackends = Callable[[Callable[[], Any]], tuple[Any, Any]]

LENGTHS = [1, 7, 8, 9, 10, 11, 31, 32, 33, 96, 100, 1100]


def expected_row(codes: list[int], bits: int) -> list[int]:
    """The int32 words of one row."""
    stream = sum(code << (bits * i) for i, code in enumerate(codes))
    words = -(-len(codes) * bits // 32)
    data = stream.to_bytes(4 * words, "little")
    return [int.from_bytes(data[4 * i : 4 * i + 4], "little", signed=True) for i in range(words)]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_is_a_little_endian_bitstream(backend: str, device: str, bits: int, length: int) -> None:
    codes = torch.randint(0, 2**bits, (3, length), dtype=torch.uint8, device=device)
    packed = qat_kernels.pack(codes, bits=bits)
    assert packed.dtype == torch.int32
    assert packed.is_contiguous()
    assert packed.tolist() == [expected_row(row, bits) for row in codes.tolist()]


@given(st.sampled_from([2, 3, 4, 8]), st.integers(1, 3), st.integers(1, 70), st.data())
@settings(deadline=None, max_examples=60)
def test_any_shape_round_trips(bits: int, rows: int, length: int, data: st.DataObject) -> None:
    row = st.lists(st.integers(0, 2**bits - 1), min_size=length, max_size=length)
    codes = torch.tensor(data.draw(st.lists(row, min_size=rows, max_size=rows)), dtype=torch.uint8)
    packed = qat_kernels.pack(codes, bits=bits)
    assert packed.tolist() == [expected_row(row, bits) for row in codes.tolist()]
    assert torch.equal(qat_kernels.unpack(packed, bits=bits, length=length), codes)


def test_reads_strided_codes(backend: str, device: str) -> None:
    codes = torch.randint(0, 8, (40, 3), dtype=torch.uint8, device=device)
    assert torch.equal(qat_kernels.pack(codes.t(), bits=3), qat_kernels.pack(codes.t().contiguous(), bits=3))


def test_equals_golden_vectors(layouts: dict[str, dict[str, torch.Tensor]]) -> None:
    checked = set()
    for name, case in layouts.items():
        bits = int(name[1])
        codes, zeros = case["codes"], case["zeros"]
        if "compressed_tensors/weight_packed" in case:
            assert torch.equal(qat_kernels.pack(codes, bits=bits), case["compressed_tensors/weight_packed"]), name
            packed_zeros = qat_kernels.pack(zeros.t(), bits=bits).t()
            assert torch.equal(packed_zeros, case["compressed_tensors/weight_zero_point"]), name
            checked.add(("compressed-tensors", bits))
        if "gptq_v2/qweight" in case:
            assert torch.equal(qat_kernels.pack(codes, bits=bits).t(), case["gptq_v2/qweight"]), name
            assert torch.equal(qat_kernels.pack(zeros.t(), bits=bits), case["gptq_v2/qzeros"]), name
            checked.add(("gptq", bits))
    assert {(layout, bits) for layout in ("compressed-tensors", "gptq") for bits in (2, 3, 4)} <= checked


@pytest.mark.parametrize(
    ("codes", "bits", "message"),
    [
        (torch.zeros(1, 8, dtype=torch.uint8), 1, r"bits must be one of \(2, 3, 4, 8\). Got: 1"),
        (torch.zeros(1, 8, dtype=torch.int32), 2, "codes must be torch.uint8. Got: torch.int32"),
        (torch.zeros(8, dtype=torch.uint8), 2, r"codes must have 2 dimensions. Got: shape \(8,\)"),
        (torch.zeros(0, 8, dtype=torch.uint8), 2, r"codes must not be empty. Got: shape \(0, 8\)"),
    ],
)
def test_wrong_arguments(codes: torch.Tensor, bits: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        qat_kernels.pack(codes, bits=bits)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_real_size(both_backends: BothBackends, bits: int) -> None:
    codes = torch.randint(0, 2**bits, (4096, 11008), dtype=torch.uint8, device="cuda")
    expected, actual = both_backends(lambda: qat_kernels.pack(codes, bits=bits))
    assert torch.equal(actual, expected)
