"""Initial quantization grids: one scale and one zero point per group of weights.

All methods return scale fp32 [N, G] and zero_point fp32 [N, G] holding integers in [0, 2^bits - 1].
`minmax` is the paper's start; `weighted` is the default: at 2 and 3 bits the range of a group says little about the
step size that loses least, and inputs of unequal power make some columns matter more than others.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from qat_kernels.reference import MAX_SCALE, MIN_SCALE

ZeroPoints = Literal["any", "central", "middle"]
SHRINK = tuple(1.0 - 0.02 * i for i in range(35))  # fractions of the min-max range that the searches try
HISTOGRAM_BINS = 2048
REFINEMENTS = 3  # alternations of least-squares scale and nearest codes after the search


@torch.no_grad()
def initial_grid(
    weight: Tensor,
    *,
    bits: int,
    group_size: int,
    zero_points: ZeroPoints,
    method: str,
    moment: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scale and zero point for `weight` [N, K].

    `moment` [K] is the mean square of each input; only `weighted` uses it (ones when None).
    `zero_points` are any of the grid's, the central two 2^(bits-1) - 1 and 2^(bits-1), or only the latter, its middle.
    """
    groups = grouped(weight.float(), group_size)
    if method in ("mse", "weighted"):
        importance = torch.ones(weight.shape[1]) if moment is None or method == "mse" else moment.float()
        importance = grouped(importance.to(weight.device).clamp_min(1e-12)[None], group_size)
        return search_grid(groups, importance, bits=bits, zero_points=zero_points)
    low, high = _range(groups, method)
    if method == "entropy":
        shrink, middle = entropy_shrink(groups, bits=bits), (high + low) / 2
        low, high = middle - (middle - low) * shrink, middle + (high - middle) * shrink
    if zero_points == "any" and method != "absmax":
        return _asymmetric(low, high, bits)
    scale = _balanced_scale(low, high, bits)
    middle = torch.full_like(scale, 2 ** (bits - 1))
    # The grid reaches one level further down than up, or with the lower of the central zero points the reverse.
    return scale, middle - (high > -low).float() if zero_points == "central" else middle


def in_range(zero_point: Tensor, zero_points: ZeroPoints, bits: int) -> bool:
    """Whether all of these integers are among the zero points that `initial_grid` may choose."""
    middle = 2 ** (bits - 1)
    allowed = {"any": (0, 2**bits - 1), "central": (middle - 1, middle), "middle": (middle, middle)}[zero_points]
    return bool(((zero_point >= allowed[0]) & (zero_point <= allowed[1])).all())


def search_grid(groups: Tensor, importance: Tensor, *, bits: int, zero_points: ZeroPoints) -> tuple[Tensor, Tensor]:
    """The grid that minimizes sum(importance * (w - w_hat)^2) per group, by search and least squares.

    groups [N, G, g]; importance [1 or N, G, g], positive. Candidates are shrunken min-max ranges with the zero point
    moved by one either way, or with each of the zero points allowed; the best then alternates between least-squares
    scale and nearest codes.
    """
    qmax, middle = 2**bits - 1, 2 ** (bits - 1)
    low, high = _range(groups, "minmax")
    offsets = {"any": (-1, 0, 1), "central": (-1, 0), "middle": (0,)}[zero_points]
    best = torch.full_like(low, torch.inf)
    best_scale, best_zero = torch.ones_like(low), torch.zeros_like(low)
    if zero_points == "any":  # of a group of one sign no range below has zero, as the grid does that `minmax` takes
        best_scale, best_zero = _asymmetric(low, high, bits)
        best = torch.where((low > 0) | (high < 0), _error(groups, best_scale, best_zero, importance, qmax), best)
    for shrink in SHRINK:
        if zero_points == "any":
            scale = ((high - low) * shrink / qmax).clamp(MIN_SCALE, MAX_SCALE)
            zero = (qmax / 2 - (high + low) / 2 / scale).round()
        else:
            scale = _balanced_scale(low * shrink, high * shrink, bits)
            zero = torch.full_like(scale, middle)
        for offset in offsets:
            candidate = (zero + offset).clamp(0, qmax)
            error = _error(groups, scale, candidate, importance, qmax)
            better = error < best
            best = torch.where(better, error, best)
            best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, candidate, best_zero)
    for _ in range(REFINEMENTS):
        level = _levels(groups, best_scale, best_zero, qmax)
        power = (importance * level * level).sum(-1)
        scale = ((importance * level * groups).sum(-1) / power.clamp_min(1e-20)).clamp(MIN_SCALE, MAX_SCALE)
        error = _error(groups, scale, best_zero, importance, qmax)
        better = (error < best) & (power > 0)
        best, best_scale = torch.where(better, error, best), torch.where(better, scale, best_scale)
    return best_scale, best_zero


