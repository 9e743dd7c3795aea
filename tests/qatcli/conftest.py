"""Tiny random models of several families, saved as Hugging Face folders, and packed checkpoints of them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "dtype": "float32",
}


@pytest.fixture(scope="session")
def save_random_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function that saves a random model: (name of its config class, **overrides) -> its folder."""
    import transformers

    def save(config_class: str, **overrides: Any) -> Path:
        config = getattr(transformers, config_class)(**{**SIZES, "num_hidden_layers": 3, **overrides})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            model = transformers.AutoModelForCausalLM.from_config(config)
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1:  # norms and biases, which start at ones and zeros, would hide a mix-up
                    torch.nn.init.normal_(parameter, mean=0.0 if name.endswith("bias") else 1.0, std=0.3)
        path = tmp_path_factory.mktemp("models") / config_class
        model.save_pretrained(path)
        return path

    return save


@pytest.fixture(scope="session")
def random_llama(save_random_model: Callable[..., Path]) -> Path:
    """A random Llama of 3 blocks, hidden size 32."""
    return save_random_model("LlamaConfig")


@pytest.fixture(scope="session")
def pack_model() -> Callable[..., Path]:
    """A function that rounds a model to min-max grids: (model, out, *, bits, group_size, scale_dtype) -> out."""
    from safetensors.torch import load_file

    from qat_kernels import quantize
    from qatcli.grid import initial_grid
    from qatcli.packed import PackedWriter, QuantizedLinear, companion_files, quantization_config, read_config

    def pack(
        model: Path, out: Path, *, bits: int = 3, group_size: int = 16, scale_dtype: torch.dtype = torch.float32
    ) -> Path:
        kind = {"bits": bits, "group_size": group_size}
        tensors = load_file(model / "model.safetensors")
        linears = {name.removesuffix(".weight") for name in tensors if name.endswith("_proj.weight")}
        writer = PackedWriter(out)
        for name, tensor in tensors.items():
            module = name.rpartition(".")[0]
            if module not in linears:
                writer.add_tensor(name, tensor)
            elif name.endswith(".weight"):
                scale, zero_point = initial_grid(tensor, **kind, zero_points="any", method="minmax")
                codes = quantize(tensor, scale, zero_point, **kind)
                bias = tensors.get(module + ".bias")
                linear = QuantizedLinear(codes, scale.to(scale_dtype), zero_point.to(torch.uint8), **kind, bias=bias)
                writer.add_linear(module, linear)
        quantization = quantization_config(writer.modules, **kind, symmetric=False, scale_dtype=scale_dtype)
        writer.close({**read_config(model), "quantization_config": quantization})
        for file in companion_files(model):
            shutil.copyfile(file, out / file.name)
        return out

    return pack


@pytest.fixture
def disk_order(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """In what order files and folders are forced to disk (their paths) and get their names ("named" and the path)."""
    order: list[str] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def synced(descriptor: int) -> None:
        order.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def naming(move: Callable[..., None]) -> Callable[..., None]:
        def moved(old: Path, new: Path) -> None:
            order.append(f"named {new}")
            move(old, new)

        return moved

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", naming(rename))
    monkeypatch.setattr(os, "replace", naming(replace))
    return order
