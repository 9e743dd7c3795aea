"""GPTQ error feedback (arXiv 2210.17323) as a starting point for training.

Column by column, the rounding error of a weight is spread over the columns not yet rounded so that the layer's output
moves least. What is returned is not only the grid but the compensated weights, whose nearest codes on that grid are
GPTQ's codes: training starts from them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qatcli.errors import DivergedError
from qatcli.grid import ZeroPoints, grouped, search_grid

DAMPING = 0.01  # of the mean diagonal, as in the paper
BLOCK = 128  # columns whose updates are applied to the rest at once


@torch.no_grad()
def error_feedback(
    weight: Tensor, hessian: Tensor, *, bits: int, group_size: int, zero_points: ZeroPoints
) -> tuple[Tensor, Tensor, Tensor]:
    """Compensated weight [N, K], scale [N, G] and zero point [N, G], all fp32.

    `hessian` fp32 [K, K] is the sum of x x^T over calibration inputs. Each group's grid is searched when its first
    column is reached, on the weights as compensated so far.
    """
    w = weight.float().clone()
    rows, columns = w.shape
    size = columns if group_size < 0 else group_size
    qmax = 2**bits - 1
    inverse = _inverse_cholesky(hessian, w)
    # In GPTQ's objective an error in column k costs 1 / inverse[k, k]^2 after optimal compensation.
    importance = grouped(inverse.diagonal().square().reciprocal()[None], size)
    scale = torch.empty(rows, columns // size, device=w.device)
    zero = torch.empty_like(scale)
    latent = torch.empty_like(w)
    for group in range(columns // size):
        first, last = group * size, (group + 1) * size
        # All updates from earlier groups have reached this one, so its grid is searched on the weights as they are.
        s, z = search_grid(w[:, None, first:last], importance[:, group : group + 1], bits=bits, zero_points=zero_points)
        s, z = s[:, 0], z[:, 0]
        scale[:, group], zero[:, group] = s, z
        for start in range(first, last, BLOCK):
            stop = min(start + BLOCK, last)
            errors = torch.empty(rows, stop - start, device=w.device)
            for k in range(start, stop):
                column = w[:, k]
                level = (column / s).round().add(z).clamp(0, qmax).sub(z)
                # Kept inside the grid: the straight-through gradient of a weight beyond the last level is zero.
                latent[:, k] = torch.minimum(torch.maximum(column, (-z - 0.49) * s), (qmax - z + 0.49) * s)
                error = (column - level * s) / inverse[k, k]
                w[:, k + 1 : stop] -= error[:, None] * inverse[k, k + 1 : stop]
                errors[:, k - start] = error
            w[:, stop:] -= errors @ inverse[start:stop, stop:]
    return latent, scale, zero


def _inverse_cholesky(hessian: Tensor, weight: Tensor) -> Tensor:
    """Upper Cholesky factor of the damped inverse Hessian; dead inputs get a unit diagonal and a zero weight."""
    h = hessian.float().clone()
    dead = h.diagonal() == 0
    h[dead, dead] = 1.0
    weight[:, dead] = 0.0
    mean = h.diagonal().mean()
    for attempt in range(6):
        damped = h.clone()
        damped.diagonal().add_(DAMPING * 10**attempt * mean)
        factor, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0:
            upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
            if int(info) == 0:
                return upper
    raise DivergedError(
        "the Hessian of a linear's inputs is not positive definite even with heavy damping",
        hint="set block_ap.amp to bfloat16 or float32 if activations overflow, or block_ap.rounding to nearest",
    )
