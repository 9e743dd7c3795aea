"""Dumping and loading gives the same recipe; the digest depends on its content alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qatcli.recipe import Recipe, changed_keys, digest, dump_recipe, load_recipe


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
    assert digest(recipe) == digest(build(quant={"group_size": 64}, block_ap={"lr_weights": "1e0"}))
    assert digest(recipe) != digest(build(quant={"group_size": 32}))
    assert len(digest(recipe)) == 64


def test_the_digest_is_stable(build: Callable[..., Recipe]) -> None:
    # Stage directories record it. If a key or a default was changed on purpose, so does this number.
    assert digest(build()) == "95246468f005a69df8fab7e3ec2661d3c5ae1b0b49a8c8fc0dce6a1e526be0a9"


def test_changed_keys(build: Callable[..., Recipe]) -> None:
    old = build().model_dump(mode="json")
    new = build(
        quant={"bits": 4, "skip": ["a", "b"]},
        calibrate={"data": [{"source": "owner/other"}]},
        block_ap={"cache": {"host_gb": 8}},
        eval={"kl": False},
    ).model_dump(mode="json")
    changed = ["quant.bits", "quant.skip", "calibrate.data.0.source", "block_ap.cache.host_gb"]
    assert changed_keys(old, new, ("quant", "calibrate", "block_ap")) == changed
    assert changed_keys(old, new, ("eval", "pack")) == ["eval.kl"]
    assert changed_keys(old, old, tuple(old)) == []
    assert changed_keys(old, {}, ("method",)) == ["method"]
