"""interleave: the run-time layout holds every code once and costs no more than the checkpoint's."""

from __future__ import annotations

import pytest
import torch

import qat_kernels
from qat_kernels import interleave


def deinterleave(words: torch.Tensor, bits: int, in_features: int) -> torch.Tensor:
    """The inverse of `interleave`, to codes uint8 [N, K], from the description at the top of its module."""
    rows, lanes = words.shape[0], words.shape[1] * 4 // bits
    planes = words.view(torch.uint8).split([lanes * size for size in interleave.PLANES[bits]], dim=1)
    lane = torch.cat([plane.view(rows, lanes, -1) for plane in planes], dim=2).long()
    values = (lane << 8 * torch.arange(bits)).sum(dim=2, keepdim=True)
    fields = values >> bits * torch.arange(8) & 2**bits - 1
    return fields.view(rows, -1, 8, 8).transpose(2, 3).reshape(rows, -1)[:, :in_features].to(torch.uint8)


@pytest.mark.parametrize("in_features", [1, 32, 63, 64, 65, 576, 1100])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_round_trip(bits: int, in_features: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interleave, "ROWS_AT_A_TIME", 2)
    codes = torch.randint(0, 2**bits, (5, in_features), dtype=torch.uint8)
    packed = qat_kernels.pack(codes, bits=bits)
    words = interleave.interleave(packed, bits=bits, in_features=in_features)
    assert words.shape == (5, interleave.words_per_row(in_features, bits))
    assert torch.equal(deinterleave(words, bits, in_features), codes)
    assert in_features % 64 or words.numel() == packed.numel()


@pytest.mark.parametrize(
    ("bits", "column", "places"),
    [
        (2, 0, [(0, 0), (0, 1)]),  # (byte of the row, bit) of each bit of the code, lowest first
        (2, 9, [(2, 2), (2, 3)]),  # field 1 of lane 1, two bytes a lane
        (2, 64 + 63, [(31, 6), (31, 7)]),
        (3, 17, [(2, 6), (2, 7), (3, 0)]),  # field 2 of lane 1, in the plane of 16 bits
        (3, 40, [(1, 7), (32, 0), (32, 1)]),  # field 5 of lane 0 goes on in the plane of 8 bits, behind 16 lanes
        (4, 63, [(47, 4), (47, 5), (47, 6), (47, 7)]),  # field 7 of lane 7, in the second plane behind 16 lanes
        (8, 32, [(64, bit) for bit in range(8)]),  # field 4 of lane 0 opens the third plane
    ],
)
def test_where_a_code_lies(bits: int, column: int, places: list[tuple[int, int]]) -> None:
    codes = torch.zeros(1, 128, dtype=torch.uint8)
    codes[0, column] = 2**bits - 1
    words = interleave.interleave(qat_kernels.pack(codes, bits=bits), bits=bits, in_features=128)
    row = words.view(torch.uint8)[0].tolist()
    assert [(place, bit) for place, byte in enumerate(row) for bit in range(8) if byte >> bit & 1] == places


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
    in_features: int, group_size: int, fits: bool, triton_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QAT_KERNELS", "triton")
    packed = qat_kernels.pack(torch.zeros(2, in_features, dtype=torch.uint8, device=triton_device), bits=2)
    prepared = qat_kernels.prepare(packed, bits=2, group_size=group_size, in_features=in_features)
    assert (prepared is not None) == fits


def test_prepare_checks_its_arguments() -> None:
    packed = qat_kernels.pack(torch.zeros(2, 66, dtype=torch.uint8), bits=2)
    with pytest.raises(ValueError, match=r"packed must have 9 words per row for 132 values of 2 bits\. Got: 5"):
        qat_kernels.prepare(packed, bits=2, group_size=66, in_features=132)
