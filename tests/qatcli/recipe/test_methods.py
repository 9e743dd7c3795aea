"""What a method fills, and that a written key wins."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import pytest

from qatcli.recipe import METHODS, Recipe, preset
from qatcli.recipe.methods import Method, fill


def test_every_method_has_a_preset() -> None:
    assert set(METHODS) == set(get_args(Method)) == {"qat", "efficientqat"}


@pytest.mark.parametrize(("bits", "rate"), [(2, 2e-5), (3, 1e-5), (4, 1e-5), (8, 1e-5)])
def test_efficientqat_is_the_published_recipe(build: Callable[..., Recipe], bits: int, rate: float) -> None:
    recipe = build(method="efficientqat", quant={"bits": bits})
    block_ap, e2e_qp = recipe.block_ap, recipe.e2e_qp
    assert recipe.quant.init == "minmax"
    assert (block_ap.loss, block_ap.rounding, block_ap.lr_units) == ("mse", "nearest", "absolute")
    assert (block_ap.lr_weights, block_ap.lr_norms) == (rate, rate)
    assert (block_ap.lr_scales, block_ap.lr_zero_points) == (1e-4, 1e-4)
    assert (block_ap.min_lr_factor, block_ap.grad_clip) == (20, None)
    assert (block_ap.shuffle, block_ap.keep_best) == (False, False)
    assert (block_ap.epochs, block_ap.batch_size) == (2, 2)
    assert (e2e_qp.text_weight, e2e_qp.train, e2e_qp.lr_units) == (1, ("scales",), "absolute")
    assert (e2e_qp.lr_scales, e2e_qp.lr_norms, e2e_qp.min_lr_factor) == (rate, 0.0, None)
    assert (e2e_qp.warmup, e2e_qp.grad_clip, e2e_qp.keep_best) == (0.03, 0.3, False)
    assert (e2e_qp.samples, e2e_qp.seq_len, e2e_qp.epochs, e2e_qp.batch_size) == (4096, 4096, 1, 32)


def test_a_written_key_wins(build: Callable[..., Recipe]) -> None:
    recipe = build(method="efficientqat", block_ap={"shuffle": True, "lr_scales": 3e-5})
    assert (recipe.block_ap.shuffle, recipe.block_ap.lr_scales) == (True, 3e-5)
    assert recipe.block_ap.loss == "mse"


def test_an_empty_section_is_a_section_left_out() -> None:
    assert fill({"block_ap": None, "method": "efficientqat"})["block_ap"]["loss"] == "mse"
    assert fill({"block_ap": None}) == {}


def test_filling_does_not_touch_its_input() -> None:
    given = {"method": "efficientqat", "quant": {"bits": 2}}
    fill(given)
    assert given == {"method": "efficientqat", "quant": {"bits": 2}}


@pytest.mark.parametrize("method", ["nonsense", 3, None, ["qat"]])
def test_what_is_malformed_is_left_to_the_validation(method: object) -> None:
    assert fill({"method": method, "quant": 7, "block_ap": [1]}).get("quant") == 7


def test_a_preset_names_keys_of_the_schema() -> None:
    named = [(section, key) for section, keys in preset("efficientqat", 2).items() for key in keys]
    assert len(named) > 15
    for section, key in named:
        model = Recipe.model_fields[section].annotation
        assert model is not None
        assert key in model.model_fields  # type: ignore[attr-defined]
