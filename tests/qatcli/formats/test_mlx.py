"""MLX: the layout in MLX itself, what it refuses, and settings that its readers have other defaults for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

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


@pytest.mark.parametrize(
    ("family", "words"),
    [("gemma3_text", "float16, which the activations of gemma3_text leave"), ("falcon", "MLX export knows llama, ")],
)
def test_families_that_it_would_not_compute_are_refused(packed: Packed, family: str, words: str) -> None:
    other = replace(packed(4), config={**packed(4).config, "model_type": family})
    with pytest.raises(QatError, match=words) as refused:
        mlx.refuse(other, OPTIONS)
    assert "gguf" in (refused.value.hint or "")


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


def test_a_sliding_window_is_said_to_be_none(packed: Packed) -> None:
    config = {**packed(4).config, "model_type": "mistral", "sliding_window": 4096}
    row = deployment.mlx(replace(packed(4), config=config))[0]
    assert "within 4096 tokens" in row.remark
    assert "tokens" not in deployment.mlx(replace(packed(4), config={**config, "use_sliding_window": False}))[0].remark


def test_mlx_checkpoints_are_not_read(packed: Packed, tmp_path: Path) -> None:
    FORMATS["mlx"].write(packed(4), tmp_path / "out", OPTIONS)
    for read in (
        lambda: open_candidate(str(tmp_path / "out"), torch.device("cpu")),
        lambda: import_checkpoint(tmp_path / "out", tmp_path / "imported"),
    ):
        with pytest.raises(InputError, match="is an MLX checkpoint, which is only written") as refused:
            read()
        assert "mlx_lm.perplexity" in (refused.value.hint or "")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]["bits"] == 4
