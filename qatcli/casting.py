"""Names of dtypes, and checks of casts to half precision.

The checks go part by part: for an embedding of a gigabyte they take next to no memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

PART = 2**22  # elements looked at together


def dtype_name(dtype: torch.dtype) -> str:
    """As configs, recipes and people write it: `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def all_finite(tensor: Tensor) -> bool:
    """Whether no element of `tensor` is infinite or NaN."""
    return all(bool(torch.isfinite(part).all()) for part in _parts(tensor))


def equally_finite(left: Tensor, right: Tensor) -> bool:
    """Whether the same elements of two tensors of one shape are finite: a cast that overflowed nowhere."""
    pairs = zip(_parts(left), _parts(right), strict=True)
    return all(torch.equal(torch.isfinite(one), torch.isfinite(other)) for one, other in pairs)


def _parts(tensor: Tensor) -> tuple[Tensor, ...]:
    return tensor.reshape(-1).split(PART)
