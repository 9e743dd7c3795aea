"""MLX: the layout in MLX itself, what it refuses, and settings that its readers have other defaults for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qatcli.errors import InputError, QatError
from qatcli.evaluation.opening import open_candidate
from qatcli.formats import FORMATS, ExportOptions, deployment, mlx, readback
from qatcli.formats.importing import import_checkpoint
from qatcli.formats.layouts import mlx as layout
from qatcli.packed import PackedCheckpoint, read_config

Packed = Callable[..., PackedCheckpoint]
OPTIONS = ExportOptions(runtimes=False)


def _linear(bits: int, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(bits)
    codes = random.integers(0, 1 << bits, (5, 3 * group)).astype(np.uint8)
    zero_point = random.integers(0, 1 << bits, (5, 3)).astype(np.uint8)
    return codes, zero_point, random.uniform(1e-3, 0.1, (5, 3)).astype(np.float16)


@pytest.mark.parametrize("group", mlx.GROUPS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_mlx_reads_the_layout(bits: int, group: int) -> None:
    """Its own dequantization in fp32; the offset is as far from -s z as one rounding to fp16 takes it."""
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed (pip install 'qatcli[runtimes]')")
    codes, zero_point, scale = _linear(bits, group)
    parts = {name: mx.array(array) for name, array in layout.pack_linear(codes, zero_point, scale, bits=bits).items()}
    fp32 = [parts[name].astype(mx.float32) for name in ("scales", "biases")]
    found = np.array(mx.dequantize(parts["weight"], *fp32, group_size=group, bits=bits))
    np.testing.assert_allclose(found, layout.dense_weight(codes, zero_point, scale), rtol=1e-6, atol=1e-8)
    step, middle = (np.repeat(each.astype(np.float64), group, axis=1) for each in (scale, zero_point))
    assert np.all(np.abs(found - (codes - middle) * step) <= 2.0**-11 * middle * step + 1e-8)


def test_offsets_that_are_no_multiples_are_not_read_as_zero_points() -> None:
    codes, zero_point, scale = _linear(4, 32)
    parts = layout.pack_linear(codes, zero_point, scale, bits=4)
    half = (parts["biases"] + scale / 2).astype(np.float16)
    with pytest.raises(ValueError, match="15 of 15 biases are no multiples"):
        readback.mlx(parts["weight"], parts["scales"], half, bits=4)
    with pytest.raises(ValueError, match="1 of 15 biases"):
        readback.mlx(parts["weight"], np.where(scale == scale[0, 0], 0, scale), parts["biases"], bits=4)


def test_settings_name_linears_of_another_kind_only(packed: Packed, tmp_path: Path) -> None:
    checkpoint = packed(2, kinds={"layers.1.mlp.down_proj": (4, 32)}, skip=("layers.0.self_attn",))
    FORMATS["mlx"].write(checkpoint, tmp_path / "out", OPTIONS)
    config = read_config(tmp_path / "out")
    other = {"model.layers.1.mlp.down_proj": {"group_size": 32, "bits": 4}}
    assert config["quantization"] == {"group_size": 32, "bits": 2, **other}
    assert "quantization_config" not in config  # with it, transformers and SGLang take it for a method of theirs
    assert FORMATS["mlx"].verify(checkpoint, tmp_path / "out", OPTIONS).passed
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "library_name: mlx\n" in card
    assert "mlx_lm.generate --model ." in card


def test_a_head_of_its_own_is_said_to_be_one(packed: Packed, tmp_path: Path) -> None:
    """MLX ties a Llama's where config.json is silent, transformers does not."""
    silent = {key: value for key, value in packed(4).config.items() if key != "tie_word_embeddings"}
    FORMATS["mlx"].write(replace(packed(4), config=silent), tmp_path / "out", OPTIONS)
    assert read_config(tmp_path / "out")["tie_word_embeddings"] is False


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"model_type": "gemma3_text"}, "float16, which the activations of gemma3_text leave"),
        ({"model_type": "falcon"}, "MLX export knows llama, "),
        ({"rope_parameters": {**YARN, "attention_factor": 0.9}}, r"rotary embedding: \{'attention_factor': 0\.9\}"),
        ({"model_type": "phi3", "rope_parameters": LONGROPE}, r"rotary embedding: \{'rope_type': 'longrope'\}"),
        ({"hidden_act": "gelu"}, "with silu, this model has gelu"),
    ],
)
def test_models_that_it_would_compute_otherwise_are_refused(
    packed: Packed, changed: dict[str, Any], words: str
) -> None:
    other = replace(packed(4), config={**packed(4).config, **changed})
    with pytest.raises(QatError, match=words) as refused:
        mlx.refuse(other, OPTIONS)
    assert "gguf" in (refused.value.hint or "")