def entropy_shrink(groups: Tensor, *, bits: int) -> float:
    """The fraction of their min-max range to which all groups [N, G, g] of a linear are clipped, by least divergence.

    Entropy calibration as TensorRT does it for activations: over the places of weights in the ranges of their groups,
    KL(P || Q), where P has what is clipped in its outermost bins, and Q spreads each level's share over the bins that
    are rounded to it and not empty. A group is too small for a histogram of its own.
    """
    low, high = _range(groups, "minmax")
    places = (groups - low[..., None]) / (high - low).clamp_min(1e-20)[..., None]
    counts = torch.histc(places.clamp(0, 1), HISTOGRAM_BINS, 0, 1).double()
    best, best_shrink = float("inf"), 1.0
    for shrink in SHRINK:
        cut = round(HISTOGRAM_BINS * (1 - shrink) / 2)
        inside = counts[cut : HISTOGRAM_BINS - cut]
        clipped = inside.clone()
        clipped[0] += counts[:cut].sum()
        clipped[-1] += counts[HISTOGRAM_BINS - cut :].sum()
        filled = (inside > 0).double()
        level = (torch.arange(len(inside), device=counts.device) / (len(inside) - 1) * (2**bits - 1)).round().long()
        mass, width = (torch.zeros(2**bits).to(t).index_add(0, level, t) for t in (inside, filled))
        spread = (mass / width.clamp_min(1))[level] * filled
        p, q = clipped / clipped.sum(), spread / spread.sum()
        divergence = float(torch.where(p > 0, p * (p / q.clamp_min(1e-12)).log(), 0).sum())
        if divergence < best:
            best, best_shrink = divergence, shrink
    return best_shrink


@torch.no_grad()
def approximation_error(weight: Tensor, approximation: Tensor, *, moment: Tensor | None = None) -> float:
    """Energy of the difference over energy of `weight`, both [N, K], columns weighted by `moment` [K] when given."""
    power = torch.ones(weight.shape[1]) if moment is None else moment.float()
    power = power.to(weight.device)
    error = weight.float() - approximation
    return float((error.square() * power).sum() / (weight.float().square() * power).sum().clamp_min(1e-20))


def grouped(weight: Tensor, group_size: int) -> Tensor:
    """View [N, K] as [N, G, g]."""
    rows, columns = weight.shape
    return weight.reshape(rows, -1, columns if group_size < 0 else group_size)


def _range(groups: Tensor, method: str) -> tuple[Tensor, Tensor]:
    if method == "percentile":  # drop the outermost 0.5 % on each side, at least nothing
        tail = torch.tensor([0.005, 0.995], device=groups.device)
        low, high = torch.quantile(groups, tail, dim=-1)
    else:
        low, high = groups.amin(-1), groups.amax(-1)
    return low, high


def _asymmetric(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    qmax = 2**bits - 1
    # The reference leaves zero points of one-sided groups outside [0, qmax] and corrupts its packing: the grid has to
    # begin or end at zero then, to reach the weights.
    low, high = low.clamp_max(0), high.clamp_min(0)
    scale = ((high - low) / qmax).clamp(MIN_SCALE, MAX_SCALE)
    return scale, (-low / scale).round().clamp(0, qmax)


def _balanced_scale(low: Tensor, high: Tensor, bits: int) -> Tensor:
    """Scale of a grid around zero: half of its levels span the larger side of the range."""
    return (torch.maximum(-low, high) / (2 ** (bits - 1) - 0.5)).clamp(MIN_SCALE, MAX_SCALE)


def _levels(groups: Tensor, scale: Tensor, zero: Tensor, qmax: int) -> Tensor:
    zero = zero[..., None]
    return ((groups / scale[..., None]).round_().add_(zero)).clamp_(0, qmax).sub_(zero)


def _error(groups: Tensor, scale: Tensor, zero: Tensor, importance: Tensor, qmax: int) -> Tensor:
    error = _levels(groups, scale, zero, qmax).mul_(scale[..., None]).sub_(groups)
    return error.square_().mul_(importance).sum(-1)
