"""Logits of a model that is read block by block: those of the whole one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qatcli import streaming
from qatcli.activations import StreamBudget
from qatcli.errors import DivergedError
from qatcli.models.blocks import open_blocks
from qatcli.models.source import open_source
from qatcli.streaming import StreamedModel

CPU, FP32 = torch.device("cpu"), torch.float32


def streamed(folder: Path, *, host_bytes: int = 2**20) -> StreamedModel:
    budget = StreamBudget(CPU, 0, host_bytes, folder.parent)
    return StreamedModel(open_blocks(open_source(str(folder))), lambda: budget)


@pytest.mark.parametrize("host_bytes", [0, 2**20])
@pytest.mark.parametrize("part", [2, 5, 256])
def test_logits_are_those_of_the_whole_model(
    random_llama: Path, monkeypatch: pytest.MonkeyPatch, part: int, host_bytes: int
) -> None:
    """In however many parts, in memory or in a file."""
    monkeypatch.setattr(streaming, "PART", part)
    windows, tokens = torch.randint(0, 61, (5, 9), dtype=torch.int32), list[int]()
    model = streamed(random_llama, host_bytes=host_bytes)
    found = torch.stack([each.clone() for each in model.logits(windows, FP32, tokens.append)])
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(random_llama, dtype=FP32)(input_ids=windows.long()).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert len(tokens) == model.steps(windows)
    assert sum(tokens) == 3 * 5 * 9
    assert not list(random_llama.parent.glob("*.activations"))


def test_hidden_states_beyond_fp16_are_told(random_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(random_llama, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] *= 1e5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DivergedError, match="beyond float16"):
        list(streamed(folder).logits(torch.randint(0, 61, (2, 9)), torch.float16))
