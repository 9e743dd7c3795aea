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
class Likeliest:
    """The k likeliest tokens of N distributions, int [N, k], and their log-probabilities [N, k]."""

    tokens: Tensor
    log_probabilities: Tensor

    def spread(self, rows: Tensor, ours: Tensor) -> Tensor:
        """Log-probabilities [R, V] of the distributions `rows`: what they leave to all other tokens is spread over
        these as `ours` [R, V] has it. So the divergence is that of k + 1 events, and its gradient, too."""
        tokens = self.tokens.index_select(0, rows).long()
        known = self.log_probabilities.index_select(0, rows).float()
        others = ours.scatter(1, tokens, -torch.inf)
        left = (1 - known.exp().sum(-1, keepdim=True)).clamp_min(TINY).log()
        return others.add_(left - others.logsumexp(-1, keepdim=True)).scatter_(1, tokens, known)


def token_loss(
    student: Tensor, teacher: Tensor | Likeliest | None, tokens: Tensor, mask: Tensor, *, text_weight: float = 0.0
) -> Tensor:
    """Sum over target tokens of (1 - text_weight) KL(teacher || student) + text_weight cross-entropy(text).

    Logits [B, T, V]; position t predicts token t + 1, which counts when its mask is true. Of a teacher the logits or,
    of its B T positions, the likeliest tokens; without one it is the cross-entropy alone. tokens and mask may be on the
    host, where the number of targets is known without waiting.
    """
    counted, text = F.pad(mask[:, 1:], (0, 1)).flatten().nonzero().flatten(), tokens.roll(-1, 1).flatten()
    counted, text = (each.to(student.device, non_blocking=True) for each in (counted, text))
    theirs = teacher.flatten(0, 1) if isinstance(teacher, Tensor) else teacher
    weight = 1.0 if teacher is None else text_weight
    loss: Tensor = _TokenLoss.apply(student.flatten(0, 1), theirs, text, counted, weight)
    return loss


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


class _TokenLoss(torch.autograd.Function):
    """Sum over the rows `counted` of (1 - w) KL(softmax(teacher) || softmax(student)) - w log softmax(student)[text].

    The gradient of a row is softmax(student) - (1 - w) softmax(teacher) - w onehot(text).
    """

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor | Likeliest | None, text: Tensor, counted: Tensor, w: float
    ) -> Tensor:
        gradient = torch.zeros_like(student) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float64, device=student.device)
        for rows in counted.split(ROWS):
            ours = F.log_softmax(student.index_select(0, rows).float(), dim=-1)
            if teacher is None:
                target = torch.zeros_like(ours)
            else:
                if isinstance(teacher, Likeliest):
                    theirs = teacher.spread(rows, ours)
                else:
                    theirs = F.log_softmax(teacher.index_select(0, rows).float(), dim=-1)
                target = theirs.exp().mul_(1 - w)
                total += torch.sum(theirs.sub_(ours).mul_(target))
            if w:
                index = text[rows, None]
                total -= w * ours.gather(1, index).sum()
                target.scatter_add_(1, index, torch.full_like(target[:, :1], w))
            if gradient is not None:
                gradient.index_copy_(0, rows, ours.exp_().sub_(target).to(gradient.dtype))
        ctx.save_for_backward(gradient)
        return total.float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(grad_out.to(gradient.dtype)), None, None, None, None
