"""A minimal recipe, as a mapping and as a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from qatcli.recipe import Recipe


@pytest.fixture
def minimal() -> dict[str, Any]:
    """The smallest valid recipe; it names nothing on this machine."""
    return {"model": {"source": "owner/model"}, "quant": {"bits": 2}, "calibrate": {"data": [{"source": "owner/text"}]}}


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Any], Path]:
    """A function that writes text, bytes or a mapping as `recipe.yaml` in a folder of its own and returns the path."""

    def write_file(content: Any) -> Path:
        path = tmp_path / "recipe.yaml"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
        return path

    return write_file


@pytest.fixture
def build(minimal: dict[str, Any]) -> Callable[..., Recipe]:
    """A function that validates the minimal recipe with sections replaced or extended: `build(quant={"bits": 4})`."""

    def build_recipe(**sections: Any) -> Recipe:
        merged = {name: {**minimal.get(name, {}), **section} for name, section in sections.items() if name != "method"}
        method = {"method": sections["method"]} if "method" in sections else {}
        return Recipe.model_validate({**minimal, **merged, **method})

    return build_recipe
