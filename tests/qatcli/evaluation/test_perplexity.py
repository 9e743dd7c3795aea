"""Perplexity and divergence against transformers' own loss and torch's own divergence."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from statistics import stdev
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence
from transformers import AutoModelForCausalLM

from qatcli.evaluation import candidates
from qatcli.evaluation import perplexity as module
from qatcli.evaluation.candidates import full_precision, round_to_nearest
from qatcli.evaluation.perplexity import (
    DIVERGENCE_WINDOWS,
    Divergence,
    compared,
    divergence,
    perplexity,
    window_logits,
)
from qatcli.models.source import open_source
from qatcli.recipe import QuantSection

CPU, FP32 = torch.device("cpu"), torch.float32


@pytest.fixture(scope="module")
def model(random_llama: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(random_llama, dtype=FP32).eval()


@pytest.fixture(scope="module")
def other(random_llama: Path) -> Any:
    """The same model with other weights in its last block."""
    model = AutoModelForCausalLM.from_pretrained(random_llama, dtype=FP32).eval()
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.mul_(-0.5)
    return model


@pytest.fixture
def windows() -> Tensor:
    return torch.randint(0, 61, (5, 16), dtype=torch.int32)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_perplexity_is_exp_of_the_loss_of_transformers(model: Any, windows: Tensor, batch_size: int) -> None:
    with torch.no_grad():
        losses = [float(model(input_ids=w[None].long(), labels=w[None].long()).loss) for w in windows]
    counted: list[int] = []
    logits = window_logits(model, windows, batch_size=batch_size, device=CPU, dtype=FP32, progress=counted.append)
    found = perplexity(logits, windows)
    assert found == pytest.approx(math.exp(math.fsum(losses) / len(losses)), rel=1e-5)
    assert sum(counted) == len(windows)


def test_perplexity_under_autocast_is_close(model: Any, windows: Tensor) -> None:
    exact, rounded = (
        perplexity(window_logits(model, windows, device=CPU, dtype=dtype), windows) for dtype in (FP32, torch.bfloat16)
    )
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.05)


def _divergence(model: Any, reference: Any, windows: Tensor) -> Divergence:
    ours, expected = (window_logits(each, compared(windows), device=CPU, dtype=FP32) for each in (model, reference))
    return divergence(ours, expected, CPU)


def test_one_window_has_no_standard_error(model: Any, other: Any, windows: Tensor) -> None:
    assert _divergence(other, model, windows[:1]).kl_stderr is None


def test_a_model_does_not_diverge_from_itself(model: Any, windows: Tensor) -> None:
    found = _divergence(model, model, windows)
    assert found.mean_kl == pytest.approx(0, abs=1e-6)
    assert found.kl_99 == pytest.approx(0, abs=1e-6)
    assert found.top1_agreement == 1
    assert found.tokens == 5 * 16


def test_divergence_is_from_full_precision_to_the_model(model: Any, other: Any, windows: Tensor) -> None:
    with torch.no_grad():
        ours, reference = (m(input_ids=windows.long()).logits.double() for m in (other, model))
    kl = kl_divergence(Categorical(logits=reference), Categorical(logits=ours)).numpy()
    found = _divergence(other, model, windows)
    assert found.mean_kl == pytest.approx(kl.mean(), rel=1e-3)
    assert found.kl_stderr == pytest.approx(stdev(kl.mean(-1).tolist()) / len(kl) ** 0.5, rel=1e-3)
    assert found.kl_99 == pytest.approx(np.quantile(kl, 0.99), rel=1e-3)
    agreement = float((ours.argmax(-1) == reference.argmax(-1)).double().mean())
    assert found.top1_agreement == pytest.approx(agreement)
    assert 0 < agreement < 1


def test_divergence_is_measured_on_the_first_windows(model: Any, other: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    many = torch.randint(0, 61, (DIVERGENCE_WINDOWS + 2, 8), dtype=torch.int32)
    monkeypatch.setattr(module, "DIVERGENCE_TOKENS", 64)
    found = _divergence(other, model, many)
    assert found.tokens == DIVERGENCE_WINDOWS * 8
    assert found == _divergence(other, model, many[:DIVERGENCE_WINDOWS])
    monkeypatch.setattr(module, "DIVERGENCE_TOKENS", 65)
    assert _divergence(other, model, many).tokens == 9 * 8


def test_round_to_nearest_is_the_model_on_min_max_grids(random_llama: Path, model: Any) -> None:
    quant = QuantSection(bits=3, group_size=16, skip=("lm_head", "*.1.mlp.*"))
    source = open_source(str(random_llama))
    candidate = round_to_nearest(source, quant, CPU)
    rounded = candidate.load()
    assert candidate.name == "round_to_nearest"
    checked = 0
    for name, parameter in rounded.named_parameters():
        weight = model.get_parameter(name).detach()
        if not name.endswith("_proj.weight") or ".1.mlp." in name:
            assert torch.equal(parameter, weight), name
            continue
        groups = weight.reshape(len(weight), -1, 16)
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        step = (high - low) / 7
        zero_point = (-low / step).round().clamp(0, 7)
        expected = (((groups / step).round() + zero_point).clamp(0, 7) - zero_point) * step
        torch.testing.assert_close(parameter.detach(), expected.reshape(weight.shape))
        checked += 1
    assert checked == 18
    assert torch.equal(full_precision(source, CPU, keep=False).load().lm_head.weight, model.lm_head.weight)


def test_round_to_nearest_is_loaded_as_it_is_stored_where_nothing_is_measured_in_fp32(
    save_random_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_random_model("LlamaConfig", dtype=torch.bfloat16)
    source, quant = open_source(str(folder)), QuantSection(bits=3, group_size=16)
    monkeypatch.setattr(candidates, "compute_dtype", lambda *_: torch.float32)
    expected = round_to_nearest(source, quant, CPU).load()
    monkeypatch.setattr(candidates, "compute_dtype", lambda *_: torch.bfloat16)
    model = round_to_nearest(source, quant, CPU).load()
    assert {parameter.dtype for parameter in expected.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    for name, parameter in expected.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter.bfloat16()), name


class Certain:
    """A model of `vocabulary` tokens that is sure of the first one."""

    def __init__(self, vocabulary: int, sureness: float) -> None:
        self.vocabulary, self.sureness = vocabulary, sureness

    def __call__(self, input_ids: Tensor, use_cache: bool) -> Any:
        logits = torch.zeros(*input_ids.shape, self.vocabulary)
        logits[..., 0] = self.sureness
        return SimpleNamespace(logits=logits)


def test_a_perplexity_beyond_all_numbers_is_infinite() -> None:
    ones = torch.ones(1, 4, dtype=torch.int32)
    assert perplexity(window_logits(Certain(3, 1e4), ones, device=CPU, dtype=FP32), ones) == math.inf


@pytest.mark.parametrize("sizes", [(5, 7), (7, 5)])
def test_divergence_is_over_the_tokens_that_both_know(sizes: tuple[int, int]) -> None:
    """One of the vocabularies is padded."""
    models = [Certain(size, 2.0) for size in sizes]
    found = _divergence(*models, torch.ones(2, 4, dtype=torch.int32))
    assert found.mean_kl == pytest.approx(0, abs=1e-6)
