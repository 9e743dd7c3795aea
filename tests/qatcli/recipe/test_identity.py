"""The digest of a recipe depends on its content alone."""

from __future__ import annotations

from collections.abc import Callable

from qatcli.recipe import Recipe, digest


def test_the_digest_is_of_the_content(build: Callable[..., Recipe]) -> None:
    recipe = build()
    spelled_out = build(quant={"group_size": 64}, block_ap={"lr_weights": f"{recipe.block_ap.lr_weights:e}"})
    assert digest(recipe) == digest(spelled_out)
    assert digest(recipe) != digest(build(quant={"group_size": 32}))
    assert len(digest(recipe)) == 64
