"""unpack: the inverse of pack."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import qat_kernels

BothBackends = Callable[[Callable[[], Any]], tuple[Any, Any]]


@pytest.mark.parametrize("length", [1, 7, 9, 10, 11, 21, 22, 32, 33, 96, 1100])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_inverts_pack(backend: str, device: str, bits: int, length: int) -> None:
    codes = torch.randint(0, 2**bits, (3, length), dtype=torch.uint8, device=device)
    unpacked = qat_kernels.unpack(qat_kernels.pack(codes, bits=bits), bits=bits, length=length)
    assert unpacked.dtype == torch.uint8
    assert unpacked.is_contiguous()
    assert torch.equal(unpacked, codes)


def test_reads_three_bit_values_across_words(backend: str, device: str) -> None:
    """Values 10 and 21 of a run of 32 lie across two words (docs/formats.md, section 1.1)."""
    words = torch.tensor([[1 << 30, 1 | 1 << 31, 3]], dtype=torch.int64, device=device).to(torch.int32)
    codes = qat_kernels.unpack(words, bits=3, length=32)
    assert codes[0].nonzero().flatten().tolist() == [10, 21]
    assert codes[0, [10, 21]].tolist() == [0b101, 0b111]


def test_reads_strided_words(backend: str, device: str) -> None:
    packed = torch.randint(-(2**31), 2**31 - 1, (2, 3), device=device).to(torch.int32).t()
    expected = qat_kernels.unpack(packed.contiguous(), bits=4, length=16)
    assert torch.equal(qat_kernels.unpack(packed, bits=4, length=16), expected)


def test_does_not_alias_its_input(backend: str, device: str) -> None:
    packed = torch.zeros(1, 2, dtype=torch.int32, device=device)
    codes = qat_kernels.unpack(packed, bits=8, length=8)
    packed.fill_(-1)
    assert codes.sum() == 0


@pytest.mark.parametrize(
    ("packed", "length", "message"),
    [
        (torch.zeros(1, 2, dtype=torch.int32), 33, "packed must have 3 words per row for 33 values of 2 bits. Got: 2"),
        (torch.zeros(1, 2, dtype=torch.int32), 16, "packed must have 1 words per row for 16 values of 2 bits. Got: 2"),
        (torch.zeros(1, 2, dtype=torch.int64), 32, "packed must be torch.int32. Got: torch.int64"),
    ],
)
def test_wrong_arguments(packed: torch.Tensor, length: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        qat_kernels.unpack(packed, bits=2, length=length)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_real_size(both_backends: BothBackends, bits: int) -> None:
    packed = torch.randint(-(2**31), 2**31 - 1, (4096, 344 * bits), device="cuda").to(torch.int32)
    expected, actual = both_backends(lambda: qat_kernels.unpack(packed, bits=bits, length=11008))
    assert torch.equal(actual, expected)