def test_yarn_that_says_no_more_than_mlx_assumes_is_not_refused(packed: Packed) -> None:
    mlx.refuse(replace(packed(4), config={**packed(4).config, "rope_parameters": dict(YARN)}), OPTIONS)


@pytest.mark.parametrize("group_size", [-1, 16])
def test_groups_without_a_kernel_are_refused_by_name(packed: Packed, tmp_path: Path, group_size: int) -> None:
    with pytest.raises(QatError, match=rf"\[32, 64, 128\] only: model\.layers\.0.* \({group_size}\).* and 17 more"):
        FORMATS["mlx"].write(packed(3, group_size=group_size), tmp_path / "out", OPTIONS)
    assert not (tmp_path / "out").exists()


def test_a_scale_of_0_is_refused(packed: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = packed(4)
    real = PackedCheckpoint.linear

    def zeroed(self: PackedCheckpoint, name: str) -> object:
        found = real(self, name)
        return replace(found, scale=torch.zeros_like(found.scale))

    monkeypatch.setattr(PackedCheckpoint, "linear", zeroed)
    with pytest.raises(QatError, match="a scale is 0"):
        FORMATS["mlx"].write(checkpoint, tmp_path / "out", OPTIONS)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("family", "settings", "said"),
    [
        ("mistral", {}, "within 4096 tokens"),
        ("mistral", {"sliding_window": None}, ""),
        ("qwen2", {"sliding_window": 64}, ""),
        ("qwen2", {"sliding_window": 64, "use_sliding_window": True}, "within 64 tokens"),
    ],
)
def test_a_sliding_window_is_said_to_be_none(packed: Packed, family: str, settings: dict[str, Any], said: str) -> None:
    """Where the config is silent, its class has one or not."""
    row = deployment.mlx(replace(packed(4), config={**packed(4).config, "model_type": family, **settings}))[0]
    assert said in row.remark
    assert ("tokens" in row.remark) == bool(said)


def test_a_file_without_its_settings_is_a_difference(packed: Packed, tmp_path: Path) -> None:
    FORMATS["mlx"].write(packed(4), tmp_path / "out", OPTIONS)
    config = read_config(tmp_path / "out")
    del config["quantization"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    found = FORMATS["mlx"].verify(packed(4), tmp_path / "out", OPTIONS)
    assert any("config.json does not say how" in difference for difference in found.differences)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_offsets_of_another_tool_are_not_imported(packed: Packed, tmp_path: Path, dtype: torch.dtype) -> None:
    """They need not be whole steps, and are not rounded to some."""
    FORMATS["mlx"].write(packed(4), tmp_path / "out", OPTIONS)
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj"
    tensors[f"{name}.biases"] += tensors[f"{name}.scales"] / 2
    for part in ("scales", "biases"):
        tensors[f"{name}.{part}"] = tensors[f"{name}.{part}"].to(dtype)
    save_file(tensors, file, metadata={"format": "mlx"})
    with pytest.raises(InputError, match=f"{name} does not fit the MLX layout: .* biases are no multiples"):
        import_checkpoint(tmp_path / "out", tmp_path / "imported")
    assert not (tmp_path / "imported").exists()


@pytest.mark.parametrize("said", [5, "4bits", [4]])
def test_odd_settings_are_an_error_that_names_the_file(packed: Packed, tmp_path: Path, said: object) -> None:
    FORMATS["mlx"].write(packed(4), tmp_path / "out", OPTIONS)
    config = {**read_config(tmp_path / "out"), "quantization": said}
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"config\.json: its quantization is malformed"):
        open_candidate(str(tmp_path / "out"), torch.device("cpu"))
