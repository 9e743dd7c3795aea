"""Casts to half precision: what does not fit is seen, wherever in a tensor it stands."""

from __future__ import annotations

import pytest
import torch

from qatcli import casting
from qatcli.casting import all_finite, dtype_name, equally_finite


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "int32"])
def test_a_dtype_goes_by_the_name_that_torch_has_for_it(name: str) -> None:
    assert dtype_name(getattr(torch, name)) == name


@pytest.mark.parametrize("place", [0, 7, 8, 23])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, 1e6])
def test_one_element_is_found_in_any_part(monkeypatch: pytest.MonkeyPatch, place: int, value: float) -> None:
    monkeypatch.setattr(casting, "PART", 8)
    tensor = torch.ones(4, 6)
    assert all_finite(tensor.half())
    assert equally_finite(tensor.half(), tensor)
    tensor.view(-1)[place] = value
    assert not all_finite(tensor.half())
    assert equally_finite(tensor.half(), tensor) == (value != 1e6)  # what was not finite before did not overflow


def test_an_empty_tensor_is_finite() -> None:
    assert all_finite(torch.empty(0, 4))
