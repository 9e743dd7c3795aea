"""Tiled attention against torch's in double precision, and inside of a model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from qatcli.attention import NAME, TILE, tiled_attention, tiled_attention_forward, use_tiled_attention

CPU = torch.device("cpu")


def projections(batch: int, heads: int, shared: int, length: int, size: int, values: int) -> tuple[Tensor, ...]:
    shapes = ((heads, size), (shared, size), (shared, values))
    return tuple(torch.randn(batch, h, length, d, dtype=torch.float64).requires_grad_(True) for h, d in shapes)


def gradients(output: Tensor, inputs: tuple[Tensor, ...], grad_out: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(output, inputs, grad_out)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    shared=st.integers(1, 3),
    group=st.integers(1, 3),
    length=st.one_of(st.integers(1, 9), st.integers(TILE - 1, 2 * TILE + 1)),
    size=st.sampled_from((4, 8, 20)),
    values=st.sampled_from((4, 12)),
)
def test_output_and_gradients_are_those_of_the_definition(
    batch: int, shared: int, group: int, length: int, size: int, values: int
) -> None:
    query, key, value = inputs = projections(batch, shared * group, shared, length, size, values)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True, scale=0.3)
    expected = expected.transpose(1, 2)
    found = tiled_attention(query, key, value, 0.3)
    torch.testing.assert_close(found, expected)
    grad_out = torch.randn_like(expected)
    for ours, exact in zip(gradients(found, inputs, grad_out), gradients(expected, inputs, grad_out), strict=True):
        torch.testing.assert_close(ours, exact)


def test_it_computes_in_the_dtype_of_autocast_and_returns_gradients_in_that_of_its_inputs() -> None:
    exact = projections(1, 4, 2, 70, 16, 16)
    inputs = tuple(t.detach().float().requires_grad_(True) for t in exact)
    with torch.autocast("cpu", torch.bfloat16):
        output = tiled_attention(*inputs, scaling=0.25)
    assert output.dtype == torch.bfloat16
    expected = tiled_attention(*exact, scaling=0.25)
    torch.testing.assert_close(output.double(), expected, rtol=0.05, atol=0.05)
    grad_out = torch.randn_like(output)
    found = gradients(output, inputs, grad_out)
    for ours, of_double in zip(found, gradients(expected, exact, grad_out.double()), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), of_double, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("mask", "dropout", "is_causal", "keys"),
    [
        (torch.arange(36).reshape(6, 6) % 3 == 0, 0.0, None, 6),
        (None, 0.5, None, 6),
        (None, 0.0, False, 6),
        (None, 0.0, None, 9),  # keys of a cache before those of the queries
    ],
)
def test_what_it_does_not_cover_goes_to_torch(
    mask: Tensor | None, dropout: float, is_causal: bool | None, keys: int
) -> None:
    module: Any = SimpleNamespace(num_key_value_groups=1, is_causal=True, training=False)
    query, key, value = torch.randn(1, 2, 6, 4), torch.randn(1, 2, keys, 4), torch.randn(1, 2, keys, 4)
    if mask is not None:
        mask = mask | torch.eye(6, dtype=torch.bool)
    options = {"dropout": dropout, "scaling": 0.5, "is_causal": is_causal}
    outputs = []
    for attention in (tiled_attention_forward, sdpa_attention_forward):
        torch.manual_seed(0)  # of the dropout
        outputs.append(attention(module, query, key, value, mask, **options)[0])
    assert torch.equal(*outputs)


def test_a_model_gives_the_logits_and_gradients_of_torchs_attention() -> None:
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        use_cache=False,
    )
    model = AutoModelForCausalLM.from_config(config)
    tokens = torch.randint(0, 50, (2, TILE + 9))
    found = []
    for implementation in ("sdpa", NAME):
        if implementation == NAME:
            use_tiled_attention(model, CPU)
        assert model.config._attn_implementation == implementation
        model.zero_grad()
        logits = model(input_ids=tokens).logits
        logits.square().sum().backward()
        found.append((logits.detach(), [p.grad.clone() for p in model.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("window", [6, None])
def test_a_sliding_window_is_kept(window: int | None) -> None:
    """What it covers no query with goes to torch with its mask."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MistralConfig(**sizes, num_hidden_layers=2, vocab_size=50, sliding_window=window, initializer_range=0.2)
    model = AutoModelForCausalLM.from_config(config).eval()
    tokens = torch.randint(0, 50, (2, 40))
    with torch.no_grad():
        expected = model(input_ids=tokens, use_cache=False).logits
        use_tiled_attention(model, CPU)
        found = model(input_ids=tokens, use_cache=False).logits
        unmasked = AutoModelForCausalLM.from_config(MistralConfig(**config.to_diff_dict() | {"sliding_window": None}))
        unmasked.load_state_dict(model.state_dict())
        differs = (unmasked.eval()(input_ids=tokens, use_cache=False).logits - expected).abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert bool(differs) == (window is not None)


def test_another_choice_and_other_devices_stay_as_they_are() -> None:
    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=5)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    use_tiled_attention(model, CPU)
    assert model.config._attn_implementation == "eager"
    model.set_attn_implementation("sdpa")
    use_tiled_attention(model, torch.device("cuda"))
    assert model.config._attn_implementation == "sdpa"
