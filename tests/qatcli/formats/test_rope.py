"""Rotary embeddings under earlier names: what the hub's files of those days said, and transformers still reads."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from qatcli.formats import FORMATS, ExportOptions
from qatcli.formats.model_directory import model_config
from qatcli.formats.rope import earlier_keys
from qatcli.packed import PackedCheckpoint, read_config

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LONG = {"short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0]}
ATTENTION = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
LINEAR = {"rope_type": "linear", "factor": 8.0}

CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("llama", {"rope_type": "default", "rope_theta": 1e5}, {"rope_theta": 1e5}),
    (
        "llama",
        {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    ),
    ("qwen2", {"rope_theta": 1e6, **LINEAR}, {"rope_theta": 1e6, "rope_scaling": LINEAR}),
    (
        "phi",
        {"rope_type": "default", "rope_theta": 1e5, "partial_rotary_factor": 0.4},
        {"rope_theta": 1e5, "partial_rotary_factor": 0.4},
    ),
    (
        "gpt_neox",
        {"rope_type": "default", "rope_theta": 2e4, "partial_rotary_factor": 0.5},
        {"rotary_emb_base": 2e4, "rotary_pct": 0.5},
    ),
    (
        "gemma3_text",
        {**ATTENTION, "full_attention": {"rope_theta": 1e6, **LINEAR}},
        {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": LINEAR},
    ),
    (
        "gpt_neox_japanese",
        {"rope_type": "default", "rope_theta": 2e4, "partial_rotary_factor": 1.0},
        {"rotary_emb_base": 2e4, "rotary_pct": 1.0},
    ),
    ("olmo2", {"rope_theta": 5e5, **LINEAR}, {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 8.0}}),
    ("opt", {}, {}),
]


@pytest.mark.parametrize(("kind", "rope", "expected"), CASES)
def test_earlier_keys_say_the_same(kind: str, rope: dict[str, Any], expected: dict[str, Any]) -> None:
    """transformers, which still reads them, makes the same settings of them alone, and of both together."""
    config = {"model_type": kind, **({"rope_parameters": rope} if rope else {})}
    assert earlier_keys(config) == expected
    both = AutoConfig.for_model(**deepcopy({**config, **expected}))  # which writes into what it is given
    alone = AutoConfig.for_model(kind, **deepcopy(expected))
    assert getattr(both, "rope_parameters", {}) == getattr(alone, "rope_parameters", {})
    for key, value in rope.items():
        assert alone.rope_parameters[key] == value


def test_phi3_calls_its_scaling_type_and_has_three_keys() -> None:
    """As its files on the hub do; transformers 4 refuses others."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 4096, **LONG}
    config = {"model_type": "phi3", "original_max_position_embeddings": 4096, "rope_parameters": rope}
    assert earlier_keys(config) == {"rope_theta": 1e4, "rope_scaling": {"type": "longrope", **LONG}}


@pytest.mark.parametrize(
    "rope",
    [{"full_attention": None, "sliding_attention": {"rope_theta": 1e4}}, {"main": {"rope_theta": 1e6, **LINEAR}}],
)
def test_settings_by_kind_of_layer_that_had_no_keys_get_none(rope: dict[str, Any]) -> None:
    assert earlier_keys({"model_type": "llama", "rope_parameters": rope}) == {}


OF_THE_HUB: list[dict[str, Any]] = [
    {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
]


@pytest.mark.parametrize("keys", OF_THE_HUB)
@pytest.mark.parametrize("name", ["gptq", "dense"])
def test_a_source_with_earlier_keys_keeps_them(
    packed: Callable[..., PackedCheckpoint], tmp_path: Path, name: str, keys: dict[str, Any]
) -> None:
    """To the letter, although transformers writes into what it reads."""
    own = {key: value for key, value in packed(4).config.items() if not key.startswith("rope")}
    checkpoint = replace(packed(4), config=deepcopy({**own, **keys}))
    FORMATS[name].write(checkpoint, tmp_path / "out", ExportOptions(runtimes=False))
    written = read_config(tmp_path / "out")
    assert {key: value for key, value in written.items() if key.startswith("rope")} == keys


def test_keys_that_transformers_5_would_read_otherwise_are_left_out(packed: Callable[..., PackedCheckpoint]) -> None:
    """It prefers rope_scaling, in which Phi-3 had no factors of its own."""
    sizes = {"num_attention_heads": 2, "hidden_size": 8, "original_max_position_embeddings": 32}
    rope = {"rope_type": "longrope", "rope_theta": 5e4, "original_max_position_embeddings": 32, **LONG}
    for more, keys in (({}, {"rope_theta", "rope_scaling"}), ({"factor": 2.0, "attention_factor": 1.3}, set())):
        config = {"model_type": "phi3", **sizes, "rope_parameters": {**rope, **more}}
        written = model_config(replace(packed(4), config=config), torch.float16)
        assert {key for key in written if key.startswith("rope")} - {"rope_parameters"} == keys


def test_earlier_keys_alone_are_not_said_again() -> None:
    assert earlier_keys({"model_type": "llama", "rope_theta": 5e5, "rope_scaling": LINEAR}) == {}


@pytest.mark.parametrize("name", ["gptq", "dense"])
def test_exports_have_both(packed: Callable[..., PackedCheckpoint], tmp_path: Path, name: str) -> None:
    options = ExportOptions(runtimes=False)
    FORMATS[name].write(packed(4), tmp_path / "out", options)
    config = read_config(tmp_path / "out")
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
