"""Error feedback against a column-by-column GPTQ written here from the paper, and against round-to-nearest."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qatcli.errors import DivergedError
from qatcli.gptq import error_feedback
from qatcli.grid import ZeroPoints, grouped, search_grid

ROWS, COLUMNS = 12, 192


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(ROWS, COLUMNS) * 0.1


@pytest.fixture
def inputs() -> Tensor:
    """Correlated inputs [tokens, COLUMNS] of unequal power: mixtures of a few directions, as activations are."""
    directions = torch.randn(24, COLUMNS) * torch.exp(torch.randn(COLUMNS))
    return torch.randn(600, 24) @ directions + 0.3 * torch.randn(600, COLUMNS)


def levels(weight: Tensor, scale: Tensor, zero_point: Tensor, bits: int, size: int) -> Tensor:
    """Nearest codes, by the definition."""
    scale, zero_point = (t.repeat_interleave(size, dim=1) for t in (scale, zero_point))
    return ((weight / scale).round() + zero_point).clamp(0, 2**bits - 1)


def naive_codes(weight: Tensor, hessian: Tensor, scale: Tensor, zero_point: Tensor, bits: int, size: int) -> Tensor:
    """Optimal brain quantization in fixed order (arXiv 2210.17323, section 3), without Cholesky and without blocks.

    For every column: quantize it, subtract its error times the inverse Hessian's row from all that follow, and
    eliminate the column from the inverse Hessian. fp64 throughout.
    """
    w = weight.double().clone()
    h = hessian.double().clone()
    dead = h.diagonal() == 0
    w[:, dead] = 0
    h[dead, dead] = 1
    h += 0.01 * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    inverse = torch.linalg.inv(h)
    codes = torch.empty_like(w)
    for k in range(w.shape[1]):
        s, z = scale[:, k // size].double(), zero_point[:, k // size].double()
        codes[:, k] = ((w[:, k] / s).round() + z).clamp(0, 2**bits - 1)
        error = w[:, k] - (codes[:, k] - z) * s
        w[:, k + 1 :] -= error[:, None] * inverse[k, k + 1 :] / inverse[k, k]
        inverse = inverse - inverse[:, k, None] @ inverse[None, k] / inverse[k, k]
    return codes


@pytest.mark.parametrize("group_size", [32, 96, -1])
@pytest.mark.parametrize("zero_points", ["any", "central", "middle"])
def test_codes_are_those_of_the_naive_algorithm(
    weight: Tensor, inputs: Tensor, group_size: int, zero_points: ZeroPoints
) -> None:
    hessian = inputs.T @ inputs
    latent, scale, zero_point = error_feedback(weight, hessian, bits=3, group_size=group_size, zero_points=zero_points)
    size = COLUMNS if group_size < 0 else group_size
    expected = naive_codes(weight, hessian, scale, zero_point, 3, size)
    found = levels(latent, scale, zero_point, 3, size)
    # Rounding in fp32 may put a weight that lies between two codes on the other side, and its row then differs.
    agreeing_rows = (found == expected).all(dim=1)
    assert int(agreeing_rows.sum()) >= ROWS - 2
    assert not torch.equal(found, levels(weight, scale, zero_point, 3, size).double())


@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_output_error_is_below_rounding_to_nearest(weight: Tensor, inputs: Tensor, bits: int, group_size: int) -> None:
    hessian = inputs.T @ inputs
    kind = {"bits": bits, "zero_points": "any"}
    latent, scale, zero_point = error_feedback(weight, hessian, group_size=group_size, **kind)
    size = COLUMNS if group_size < 0 else group_size
    moment = hessian.diagonal() / len(inputs)
    nearest_grid = search_grid(grouped(weight, size), grouped(moment[None], size), **kind)

    def output_error(weight_to_round: Tensor, grid: tuple[Tensor, Tensor]) -> float:
        s, z = (t.repeat_interleave(size, dim=1) for t in grid)
        rounded = (levels(weight_to_round, *grid, bits, size) - z) * s
        return float((inputs @ (rounded - weight).T).square().sum())

    own_grid = (scale, zero_point)
    compensated = output_error(latent, own_grid)
    assert compensated < 0.7 * output_error(weight, own_grid)
    assert compensated < 0.7 * output_error(weight, nearest_grid)


@pytest.mark.parametrize("zero_points", ["any", "central", "middle"])
def test_grids_are_in_range(weight: Tensor, inputs: Tensor, zero_points: ZeroPoints) -> None:
    _, scale, zero_point = error_feedback(weight, inputs.T @ inputs, bits=2, group_size=32, zero_points=zero_points)
    assert scale.shape == zero_point.shape == (ROWS, 6)
    assert bool((scale >= 1e-4 * (1 - 1e-6)).all())
    assert torch.equal(zero_point, zero_point.round().clamp(0, 3))
    allowed = {"any": {0, 1, 2, 3}, "central": {1, 2}, "middle": {2}}[zero_points]
    assert set(zero_point.unique().tolist()) <= allowed


def test_latent_weights_stay_where_their_gradient_is_not_zero(weight: Tensor, inputs: Tensor) -> None:
    """A weight that rounds beyond the last code would be clamped, and its straight-through gradient be zero."""
    latent, scale, zero_point = error_feedback(weight, inputs.T @ inputs, bits=2, group_size=32, zero_points="any")
    scale, zero_point = (t.repeat_interleave(32, dim=1) for t in (scale, zero_point))
    unclamped = (latent / scale).round() + zero_point
    assert bool(((unclamped >= 0) & (unclamped <= 3)).all())
    assert not torch.equal(latent, weight)


def test_inputs_that_never_fire(weight: Tensor, inputs: Tensor) -> None:
    """Their weights become zero, as in the paper's code, and the others do not notice them."""
    dead = torch.tensor([0, 5, 130])
    alive = torch.ones(COLUMNS, dtype=torch.bool)
    alive[dead] = False
    silent = inputs.clone()
    silent[:, dead] = 0
    hessian = silent.T @ silent
    latent, scale, zero_point = error_feedback(weight, hessian, bits=3, group_size=32, zero_points="any")
    assert bool(torch.isfinite(latent).all() & torch.isfinite(scale).all())
    codes = levels(latent, scale, zero_point, 3, 32)
    reconstructed = (codes - zero_point.repeat_interleave(32, dim=1)) * scale.repeat_interleave(32, dim=1)
    assert bool((reconstructed[:, dead] == 0).all())
    other_weight = weight.clone()
    other_weight[:, dead] = 7.0
    again, *_ = error_feedback(other_weight, hessian, bits=3, group_size=32, zero_points="any")
    assert torch.equal(again, latent)


