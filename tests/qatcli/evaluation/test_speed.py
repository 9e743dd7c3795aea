"""Tokens per second: what is timed, and what is counted."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from qatcli.evaluation import speed as speed_module
from qatcli.evaluation.speed import speed, weight_bytes
from qatcli.linear import PackedLinear
from qatcli.packed import ModuleQuant

CPU = torch.device("cpu")


def test_prompt_and_new_tokens_over_the_time_between(random_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(random_llama, dtype=torch.float32).eval()
    clock = itertools.accumulate(itertools.cycle([0.0, 2.0, 8.0]))  # a prompt takes 2 s, its continuation 8
    monkeypatch.setattr(speed_module, "_now", lambda device: next(clock))
    read: list[int] = []
    model.register_forward_pre_hook(
        lambda module, _, inputs: read.append(inputs["input_ids"].shape[1]), with_kwargs=True
    )
    done: list[int] = []
    found = speed(model, device=CPU, prompt_tokens=10, new_tokens=4, repeats=2, progress=done.append)
    assert found == {"prefill": 5.0, "decode": 0.5}
    assert read == [10, 1] + [10, 1, 1, 1, 1] * 2, "the cache holds what was read"
    assert done == [1, 1]


def test_weights_shared_by_two_layers_count_once(tiny_llama: Path, tiny_llama_tied: Path) -> None:
    untied, tied = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (tiny_llama, tiny_llama_tied)
    )
    assert weight_bytes(untied) - weight_bytes(tied) == 4 * tied.lm_head.weight.numel()


def test_what_a_packed_linear_keeps_to_run_faster_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The zero points it unpacked, and the codes that it laid out once more for decoding."""
    pytest.importorskip("triton")
    monkeypatch.setenv("QAT_KERNELS", "triton")
    linear = PackedLinear(ModuleQuant(4, 32, 64, 48), bias=False, scale_dtype=torch.float16, dtype=torch.float32)
    codes, scales, zero_points = 48 * 64 // 2, 2 * 48 * 2, 48 * 2 // 2
    assert weight_bytes(linear) == codes + scales + zero_points
    with torch.no_grad():
        linear(torch.randn(1, 64))
    assert weight_bytes(linear) == codes + scales + zero_points + 48 * 2 + codes
