"""Presets: what a method means for the keys that a recipe leaves out.

`qat` is what the schema's defaults say, but for zero points at 2 bits: the central two lose nothing there (LOG.md) and
make a model fit GGUF's smallest exact block type. `efficientqat` is the recipe of Chen et al.,
"EfficientQAT" (arXiv 2407.11062), with the rates of its appendix and public code: absolute rates, lower above
2 bits, min-max grids, plain squared error, no shuffling and no choice of the best state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from qatcli.recipe.fields import number

if TYPE_CHECKING:
    from qatcli.recipe.schema import Recipe

Method = Literal["qat", "efficientqat"]
Preset = dict[str, dict[str, Any]]


def _qat(bits: int) -> Preset:
    return {"quant": {"zero_points": "central"}} if bits == 2 else {}


def _efficientqat(bits: int) -> Preset:
    rate = 2e-5 if bits == 2 else 1e-5
    return {
        "quant": {"init": "minmax"},
        "block_ap": {
            "loss": "mse",
            "lookahead": False,
            "rounding": "nearest",
            "lr_units": "absolute",
            "lr_weights": rate,
            "lr_scales": 1e-4,
            "lr_zero_points": 1e-4,
            # the public code trains every parameter whose name contains "weight", the two norms of a block included
            "lr_norms": rate,
            "min_lr_factor": 20.0,
            "keep_best": False,
            "shuffle": False,
            "grad_clip": None,
        },
        "e2e_qp": {
            "text_weight": 1.0,
            "train": ["scales"],
            "lr_units": "absolute",
            "lr_scales": rate,
            "lr_norms": 0.0,
            "min_lr_factor": None,
            "warmup": 0.03,
            "grad_clip": 0.3,
            "keep_best": False,
        },
    }


METHODS: dict[str, Callable[[int], Preset]] = {"qat": _qat, "efficientqat": _efficientqat}


def preset(method: str, bits: int) -> Preset:
    """Section -> key -> value that `method` uses at `bits` where it differs from the schema's defaults."""
    return METHODS[method](bits)


def fill(recipe: Mapping[Any, Any]) -> dict[Any, Any]:
    """A copy of an unvalidated recipe with the keys that its method fills.

    An empty section (`block_ap:` with nothing below) is a section left out. Whatever is malformed is passed on for
    the validation to report; an unknown method or unknown bits fill nothing wrong because the recipe is refused.
    """
    filled = {key: value for key, value in recipe.items() if value is not None}
    method = filled.get("method", "qat")
    quant = filled.get("quant")
    bits = number(quant.get("bits")) if isinstance(quant, Mapping) else None
    if not isinstance(method, str) or method not in METHODS:
        return filled
    for section, defaults in preset(method, bits if isinstance(bits, int) else 4).items():
        given = filled.get(section, {})
        if isinstance(given, Mapping):
            filled[section] = {**defaults, **given}
    return filled


def untrained_gptq(recipe: Recipe) -> Recipe:
    """The recipe of the baseline `gptq`: the same model, bits, groups and text, GPTQ's rounding, nothing trained."""
    untrained = recipe.block_ap.model_copy(update={"epochs": 0, "rounding": "gptq", "lookahead": False})
    return recipe.model_copy(update={"block_ap": untrained})
