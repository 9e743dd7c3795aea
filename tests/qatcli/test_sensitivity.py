"""Estimated costs of rounding against measured ones, on small random models."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qat_kernels import quantize
from qatcli.allocation import PER_BIT
from qatcli.data import Windows
from qatcli.grid import initial_grid
from qatcli.packed import ModuleQuant, QuantizedLinear
from qatcli.recipe.quant import QuantSection
from qatcli.sensitivity import choose_bits, rounding_divergence, shared_inputs


def linears(network: nn.Module, *, bits: int = 3, group_size: int = 16) -> dict[str, ModuleQuant]:
    return {
        name: ModuleQuant(bits, group_size, module.in_features, module.out_features)
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and "lm_head" not in name
    }


def windows_of(count: int, length: int) -> Windows:
    return Windows(torch.randint(0, 61, (count, length)).int(), torch.ones(count, length, dtype=torch.bool))


@pytest.fixture
def network(random_llama: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(random_llama, dtype=torch.float32).eval()


def divergence(network: Any, tokens: Tensor, expected: Tensor) -> float:
    with torch.no_grad():
        found = network(input_ids=tokens).logits.log_softmax(-1)
    return float((expected.exp() * (expected - found)).sum(-1)[:, :-1].mean())


def test_the_estimate_is_the_measured_divergence(network: Any) -> None:
    """At 8 bits, where errors are small: in the mean over linears, whose errors are drawn once each."""
    windows = windows_of(64, 24)
    quants = linears(network, bits=8)
    estimate = rounding_divergence(network, quants, windows, zero_points="any", seed=0)
    tokens = windows.tokens.long()
    with torch.no_grad():
        expected = network(input_ids=tokens).logits.log_softmax(-1)
    measured = {}
    for name, quant in quants.items():
        weight = network.get_submodule(name).weight
        kept = weight.detach().clone()
        scale, zero_point = initial_grid(kept, bits=8, group_size=16, zero_points="any", method="mse")
        codes = quantize(kept, scale, zero_point, bits=8, group_size=16)
        linear = QuantizedLinear(codes, scale, zero_point.to(torch.uint8), quant.bits, quant.group_size)
        weight.data = linear.dequantize()
        measured[name] = divergence(network, tokens, expected)
        weight.data = kept
    assert estimate.keys() == measured.keys()
    assert sum(estimate.values()) == pytest.approx(sum(measured.values()), rel=0.25)
    logarithms = [[math.log(found[name]) for name in quants] for found in (estimate, measured)]
    assert statistics.correlation(*logarithms) > 0.8


def test_the_network_is_left_as_it_was_and_equal_seeds_give_equal_figures(network: Any) -> None:
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    quants, windows, calls = linears(network), windows_of(2, 12), []
    options = {"zero_points": "any", "seed": 3}
    first = rounding_divergence(network, quants, windows, **options, progress=lambda: calls.append(1))
    assert len(calls) == 2 + len(quants)
    assert first.keys() == quants.keys()
    assert rounding_divergence(network, quants, windows, **options) == first
    assert not network.training
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_only_predictions_of_targets_count(network: Any) -> None:
    windows, quants = windows_of(1, 12), linears(network)
    nothing = Windows(windows.tokens, torch.zeros(1, 12, dtype=torch.bool))
    assert set(rounding_divergence(network, quants, nothing, zero_points="any", seed=0).values()) == {0}
    first = Windows(windows.tokens, torch.arange(12)[None] < 6)
    alone = Windows(windows.tokens[:, :6], torch.ones(1, 6, dtype=torch.bool))
    found, expected = (
        sum(rounding_divergence(network, quants, w, zero_points="any", seed=0).values()) for w in (first, alone)
    )
    assert found == pytest.approx(expected, rel=0.5)  # other labels are drawn


def test_a_bit_more_divides_the_cost_by_about_four(network: Any) -> None:
    windows = windows_of(2, 16)
    costs = [
        sum(rounding_divergence(network, linears(network, bits=b), windows, zero_points="any", seed=0).values())
        for b in (2, 3, 4)
    ]
    for fewer, more in pairwise(costs):
        assert fewer / more == pytest.approx(PER_BIT, rel=0.35)


def test_linears_that_receive_one_tensor_are_found(save_random_model: Callable[..., Path]) -> None:
    for family in ("LlamaConfig", "Qwen2Config", "MistralConfig"):
        network = AutoModelForCausalLM.from_pretrained(save_random_model(family, num_hidden_layers=2)).eval()
        parts = {
            tuple(name.rpartition(".")[2] for name in part) for part in shared_inputs(network, list(linears(network)))
        }
        attention, mlp = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
        assert parts == {attention, mlp, ("o_proj",), ("down_proj",)}


def test_bits_keep_their_mean_and_go_where_rounding_costs_most(network: Any) -> None:
    quants = linears(network)
    quant = QuantSection(
        bits=3, average_bits=3, group_size=16, overrides=[{"pattern": "*.layers.2.mlp.down_proj", "bits": 8}]
    )
    chosen = choose_bits(network, quant, quants, windows_of(4, 16), seed=0)
    assert chosen.keys() == quants.keys() - {"model.layers.2.mlp.down_proj"}
    sizes = {name: quants[name].in_features * quants[name].out_features for name in chosen}
    mean = sum(chosen[name]["bits"] * size for name, size in sizes.items()) / sum(sizes.values())
    assert 2.8 < mean <= 3
    assert {entry["bits"] for entry in chosen.values()} == {2, 3, 4}
    per_weight = {
        bits: [e["divergence"] * PER_BIT**bits / sizes[name] for name, e in chosen.items() if e["bits"] == bits]
        for bits in (2, 4)
    }
    assert sum(per_weight[4]) / len(per_weight[4]) > 2 * sum(per_weight[2]) / len(per_weight[2])
    for layer in range(3):
        attention = {chosen[f"model.layers.{layer}.self_attn.{x}_proj"]["bits"] for x in "qkv"}
        assert len(attention) == 1
