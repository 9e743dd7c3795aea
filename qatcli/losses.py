"""Token losses of the end-to-end stage, made a few tokens at a time.

A batch of logits in fp32, its softmax and their gradients are the largest tensors of the stage: 4096 tokens of a
128k vocabulary take 2 GiB each. Here only blocks of rows exist in fp32, and the gradient is made with the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

HIDDEN_WEIGHT = 20.0
"""Of the error of hidden states beside the divergence. On stories15M 5 to 80 lower the divergence (LOG.md)."""
ROWS = 64  # tokens whose fp32 logits exist at a time; with 50k tokens of vocabulary about a CPU's cache


def token_loss(student: Tensor, teacher: Tensor | None, tokens: Tensor, mask: Tensor) -> Tensor:
    """Sum over target tokens of KL(teacher || student), or of the cross-entropy with the text without a teacher.

    Logits [B, T, V]; position t predicts token t + 1, which counts when its mask is true.
    """
    counted = _predicting(mask)
    predicted = student.flatten(0, 1)
    if teacher is None:
        targets = tokens.roll(-1, 1).flatten()
        return F.cross_entropy(predicted[counted].float(), targets[counted], reduction="sum")
    loss: Tensor = _Divergence.apply(predicted, teacher.flatten(0, 1), counted)
    return loss


def hidden_error(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Sum over target tokens of the mean over blocks of the relative error of hidden states [B, T, H].

    The states are those of the position that predicts the token. An error counts 1 at most: where the student makes a
    massive activation that the teacher does not, it is thousands, and nothing else would be seen.
    """
    counted = _predicting(mask)
    pairs = zip(student, teacher, strict=True)
    errors = [relative_error(ours, theirs).flatten()[counted].clamp_max(1) for ours, theirs in pairs]
    return torch.stack(errors).mean(0).sum()


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """Each token's squared error over its energy, fp32: [..., H] -> [...].

    A few tokens carry massive activations that hold 98 % of a hidden state's energy in some models; under a plain mean
    nothing else is seen. Relative to the token is what the next block sees through its norm.
    """
    target = target.float()
    return (output.float() - target).square().sum(-1) / target.square().sum(-1).clamp_min(1e-12)


def _predicting(mask: Tensor) -> Tensor:
    """Flat positions of [B, T] whose next token counts; the last one predicts nothing."""
    return F.pad(mask[:, 1:], (0, 1)).flatten().nonzero().flatten()


class _Divergence(torch.autograd.Function):
    """Sum over the rows `counted` of KL(softmax(teacher) || softmax(student)).

    The gradient of a row is softmax(student) - softmax(teacher).
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, counted: Tensor) -> Tensor:
        gradient = torch.zeros_like(student) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float64, device=student.device)
        for rows in counted.split(ROWS):
            ours = F.log_softmax(student.index_select(0, rows).float(), dim=-1)
            theirs = F.log_softmax(teacher.index_select(0, rows).float(), dim=-1)
            target = theirs.exp()
            total += torch.sum(theirs.sub_(ours).mul_(target))
            if gradient is not None:
                gradient.index_copy_(0, rows, ours.exp_().sub_(target).to(gradient.dtype))
        ctx.save_for_backward(gradient)
        return total.float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_out.to(gradient.dtype), None, None
