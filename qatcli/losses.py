"""Token losses of the end-to-end stage, made a few tokens at a time.

A batch of logits in fp32, its softmax and their gradients are the largest tensors of the stage: 4096 tokens of a
128k vocabulary take 2 GiB each. Here only blocks of rows exist in fp32, and the gradient is made with the loss.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

ROWS = 64  # tokens whose fp32 logits exist at a time; with 50k tokens of vocabulary about a CPU's cache


def token_loss(student: Tensor, teacher: Tensor | None, tokens: Tensor, mask: Tensor) -> Tensor:
    """Sum over target tokens of KL(teacher || student), or of the cross-entropy with the text without a teacher.

    Logits [B, T, V]; position t predicts token t + 1, which counts when its mask is true.
    """
    keep = mask[:, 1:]
    predicted = student[:, :-1][keep]
    if teacher is None:
        return F.cross_entropy(predicted.float(), tokens[:, 1:][keep], reduction="sum")
    loss: Tensor = _Divergence.apply(predicted, teacher[:, :-1][keep])
    return loss


class _Divergence(torch.autograd.Function):
    """Sum over rows of KL(softmax(teacher) || softmax(student)); gradient softmax(student) - softmax(teacher)."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        gradient = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float64, device=student.device)
        for start in range(0, len(student), ROWS):
            rows = slice(start, start + ROWS)
            ours = F.log_softmax(student[rows].float(), dim=-1)
            theirs = F.log_softmax(teacher[rows].float(), dim=-1)
            target = theirs.exp()
            total += torch.sum(theirs.sub_(ours).mul_(target))
            if gradient is not None:
                gradient[rows] = ours.exp_().sub_(target)
        ctx.save_for_backward(gradient)
        return total.float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_out.to(gradient.dtype), None
