"""Defaults, ranges and the choice of bits and group size per module."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any, get_args

import pytest
from pydantic import BaseModel, ValidationError

from qatcli.formats.layouts import gguf_blocks
from qatcli.recipe import Recipe, schema


def sections() -> Iterator[type[BaseModel]]:
    for value in vars(schema).values():
        if isinstance(value, type) and issubclass(value, schema.Section) and value is not schema.Section:
            yield value


def test_importing_the_recipe_loads_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "datasets", "numpy", "safetensors")
    code = f"import sys, qatcli.recipe; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_key_has_a_description() -> None:
    models = list(sections())
    assert len(models) == 16
    keys = [(model, name, field) for model in models for name, field in model.model_fields.items()]
    # a section of the top level is described by the docstring of its own model
    undescribed = [name for model, name, field in keys if not field.description and model is not Recipe]
    assert undescribed == []
    assert all(model.__doc__ for model in models)


def test_defaults_are_the_method_qat(minimal: dict[str, Any]) -> None:
    recipe = Recipe.model_validate(minimal)
    assert recipe.method == "qat"
    assert (recipe.quant.group_size, recipe.quant.init, recipe.quant.skip) == (64, "weighted", ("lm_head",))
    assert (recipe.calibrate.samples, recipe.calibrate.seq_len, recipe.calibrate.seed) == (4096, 2048, 2)
    block_ap, e2e_qp = recipe.block_ap, recipe.e2e_qp
    assert (block_ap.loss, block_ap.rounding, block_ap.lr_units) == ("downstream", "nearest", "reach")
    rates = (block_ap.lr_weights, block_ap.lr_scales, block_ap.lr_zero_points, block_ap.lr_norms)
    assert rates == (0.5, 0.3, 0.0, 0.1)
    assert (block_ap.keep_best, block_ap.shuffle, block_ap.grad_clip) == (True, True, None)
    assert (e2e_qp.text_weight, e2e_qp.train, e2e_qp.lr_scales, e2e_qp.lr_norms) == (0.25, ("scales",), 0.3, 0.0)
    assert (e2e_qp.warmup, e2e_qp.grad_clip, e2e_qp.checkpoint_every, e2e_qp.data) == (0.1, 1.0, 16, None)


def test_a_recipe_does_not_change(minimal: dict[str, Any]) -> None:
    recipe = Recipe.model_validate(minimal)
    with pytest.raises(ValidationError, match="frozen"):
        recipe.quant.bits = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("quant", "bits", 5),
        ("quant", "bits", "2.0"),
        ("quant", "bits", "5"),
        ("quant", "group_size", 0),
        ("quant", "group_size", -2),
        ("quant", "overrides", [{"pattern": "*"}]),
        ("quant", "overrides", [{"pattern": "*", "bits": 5}]),
        ("calibrate", "data", []),
        ("calibrate", "samples", 0),
        ("calibrate", "samples", True),
        ("calibrate", "validation_samples", 0),
        ("calibrate", "seq_len", 7),
        ("calibrate", "seed", -1),
        ("calibrate", "seed", 2**32),
        ("calibrate", "data", [{"source": "./a.txt", "weight": 1e308}]),
        ("block_ap", "epochs", -1),
        ("block_ap", "lr_weights", -1e-5),
        ("block_ap", "lr_weights", float("nan")),
        ("block_ap", "lr_weights", float("inf")),
        ("block_ap", "min_lr_factor", 0.5),
        ("block_ap", "grad_clip", 0),
        ("block_ap", "cache", {"host_gb": -1}),
        ("block_ap", "cache", {"host_gb": 1e308}),
        ("block_ap", "cache", {"device_gb": 1e308}),
        ("e2e_qp", "validation_samples", 0),
        ("e2e_qp", "warmup", 1.0),
        ("e2e_qp", "train", []),
        ("e2e_qp", "train", ["weights"]),
        ("e2e_qp", "checkpoint_every", 0),
        ("pack", "scale_dtype", "int8"),
        ("export", "formats", ["onnx"]),
        ("export", "formats", []),
        ("export", "gguf_type", "Q9_9"),
        ("export", "gguf_type", "q8_0"),
        ("eval", "perplexity", [{"name": "a", "source": "wikitext2", "windows": 0}]),
        ("eval", "max_new_tokens", 0),
    ],
)
def test_values_out_of_range(build: Callable[..., Recipe], section: str, key: str, value: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        build(**{section: {key: value}})
    assert {error["loc"][:2] for error in caught.value.errors()} == {(section, key)}


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("quant", "group_size", -1),
        ("quant", "group_size", 96),
        ("calibrate", "validation_samples", 1),
        ("block_ap", "epochs", 0),
        ("block_ap", "lr_norms", 0),
        ("block_ap", "min_lr_factor", None),
        ("e2e_qp", "warmup", 0),
        ("eval", "perplexity", []),
    ],
)
def test_values_at_the_edge(build: Callable[..., Recipe], section: str, key: str, value: Any) -> None:
    got = getattr(getattr(build(**{section: {key: value}}), section), key)
    assert got == (tuple(value) if isinstance(value, list) else value)


def test_block_types_are_those_of_the_writer() -> None:
    known = get_args(schema.ExportSection.model_fields["gguf_type"].annotation)
    assert set(known) == {"auto", "exact", *gguf_blocks.TYPES}


def test_for_module(build: Callable[..., Recipe]) -> None:
    overrides = [
        {"pattern": "*.down_proj", "bits": 4},
        {"pattern": "model.layers.0.*", "group_size": 32},
        {"pattern": "model.layers.0.mlp.down_proj", "bits": 8},
    ]
    quant = build(quant={"overrides": overrides, "skip": ["lm_head", "*.k_proj"]}).quant
    assert quant.for_module("model.layers.1.mlp.up_proj") == (2, 64)
    assert quant.for_module("model.layers.1.mlp.down_proj") == (4, 64)
    assert quant.for_module("model.layers.0.mlp.up_proj") == (2, 32)
    assert quant.for_module("model.layers.0.mlp.down_proj") == (8, 32)  # the later match wins, key by key
    assert quant.for_module("model.layers.0.self_attn.k_proj") is None
    assert quant.for_module("lm_head") is None
    assert quant.for_module("LM_HEAD") == (2, 64)
