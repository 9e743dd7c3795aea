"""Estimated costs of rounding against measured ones, on small random models."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qatcli.allocation import PER_BIT
from qatcli.data import Windows
from qatcli.packed import ModuleQuant
from qatcli.recipe.quant import QuantSection
from qatcli.sensitivity import choose_bits, group_fisher, rounding_divergence, shared_inputs


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


def test_the_estimate_of_small_changes_is_the_measured_divergence(network: Any) -> None:
    """Noise of one size on all weights of a linear costs, in the mean, what half of the Fisher diagonal's sum says."""
    windows = windows_of(64, 24)
    name = "model.layers.1.mlp.up_proj"
    fisher = group_fisher(network, {name: linears(network)[name]}, windows, seed=0)[name]
    tokens = windows.tokens.long()
    with torch.no_grad():
        expected = network(input_ids=tokens).logits.log_softmax(-1)
    weight = network.get_submodule(name).weight
    start, size, measured = weight.detach().clone(), 0.003, []
    for _ in range(8):
        weight.data = start + size * torch.randn_like(start)
        measured.append(divergence(network, tokens, expected))
    estimate = float(fisher.sum()) * 16 * size**2 / 2
    assert estimate == pytest.approx(sum(measured) / len(measured), rel=0.15)


def test_the_network_is_left_as_it_was_and_equal_seeds_give_equal_figures(network: Any) -> None:
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    quants, windows, calls = linears(network), windows_of(2, 12), []
    first = group_fisher(network, quants, windows, seed=3, progress=lambda: calls.append(1))
    again = group_fisher(network, quants, windows, seed=3)
    assert len(calls) == 2
    assert first.keys() == quants.keys()
    for name, quant in quants.items():
        assert first[name].shape == (quant.out_features, quant.in_features // quant.group_size)
        assert torch.equal(first[name], again[name])
    assert not network.training
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_tokens_that_are_no_target_do_not_count(network: Any) -> None:
    windows = windows_of(1, 12)
    masked = Windows(windows.tokens, torch.arange(12)[None] < 6)
    short = Windows(windows.tokens[:, :6], windows.mask[:, :6])
    name = "model.layers.0.mlp.down_proj"
    quants = {name: linears(network)[name]}
    found, expected = (group_fisher(network, quants, w, seed=0)[name] for w in (masked, short))
    torch.testing.assert_close(found.sum(), expected.sum(), rtol=0.5, atol=0)  # other labels are drawn
    nothing = Windows(windows.tokens, torch.zeros(1, 12, dtype=torch.bool))
    assert float(group_fisher(network, quants, nothing, seed=0)[name].sum()) == 0


def test_rounding_costs_its_error_weighed_by_groups() -> None:
    quant = ModuleQuant(3, 4, 8, 2)
    weight, fisher = torch.randn(2, 8), torch.tensor([[0.0, 2.0], [0.0, 0.0]])
    whole = rounding_divergence(weight, fisher, quant, zero_points="any")
    weight[:, :4] *= 100  # of no weight
    assert rounding_divergence(weight, fisher, quant, zero_points="any") == pytest.approx(whole)
    assert rounding_divergence(weight, 3 * fisher, quant, zero_points="any") == pytest.approx(3 * whole)


def test_a_bit_more_divides_the_cost_by_about_four() -> None:
    weight, fisher = torch.randn(64, 64), torch.rand(64, 4)
    costs = [rounding_divergence(weight, fisher, ModuleQuant(b, 16, 64, 64), zero_points="any") for b in (2, 3, 4)]
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
