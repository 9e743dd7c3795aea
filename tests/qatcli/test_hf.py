"""Packed checkpoints in plain transformers: whatever was imported first, the logits are those of the dense weights."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from qatcli.errors import InputError
from qatcli.formats.runtimes.reference import dense_model
from qatcli.hf import load_packed
from qatcli.linear import PackedLinear
from qatcli.models.source import open_source
from qatcli.packed import PackedCheckpoint, read_config

CPU = torch.device("cpu")


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, 61, (2, 11))


def dense_twin(model: Path, packed: Path) -> torch.nn.Module:
    """The full-precision model with the packed checkpoint's weights put in densely."""
    twin = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    checkpoint = PackedCheckpoint.open(packed)
    for name in checkpoint.modules:
        twin.get_submodule(name).weight.data = checkpoint.linear(name).dequantize()
    return twin


@pytest.mark.parametrize(
    ("config_class", "overrides"), [("LlamaConfig", {"tie_word_embeddings": True}), ("Qwen2Config", {})]
)
@pytest.mark.parametrize("bits", [2, 3])
def test_logits_are_those_of_the_dense_weights(
    save_random_model: Callable[..., Path],
    pack_model: Callable[..., Path],
    tmp_path: Path,
    tokens: Tensor,
    config_class: str,
    overrides: dict[str, bool],
    bits: int,
) -> None:
    source = save_random_model(config_class, num_hidden_layers=2, **overrides)
    packed = pack_model(source, tmp_path / "packed", bits=bits)
    model = load_packed(packed, dtype=torch.float32, device=CPU)
    assert sum(isinstance(module, PackedLinear) for module in model.modules()) == 14
    assert not model.training
    with torch.no_grad():
        expected = dense_twin(source, packed)(tokens).logits
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_scales_are_loaded_in_the_dtype_they_are_stored_in(
    random_llama: Path, pack_model: Callable[..., Path], tmp_path: Path
) -> None:
    packed = pack_model(random_llama, tmp_path / "packed", scale_dtype=torch.float16)
    model = load_packed(packed, dtype=torch.float32, device=CPU)
    stored = load_file(packed / "model.safetensors")
    scale = model.model.layers[0].mlp.up_proj.weight_scale
    assert scale.dtype == torch.float16
    assert torch.equal(scale, stored["model.layers.0.mlp.up_proj.weight_scale"])
    assert model.model.norm.weight.dtype == torch.float32


def test_a_loaded_model_saves_as_the_same_checkpoint(
    random_llama: Path, pack_model: Callable[..., Path], tmp_path: Path, tokens: Tensor
) -> None:
    packed = pack_model(random_llama, tmp_path / "packed")
    model = load_packed(packed, dtype=torch.float32, device=CPU)
    model.save_pretrained(tmp_path / "saved")
    before, after = load_file(packed / "model.safetensors"), load_file(tmp_path / "saved" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = load_packed(tmp_path / "saved", dtype=torch.float32, device=CPU)
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_registered_when_transformers_was_there_first(
    random_llama: Path, pack_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Its quantizers were already in use before qatcli came; tests/test_pipeline.py has the other order."""
    packed = pack_model(random_llama, tmp_path / "packed")
    script = """
import sys
import transformers.quantizers.auto
from transformers import AutoModelForCausalLM
import qatcli
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(type(model.model.layers[0].mlp.up_proj).__name__)
"""
    done = subprocess.run([sys.executable, "-c", script, str(packed)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "PackedLinear\n"


def test_importing_qatcli_alone_does_not_import_transformers() -> None:
    script = "import sys, qatcli; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600)
    assert done.stdout == "[]\n", done.stderr


def test_another_format_version_is_refused_by_transformers_too(
    random_llama: Path, pack_model: Callable[..., Path], tmp_path: Path
) -> None:
    packed = pack_model(random_llama, tmp_path / "packed")
    config = read_config(packed)
    config["quantization_config"]["format_version"] = 99
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="format version 99 needs another qatcli"):
        AutoModelForCausalLM.from_pretrained(packed)
    with pytest.raises(InputError, match="packed format 99"):
        load_packed(packed, dtype="auto", device=CPU)


def test_an_unknown_architecture_is_an_input_error(
    random_llama: Path, pack_model: Callable[..., Path], tmp_path: Path
) -> None:
    packed = pack_model(random_llama, tmp_path / "packed")
    config = read_config(packed) | {"model_type": "never-heard-of", "architectures": ["X"]}
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="transformers cannot load it"):
        load_packed(packed, dtype="auto", device=CPU)


def test_a_model_that_lacks_a_tensor_is_refused(
    random_llama: Path, pack_model: Callable[..., Path], tmp_path: Path
) -> None:
    """transformers gives what is missing random values, and a figure of these would be kept."""
    packed = pack_model(random_llama, tmp_path / "packed")
    shutil.copytree(random_llama, tmp_path / "model")
    for folder in (packed, tmp_path / "model"):
        tensors = load_file(folder / "model.safetensors")
        del tensors["model.layers.1.input_layernorm.weight"], tensors["lm_head.weight"]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"packed lacks 2 tensors of its architecture, first: lm_head\.weight"):
        load_packed(packed, dtype=torch.float32, device=CPU)
    with pytest.raises(InputError, match="model lacks 2 tensors"):
        open_source(str(tmp_path / "model")).load_model(torch.float32, CPU)
    with pytest.raises(InputError, match=r"packed does not fit its architecture: lm_head\.weight"):
        dense_model(PackedCheckpoint.open(packed))
