"""The types of recipe keys, and what all sections share."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo

from qatcli.recipe import locations


def _not_a_boolean(value: Any) -> Any:
    """Python counts True as 1; in a recipe `samples: yes` is a mistake."""
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


def number(value: Any) -> Any:
    """The number that a text of digits is, which is what a variable expands to; anything else as it is."""
    return int(value) if isinstance(value, str) and re.fullmatch("[0-9]{1,9}", value) else value


def _group_size(value: int) -> int:
    if value == 0 or value < -1:
        raise ValueError("must be positive, or -1 for one group per row")
    return value


def _read_by(resolve: Callable[[str, Path], str]) -> AfterValidator:
    """Resolves what names a place, relative to the recipe's folder where that is given (as the context)."""

    def place(value: str, info: ValidationInfo) -> str:
        return value if info.context is None else resolve(value, info.context)

    return AfterValidator(place)


Number = BeforeValidator(_not_a_boolean)
Bits = Annotated[Literal[2, 3, 4, 8], BeforeValidator(number)]
Name = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Number, Field(ge=1)]
CountOrZero = Annotated[int, Number, Field(ge=0)]
Rate = Annotated[float, Number, Field(ge=0)]
Positive = Annotated[float, Number, Field(gt=0)]
DecayFactor = Annotated[float, Number, Field(ge=1)]
GroupSize = Annotated[int, Number, AfterValidator(_group_size)]
Source = Annotated[Name, _read_by(locations.resolve_source)]
Text = Annotated[Name, _read_by(locations.resolve_text)]
Folder = Annotated[Name, _read_by(locations.absolute)]
DataFolder = Annotated[Name, _read_by(locations.resolve_folder)]


class Section(BaseModel):
    """What all sections share: unknown keys are errors, values never change, docstrings are descriptions."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)
