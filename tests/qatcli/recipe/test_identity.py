"""Dumping and loading gives the same recipe; the digest depends on its content alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qatcli.recipe import Recipe, digest, dump_recipe, load_recipe


@pytest.mark.parametrize("method", ["qat", "efficientqat"])
def test_round_trip(build: Callable[..., Recipe], write: Callable[[Any], Path], method: str) -> None:
    recipe = build(
        method=method,
        eval={"prompts": ["${HOME} $${x}", "a: b\n\ttab", "1e-4", "", "caf\u00e9 \u2028"]},
        quant={"overrides": [{"pattern": "*", "group_size": -1}]},
        block_ap={"cache": {"host_gb": 1 / 3}},
        e2e_qp={"data": [{"source": "a/b", "format": "alpaca"}]},
    )
    loaded = load_recipe(write(dump_recipe(recipe)))
    assert loaded == recipe
    assert digest(loaded) == digest(recipe)


def test_a_dumped_recipe_has_every_key(build: Callable[..., Recipe]) -> None:
    text = dump_recipe(build())
    assert "checkpoint_every: 16" in text
    assert text.startswith("method: qat\n")


def test_the_digest_is_of_the_content(build: Callable[..., Recipe]) -> None:
    recipe = build()
    spelled_out = build(quant={"group_size": 64}, block_ap={"lr_weights": f"{recipe.block_ap.lr_weights:e}"})
    assert digest(recipe) == digest(spelled_out)
    assert digest(recipe) != digest(build(quant={"group_size": 32}))
    assert len(digest(recipe)) == 64
