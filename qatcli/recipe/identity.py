"""What makes two recipes the same: text, digest and difference."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from qatcli.recipe.locations import escape_variables
from qatcli.recipe.schema import Recipe
from qatcli.recipe.text import write


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every key written out; `load_recipe` reads it back to an equal Recipe."""
    return write(_escaped(recipe.model_dump(mode="json")))


def digest(recipe: Recipe) -> str:
    """SHA-256 (hex) of the resolved recipe as canonical JSON: sorted keys, no spaces, ASCII."""
    text = json.dumps(recipe.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _escaped(value: Any) -> Any:
    """`value` with every text written so that loading expands no variable in it."""
    if isinstance(value, dict):
        return {key: _escaped(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_escaped(inner) for inner in value]
    return escape_variables(value) if isinstance(value, str) else value