def test_no_input_at_all_rounds_to_zero(weight: Tensor) -> None:
    latent, scale, _ = error_feedback(weight, torch.zeros(COLUMNS, COLUMNS), bits=2, group_size=32, zero_points="any")
    assert bool((latent == 0).all() & torch.isfinite(scale).all())


def test_uncorrelated_inputs_need_no_feedback(weight: Tensor) -> None:
    """With a diagonal Hessian every column is on its own: GPTQ is rounding to nearest."""
    latent, scale, zero_point = error_feedback(weight, torch.eye(COLUMNS), bits=4, group_size=32, zero_points="any")
    assert torch.equal(levels(latent, scale, zero_point, 4, 32), levels(weight, scale, zero_point, 4, 32))


def test_arguments_are_left_alone(weight: Tensor, inputs: Tensor) -> None:
    hessian = inputs.T @ inputs
    before = weight.clone(), hessian.clone()
    error_feedback(weight, hessian, bits=2, group_size=32, zero_points="any")
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])


def test_infinite_activations_are_an_error(weight: Tensor) -> None:
    hessian = torch.eye(COLUMNS)
    hessian[3, 3] = float("nan")
    with pytest.raises(DivergedError, match="not positive definite"):
        error_feedback(weight, hessian, bits=2, group_size=32, zero_points="any")


def test_a_hessian_that_is_not_quite_positive_is_damped_more() -> None:
    hessian = torch.eye(32)
    hessian[0, 1] = hessian[1, 0] = 1.05  # an eigenvalue of -0.05
    found = error_feedback(torch.randn(4, 32), hessian, bits=4, group_size=32, zero_points="any")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in found)
