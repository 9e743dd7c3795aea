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
    """Next-token distributions against full precision: mean and 99th percentile of KL (nats), share of equal top-1.

    `kl_stderr` is the mean's standard error over windows, because tokens of one window are not independent; None of a
    single window.
    """

    mean_kl: float
    kl_stderr: float | None
    kl_99: float
    top1_agreement: float
    tokens: int


def compared(windows: Tensor) -> Tensor:
    """The windows of int [W, T] that a divergence is of."""
    return windows[: divergence_windows(windows.shape[1])]


def window_logits(
    model: Any,
    windows: Tensor,
    *,
    batch_size: int = 1,
    device: torch.device,
    dtype: torch.dtype,
    progress: Callable[[int], None] = lambda count: None,
) -> Iterator[Tensor]:
    """The model's logits [T, V] of each of windows int [W, T], computed `batch_size` windows at a time.

    `progress` is called with that number when they have been used.
    """
    for batch in windows.split(batch_size):
        with torch.no_grad(), autocast(device, dtype):
            logits = model(input_ids=batch.to(device, torch.long), use_cache=False).logits
        yield from logits
        del logits  # before the next are made
        progress(len(batch))


def perplexity(logits: Iterable[Tensor], windows: Tensor) -> float:
    """exp of the mean negative log-likelihood over `windows` int [W, T], each scored on its own (T - 1 predictions), by
    the logits [T, V] of each.

    The mean is over windows of mean NLL, as in the paper's protocol; all windows have the same length.
    """
    rows = iter(logits)
    # By `next`: a name, or `zip`, would hold what is used while the next window's, or batch's, are made.
    mean = sum(_loss(next(rows), window) for window in windows) / len(windows)
    next(rows, None)  # to the end of a generator, which closes what it opened
    return math.exp(mean) if mean < 700 else math.inf


def divergence(ours: Iterable[Tensor], reference: Iterable[Tensor], device: torch.device) -> Divergence:
    """Divergence from the logits of `reference`, on any device, of those of the same windows, [T, V] each.

    Over the tokens that both know: some tools pad the vocabulary of their checkpoints.
    """
    found = [_apart(mine, expected, device) for mine, expected in zip(ours, reference, strict=True)]
    kl, agreed = (torch.stack(each) for each in zip(*found, strict=True))  # [W, T]
    means = kl.mean(-1)
    stderr = float(means.std() / len(means) ** 0.5) if len(means) > 1 else None
    quantile = float(kl.flatten().quantile(0.99))
    return Divergence(float(means.mean()), stderr, quantile, float(agreed.double().mean()), kl.numel())


def _loss(logits: Tensor, window: Tensor) -> float:
    """Mean negative log-likelihood of a window int [T] by its logits [T, V]."""
    return float(F.cross_entropy(logits[:-1].float(), window[1:].to(logits.device, torch.long)))


def _apart(ours: Tensor, reference: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of each position of logits [T, V], the divergence and whether both predict the same token."""
    known = min(ours.shape[-1], reference.shape[-1])
    log_q, log_p = (F.log_softmax(each[:, :known].to(device, torch.float32), dim=-1) for each in (ours, reference))
    kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    return kl.cpu(), (log_q.argmax(-1) == log_p.argmax(-1)).cpu()
