"""docs/recipe.md says what the schema says."""

from __future__ import annotations

from pathlib import Path

import pytest

from qatcli.recipe import Recipe
from qatcli.recipe.reference import key_tables, updated

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "recipe.md"


def test_the_document_is_in_sync() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert text == updated(text), "run `python -m qatcli.recipe.reference docs/recipe.md`"


def test_every_section_and_key_has_a_row() -> None:
    tables = key_tables()
    for name, field in Recipe.model_fields.items():
        keys = getattr(field.annotation, "model_fields", None)
        assert f"### `{name}`" in tables if keys else f"| `{name}` |" in tables
        for key in keys or ():
            assert f"| `{key}` |" in tables or f"| `{key}." in tables


def test_bounds_and_presets_are_shown() -> None:
    tables = key_tables()
    assert "| `min_lr_factor` | number >= 1, null | `20.0` | `null` |" in tables
    assert "| `lr_weights` | number >= 0 | `0.5` | `2e-05` at 2 bits, else `1e-05` |" in tables
    assert '| `zero_points` | any, central, middle | `"central"` at 2 bits, else `"any"` | `"any"` |' in tables
    assert "| `bits` | 2, 3, 4, 8 | required |" in tables


def test_a_document_without_markers() -> None:
    with pytest.raises(ValueError, match="must contain"):
        updated("# The recipe")
