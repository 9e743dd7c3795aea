"""Rotary embeddings under earlier names: what the hub's files of those days said, and transformers still reads."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from qatcli.formats import FORMATS, ExportOptions
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


def test_earlier_keys_alone_stay_as_they_are() -> None:
    assert earlier_keys({"model_type": "llama", "rope_theta": 5e5, "rope_scaling": LINEAR}) == {}


@pytest.mark.parametrize("name", ["gptq", "dense"])
def test_exports_have_both(packed: Callable[..., PackedCheckpoint], tmp_path: Path, name: str) -> None:
    options = ExportOptions(runtimes=False)
    FORMATS[name].write(packed(4), tmp_path / "out", options)
    config = read_config(tmp_path / "out")
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
