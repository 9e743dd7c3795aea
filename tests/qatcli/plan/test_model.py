"""Sizes of a model from its configuration: those of the checkpoint, which is not there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPTJConfig, LlamaConfig

from qatcli.errors import InputError
from qatcli.models.gguf import converted
from qatcli.packed import ModuleQuant, QuantizedLinear, pack_linear
from qatcli.plan.model import PlannedModel, groups_of, packed_bytes
from qatcli.recipe import ModelSection, QuantSection

QUANT = QuantSection(bits=2, group_size=16)


def planned(folder: Path, quant: QuantSection = QUANT) -> PlannedModel:
    return PlannedModel(ModelSection(source=str(folder)), quant)


@pytest.mark.parametrize("tied", [False, True])
def test_sizes_are_those_of_the_checkpoint(save_random_model: Callable[..., Path], tied: bool) -> None:
    folder = save_random_model("LlamaConfig", tie_word_embeddings=tied)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()  # the configuration is enough
    model = planned(folder)
    sizes = {name: tensor.numel() for name, tensor in tensors.items()}
    blocks = [sum(n for name, n in sizes.items() if name.startswith(f"model.layers.{i}.")) for i in range(3)]
    assert model.block_sizes == blocks
    assert model.total == sum(sizes.values())
    assert model.outside == model.total - sum(blocks)
    assert model.embedding == model.outside - (0 if tied else sizes["lm_head.weight"])
    assert model.dtype == torch.float32
    linears = {name.removesuffix(".weight"): t.shape for name, t in tensors.items() if name.endswith("_proj.weight")}
    assert {name: (q.out_features, q.in_features) for name, q in model.linears.items()} == linears


def test_the_dtype_is_that_of_the_checkpoint(save_random_model: Callable[..., Path]) -> None:
    folder = save_random_model("LlamaConfig")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    assert planned(folder).dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["Qwen2Config", "Qwen3Config", "Gemma3TextConfig", "MistralConfig"])
def test_any_family_is_traced(save_random_model: Callable[..., Path], family: str) -> None:
    model = planned(save_random_model(family))
    for kind in ("dense", "fake_quant", "packed"):
        found = model.passes(kind, 2, 16, torch.float32, torch.float32)
        assert 0 < found.kept < found.training
        assert 0 < found.forward < found.training
    weights = sum(q.in_features * q.out_features for q in model.quants[0].values())
    assert model.passes("fake_quant", 2, 16, torch.float32, torch.float32).training >= 2 * 4 * weights


def test_kept_activations_grow_with_the_batch(random_llama: Path) -> None:
    model = planned(random_llama)
    one, two, four = (model.passes("packed", b, 16, torch.float32, torch.float32).kept for b in (1, 2, 4))
    assert four - two == pytest.approx(2 * (two - one))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [-1, 32])
def test_packed_bytes_are_those_of_the_tensors(bits: int, group_size: int) -> None:
    groups = 1 if group_size < 0 else 3
    quant = ModuleQuant(bits, group_size, 96, 40)
    codes, grid = torch.zeros(40, 96, dtype=torch.uint8), torch.zeros(40, groups)
    linear = QuantizedLinear(codes, grid, grid.to(torch.uint8), bits, group_size)
    tensors: dict[str, Any] = pack_linear("x", linear)
    assert packed_bytes(quant, scale=4) == sum(t.numel() * t.element_size() for t in tensors.values())
    assert groups_of([quant, quant]) == 2 * grid.numel()


def test_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="configuration"):
        planned(tmp_path)


def test_a_model_that_the_hub_does_not_give_is_said_so() -> None:
    """The plan is what stands in front of every stage: it must not blame a file that was never there."""
    with pytest.raises(InputError, match="owner/model could not be fetched from the hub") as caught:  # it is off here
        PlannedModel(ModelSection(source="owner/model"), QuantSection(bits=2, group_size=64))
    assert "gated" in str(caught.value.hint)


def test_a_block_that_keeps_tensors_of_its_own_is_measured(tmp_path: Path) -> None:
    """GPT-J's rotary table is neither a parameter nor a buffer."""
    GPTJConfig(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4).save_pretrained(tmp_path)
    passes = planned(tmp_path).passes("fake_quant", 2, 8, torch.float32, torch.float32)
    assert passes.training > passes.forward > 0


@pytest.mark.parametrize("named", ["as the source", "in a folder"])
def test_a_gguf_file_is_converted_once(
    random_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    """The whole model in fp32: more memory than any block takes."""
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF, as far as its digest goes")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("qatcli.plan.model.AutoConfig.from_pretrained", partial(_config_of, random_llama))
    section = ModelSection(source=str(file))
    if named == "in a folder":
        section = ModelSection(source=str(tmp_path), gguf_file=file.name)
    model = PlannedModel(section, QUANT)
    assert model.to_convert
    shutil.copytree(random_llama, converted(file))
    assert not model.to_convert, "a plan is made once for a process, which may convert the file meanwhile"
    assert not PlannedModel(section, QUANT).to_convert
    assert not planned(random_llama).to_convert


def _config_of(folder: Path, asked: Path, gguf_file: str = "", **options: Any) -> Any:
    assert (Path(asked, gguf_file).suffix == ".gguf") == bool(gguf_file)
    return LlamaConfig.from_pretrained(folder)
