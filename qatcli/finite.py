"""JSON has no NaN and no infinity: a figure that was not measured, or that overflowed, is null."""

from __future__ import annotations

import math
from typing import Any


def finite(value: Any) -> Any:
    """`value` (numbers, texts, lists, mappings) with None in the place of every float that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
