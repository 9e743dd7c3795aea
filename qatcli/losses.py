"""What the stages train for: errors of hidden states and losses of logits, both per token.

The latter are made a few tokens at a time. A batch of logits in fp32, its softmax and their gradients are the largest
tensors of the end-to-end stage: 4096 tokens of a 128k vocabulary take 2 GiB each. Here only blocks of rows exist in
fp32, and the gradient is made with the loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

TINY = 1e-12  # energy of a token that has none
ROWS = 64  # tokens whose fp32 logits exist at a time; with 50k tokens of vocabulary about a CPU's cache


@dataclass(frozen=True)
class SparseTarget:
    """N distributions, of each k weighted tokens: tokens int [N, k], weights [N, k] that add up to one, and the
    entropy [N] of the whole distribution in nats, by which the cross-entropy exceeds the divergence."""

    tokens: Tensor
    weights: Tensor
    entropy: Tensor


def token_loss(
    student: Tensor, teacher: SparseTarget | None, tokens: Tensor, mask: Tensor, *, text_weight: float = 0.0
) -> Tensor:
    """Sum over target tokens of (1 - text_weight) KL(teacher || student) + text_weight cross-entropy(text).

    Logits [B, T, V] and the teacher's B T distributions; position t predicts token t + 1, which counts when its mask is
    true. Without a teacher it is the cross-entropy alone. tokens and mask may be on the host, where the number of
    targets is known without waiting.
    """
    counted, text = F.pad(mask[:, 1:], (0, 1)).flatten().nonzero().flatten(), tokens.roll(-1, 1).flatten()
    counted, text = (each.to(student.device, non_blocking=True) for each in (counted, text))
    kept, weights = text[:, None], torch.ones(len(text), 1, device=student.device)
    entropy: Tensor | float = 0.0
    if teacher is not None:
        kept = torch.cat([teacher.tokens.long(), kept], -1)
        weights = torch.cat([teacher.weights * (1 - text_weight), weights * text_weight], -1)
        entropy = (1 - text_weight) * teacher.entropy.index_select(0, counted).double().sum()
    crossed: Tensor = _CrossEntropy.apply(student.flatten(0, 1), kept, weights, counted)
    return (crossed - entropy).float()


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    """Each token's mean squared error, fp32: [..., H] -> [...]."""
    return (output.float() - target.float()).square().mean(-1)


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """Each token's squared error over its energy, fp32: [..., H] -> [...].

    A few tokens carry massive activations that hold 98 % of a hidden state's energy in some models; under a plain mean
    nothing else is seen. Relative to the token is what the next block sees through its norm.
    """
    target = target.float()
    return (output.float() - target).square().sum(-1) / target.square().sum(-1).clamp_min(TINY)


def downstream_error(output: Tensor, target: Tensor, readers: Tensor) -> Tensor:
    """The mean over R readers of each token's relative error as they read it, fp32: [..., H] -> [...].

    readers [R, H] weigh the squares of the channels (`qatcli.models.readers`). Where a few channels hold nearly all
    energy of every token, an error relative to it sees little else; some readers hardly see these channels.
    """
    with torch.autocast(output.device.type, enabled=False):
        target = target.float()
        energy = (target.square() @ readers.T).clamp_min(TINY)
        weights = energy.reciprocal() @ readers / len(readers)  # [..., H]: so the gradient takes no product
        return ((output.float() - target).square() * weights).sum(-1)


class _CrossEntropy(torch.autograd.Function):
    """Minus the sum over the rows `counted` of weights [N, k] times log softmax(student [N, V]) at tokens [N, k], of
    which the last may repeat one before it, and others only such of the same weight.

    The weights of a row add up to one: its gradient is softmax(student) less the weights at their tokens.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, tokens: Tensor, weights: Tensor, counted: Tensor) -> Tensor:
        gradient = torch.zeros_like(student) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float64, device=student.device)
        for rows in counted.split(ROWS):
            ours = F.log_softmax(student.index_select(0, rows).float(), dim=-1)
            at, weight = tokens.index_select(0, rows), weights.index_select(0, rows)
            total -= torch.sum(ours.gather(1, at).mul_(weight))
            if gradient is not None:
                ours.exp_()
                for part in (slice(-1), slice(-1, None)):  # the text's token may be among the others: one after them,
                    ours.scatter_add_(1, at[:, part], -weight[:, part])  # because a GPU adds in any order
                gradient.index_copy_(0, rows, ours.to(gradient.dtype))
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(grad_out.to(gradient.dtype)), None, None, None
