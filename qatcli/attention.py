"""Causal attention for training on a CPU, where torch's own is slow in its backward pass.

Registered with transformers through its own interface. `use_tiled_attention` selects it for a model on a CPU that would
use torch's; what it does not cover (masks other than the causal one, dropout, other devices) still goes there.
`python benchmarks/block_speed.py` prints what it is worth.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qatcli.training import active_dtype

NAME = "qat_tiled"
TILE = 64  # queries of a head whose scores exist at a time; the fastest of 32, 64, 128 and 256


def use_tiled_attention(model: PreTrainedModel, device: torch.device) -> None:
    """Let `model` use this attention where it is the faster one."""
    if device.type == "cpu" and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)


def tiled_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """As transformers' attention functions: query [B, H, T, D], key and value [B, K, T, D] -> [B, T, H, D]."""
    causal = options.get("is_causal")
    plain = attention_mask is None and not dropout and options.get("position_bias") is None
    whole = query.device.type == "cpu" and 1 < query.shape[2] == key.shape[2]
    if not (plain and whole and (getattr(module, "is_causal", True) if causal is None else causal)):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **options)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return tiled_attention(query, key, value, scaling), None


def tiled_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """softmax(causal(query key^T) * scaling) value: query [B, H, T, D], key and value [B, K, T, D] -> [B, T, H, D].

    Computes in the dtype of an enclosing autocast; scores and probabilities are rounded to it.
    """
    dtype = active_dtype(query)
    with torch.autocast("cpu", enabled=False):
        output: Tensor = _TiledAttention.apply(query.to(dtype), key.to(dtype), value.to(dtype), scaling)
    return output


class _TiledAttention(torch.autograd.Function):
    """A tile of queries at a time against the keys it sees; the query heads of a key head are rows of one product.

    The backward pass makes the probabilities again, so that as little is kept as by torch's.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        (batch, heads, length, _), shared = query.shape, key.shape[1]
        query = (query * scaling).reshape(batch, shared, heads // shared, length, -1)
        key, value = key.contiguous(), value.contiguous()
        output = query.new_empty(batch, length, shared, heads // shared, value.shape[-1])
        for start in range(0, length, TILE):
            tile = slice(start, min(start + TILE, length))
            product = _probabilities(query, key, tile) @ value[:, :, : tile.stop]
            output[:, tile] = product.unflatten(2, (heads // shared, -1)).permute(0, 3, 1, 2, 4)
        ctx.save_for_backward(query, key, value)
        ctx.scaling = scaling
        return output.flatten(2, 3)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        shared, group, length = query.shape[1:4]
        grad_out = grad_out.unflatten(2, (shared, group)).permute(0, 2, 3, 1, 4)
        grad_query = torch.empty_like(query)
        grad_key, grad_value = (
            torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in (key, value)
        )
        for start in range(0, length, TILE):
            tile = slice(start, min(start + TILE, length))
            seen = slice(0, tile.stop)
            probabilities = _probabilities(query, key, tile)
            out = grad_out[:, :, :, tile].flatten(2, 3)
            grad_value[:, :, seen] += probabilities.transpose(-1, -2) @ out
            grad = out @ value[:, :, seen].transpose(-1, -2)
            grad = torch._softmax_backward_data(grad, probabilities, -1, grad.dtype)
            grad_query[:, :, :, tile] = (grad @ key[:, :, seen]).unflatten(2, (group, -1))
            grad_key[:, :, seen] += grad.transpose(-1, -2) @ query[:, :, :, tile].flatten(2, 3)
        grad_query = (grad_query * ctx.scaling).flatten(1, 2)
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None


def _probabilities(query: Tensor, key: Tensor, tile: slice) -> Tensor:
    """Of the queries [B, K, G, tile, D] for the keys up to their own: [B, K, G * tile, tile.stop]."""
    count = tile.stop - tile.start
    scores = query[:, :, :, tile].flatten(2, 3) @ key[:, :, : tile.stop].transpose(-1, -2)
    later = torch.ones(count, count, dtype=torch.bool, device=query.device).triu_(1)
    scores.unflatten(2, (-1, count))[..., tile.start :].masked_fill_(later, float("-inf"))
    return torch.softmax(scores, -1)


AttentionInterface.register(NAME, tiled_attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
