"""Perplexity and divergence from full precision over fixed windows of text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qatcli.training import autocast

# The divergence is of so many windows, or of more if these are short: each costs a second pass of full precision, and
# below some thousand tokens the mean says more about them than about the models.
DIVERGENCE_WINDOWS, DIVERGENCE_TOKENS = 8, 8192


def divergence_windows(seq_len: int) -> int:
    """How many windows of this length the divergence is of, where there are as many."""
    return max(DIVERGENCE_WINDOWS, -(-DIVERGENCE_TOKENS // seq_len))


@dataclass(frozen=True)
class Divergence:
    """Next-token distributions against full precision: mean and 99th percentile of KL (nats), share of equal top-1."""

    mean_kl: float
    kl_99: float
    top1_agreement: float
    tokens: int


@torch.no_grad()
def perplexity(
    model: Any,
    windows: Tensor,
    *,
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype,
    progress: Callable[[int], None] = lambda count: None,
) -> float:
    """exp of the mean negative log-likelihood over `windows` int [W, T], each scored on its own (T - 1 predictions).

    The mean is over windows of mean NLL, as in the paper's protocol; all windows have the same length.
    """
    total = 0.0
    for batch in windows.split(batch_size):
        logits = _logits(model, batch, device, dtype)
        targets = batch[:, 1:].to(device, torch.long)
        for row, target in zip(logits, targets, strict=True):  # row by row: fp32 logits of one window at a time
            total += float(F.cross_entropy(row[:-1].float(), target))
        progress(len(batch))
    mean = total / len(windows)
    return math.exp(mean) if mean < 700 else math.inf


def reference_logits(model: Any, windows: Tensor, *, device: torch.device, dtype: torch.dtype) -> Iterator[Tensor]:
    """What a divergence over int [W, T] is from: the full-precision logits [T, V] of its windows, one at a time."""
    for window in windows[: divergence_windows(windows.shape[1])]:
        with torch.no_grad():
            logits = _logits(model, window[None], device, dtype)[0]
        yield logits


@torch.no_grad()
def divergence(
    model: Any, reference: Iterable[Tensor], windows: Tensor, *, device: torch.device, dtype: torch.dtype
) -> Divergence:
    """Divergence of `model` from the logits of `reference_logits`, on any device, on the same int [W, T].

    Over the tokens that both know: some tools pad the vocabulary of their checkpoints.
    """
    losses, agreed = [], 0
    for mine, expected in zip(reference_logits(model, windows, device=device, dtype=dtype), reference, strict=True):
        logits = [each.to(device, torch.float32) for each in (mine, expected)]
        known = min(each.shape[-1] for each in logits)
        ours, theirs = (F.log_softmax(each[..., :known], dim=-1) for each in logits)
        losses.append(F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1).cpu())
        agreed += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
    kl = torch.cat(losses)
    return Divergence(float(kl.mean()), float(kl.quantile(0.99)), agreed / len(kl), len(kl))


def _logits(model: Any, batch: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    with autocast(device, dtype):
        return model(input_ids=batch.to(device, torch.long), use_cache=False).logits
