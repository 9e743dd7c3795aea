"""Logits of a model that is read block by block: those of the whole one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from qatcli import streaming
from qatcli.activations import StreamBudget
from qatcli.models.blocks import open_blocks
from qatcli.models.source import open_source
from qatcli.progress import Bar
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
    windows = torch.randint(0, 61, (5, 9), dtype=torch.int32)
    model = streamed(random_llama, host_bytes=host_bytes)
    bar = Bar("", model.steps(windows), 0, lambda _: None)
    found = torch.stack([each.clone() for each in model.logits(windows, FP32, bar)])
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(random_llama, dtype=FP32)(input_ids=windows.long()).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert bar.count == bar.total == 3 * 5
    assert not list(random_llama.parent.glob("*.activations"))


@pytest.mark.gpu
@pytest.mark.parametrize(("device_bytes", "host_bytes"), [(2**20, 0), (0, 2**20), (0, 0)])
def test_on_a_gpu_wherever_the_activations_are(
    random_llama: Path, monkeypatch: pytest.MonkeyPatch, device_bytes: int, host_bytes: int
) -> None:
    monkeypatch.setattr(streaming, "PART", 2)
    windows, device = torch.randint(0, 61, (5, 9), dtype=torch.int32), torch.device("cuda")
    blocks = open_blocks(open_source(str(random_llama)))
    model = StreamedModel(blocks, lambda: StreamBudget(device, device_bytes, host_bytes, random_llama.parent))
    bar = Bar("", model.steps(windows), 0, lambda _: None)
    found = torch.stack([each.clone() for each in model.logits(windows, FP32, bar)])
    with torch.no_grad():
        whole = AutoModelForCausalLM.from_pretrained(random_llama, dtype=FP32).to(device)
        torch.testing.assert_close(found, whole(input_ids=windows.long().to(device)).logits, rtol=1e-3, atol=1e-3)
