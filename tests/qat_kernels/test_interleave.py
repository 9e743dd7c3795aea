"""interleave: the run-time layout holds every code once and costs no more than the checkpoint's."""

from __future__ import annotations

import pytest
import torch

import qat_kernels
from qat_kernels import interleave


@pytest.mark.parametrize("in_features", [1, 32, 63, 64, 65, 576, 1100])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_round_trip(bits: int, in_features: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interleave, "ROWS_AT_A_TIME", 2)
    codes = torch.randint(0, 2**bits, (5, in_features), dtype=torch.uint8)
    packed = qat_kernels.pack(codes, bits=bits)
    words = interleave.interleave(packed, bits=bits, in_features=in_features)
    assert words.shape == (5, bits, interleave.lanes_per_row(in_features))
    assert torch.equal(interleave.deinterleave(words, bits=bits, in_features=in_features), codes)
    assert in_features % 64 or words.numel() == packed.numel()


@pytest.mark.parametrize(
    ("bits", "column", "places"),
    [
        (2, 0, [(0, 0, 0), (0, 0, 1)]),  # (word plane, lane, bit) of each bit of the code, lowest first
        (2, 65, [(0, 3, 0), (0, 3, 1)]),
        (4, 63, [(3, 1, 28), (3, 1, 29), (3, 1, 30), (3, 1, 31)]),
        (3, 21, [(1, 1, 0), (1, 1, 1), (1, 1, 2)]),
        (3, 60, [(0, 0, 30), (0, 0, 31), (2, 0, 30)]),
        (3, 63, [(1, 1, 30), (1, 1, 31), (2, 1, 31)]),
    ],
)
def test_where_a_code_lies(bits: int, column: int, places: list[tuple[int, int, int]]) -> None:
    codes = torch.zeros(1, 128, dtype=torch.uint8)
    codes[0, column] = 2**bits - 1
    words = interleave.interleave(qat_kernels.pack(codes, bits=bits), bits=bits, in_features=128)[0]
    found = [(j, u, b) for j in range(bits) for u in range(4) for b in range(32) if int(words[j, u]) >> b & 1]
    assert found == places


@pytest.mark.parametrize(
    ("in_features", "group_size", "fits"),
    [
        (66, -1, True),
        (66, 66, True),
        (96, 32, True),
        (128, 16, True),
        (192, 64, True),
        (192, 96, False),
        (66, 33, False),
    ],
)
def test_prepare_is_for_groups_that_fit_blocks(
    in_features: int, group_size: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("QAT_KERNELS", "triton")
    packed = qat_kernels.pack(torch.zeros(2, in_features, dtype=torch.uint8), bits=2)
    prepared = qat_kernels.prepare(packed, bits=2, group_size=group_size, in_features=in_features)
    assert (prepared is not None) == fits


def test_prepare_checks_its_arguments() -> None:
    packed = qat_kernels.pack(torch.zeros(2, 66, dtype=torch.uint8), bits=2)
    with pytest.raises(ValueError, match=r"packed must have 9 words per row for 132 values of 2 bits\. Got: 5"):
        qat_kernels.prepare(packed, bits=2, group_size=66, in_features=132)
