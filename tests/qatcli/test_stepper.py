"""Steps over losses and gradients that are not finite: what is skipped, what is restored, what a resume keeps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from qatcli.stepper import TRIES, Stepper
from qatcli.training import Schedule

CPU = torch.device("cpu")


def make_stepper(
    parameter: nn.Parameter, dtype: torch.dtype = torch.float32, grad_clip: float | None = None
) -> Stepper:
    schedule = Schedule(8, floor=1.0)
    return Stepper([{"params": [parameter], "peak": 0.1}], schedule, dtype=dtype, device=CPU, grad_clip=grad_clip)


def update(stepper: Stepper, step: int, loss: Tensor) -> bool:
    stepper.begin(step)
    stepper.backward(loss)
    return stepper.finish(loss_finite=bool(torch.isfinite(loss)))


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_what_is_not_finite_restores_the_best_and_goes_on_in_fp32_at_half_the_rate(bad: str) -> None:
    parameter = nn.Parameter(torch.ones(2))
    stepper = make_stepper(parameter, torch.bfloat16)
    stepper.offer(1.0)
    assert update(stepper, 0, parameter.sum())
    assert parameter.tolist() == pytest.approx([0.9, 0.9])
    assert stepper.dtype == torch.bfloat16

    # The root has an infinite slope at 0, where its value is finite.
    loss = parameter.sum() * math.nan if bad == "loss" else (parameter - parameter.detach()).sum().sqrt()
    assert not update(stepper, 1, loss)
    assert parameter.tolist() == [1, 1]
    assert (stepper.backoffs, stepper.dtype, stepper.exhausted) == (1, torch.float32, False)
    assert update(stepper, 2, parameter.sum())
    assert parameter.tolist() == pytest.approx([0.95, 0.95])

    for step in range(TRIES - 1):
        assert not update(stepper, step, parameter.sum() * math.inf)
    assert stepper.exhausted
    assert parameter.tolist() == [1, 1]


def test_the_lowest_loss_is_the_best_and_nan_never_is() -> None:
    parameter = nn.Parameter(torch.ones(1))
    stepper = make_stepper(parameter)
    for value, loss in ((1.0, 5.0), (2.0, 3.0), (3.0, 4.0), (4.0, math.nan)):
        parameter.data.fill_(value)
        stepper.offer(loss)
    stepper.restore_best()
    assert (parameter.item(), stepper.best_loss) == (2.0, 3.0)
    parameter.data.fill_(9.0)
    stepper.offer(7.0, always=True)
    stepper.restore_best()
    assert (parameter.item(), stepper.best_loss) == (9.0, 7.0)


def test_in_fp16_an_overflowing_gradient_halves_the_loss_scale_and_is_no_failure() -> None:
    """A gradient of 4 overflows under the first loss scale of 65536 in fp16; it fits once that has been halved."""
    parameter = nn.Parameter(torch.ones(1))
    stepper = make_stepper(parameter, torch.float16)
    taken = []
    for step in range(6):
        stepper.begin(step)
        with torch.autocast("cpu", dtype=torch.float16):
            half = parameter.half()
        stepper.backward((half.float() * 4).sum())
        taken.append(stepper.finish(loss_finite=True))
    assert taken == [False, False, False, True, True, True]
    assert stepper.scaler.get_scale() == 65536 / 8
    assert (stepper.backoffs, stepper.dtype) == (0, torch.float16)
    assert parameter.item() == pytest.approx(0.7)


def test_clipping_sees_gradients_without_the_loss_scale() -> None:
    for dtype in (torch.float32, torch.float16):
        parameter = nn.Parameter(torch.ones(1))
        stepper = make_stepper(parameter, dtype, grad_clip=0.5)
        stepper.begin(0)
        stepper.backward(parameter.sum() * 0.25)
        assert stepper.finish(loss_finite=True)
        assert parameter.grad is not None
        assert parameter.grad.item() == pytest.approx(0.25), "below the bound: not clipped"


@pytest.mark.parametrize(("dtype", "backoffs"), [(torch.float16, 0), (torch.float16, 1), (torch.float32, 2)])
def test_a_resumed_stepper_goes_on_as_it_was(dtype: torch.dtype, backoffs: int) -> None:
    first, second = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    one, two = make_stepper(first, dtype), make_stepper(second, dtype)
    one.offer(2.0)
    for step in range(backoffs):
        update(one, step, first.sum() * math.nan)
    state = one.scaler.state_dict()
    two.resume(
        one.best,
        one.best_loss,
        backoffs=one.backoffs,
        scaler=[state["scale"], state["_growth_tracker"]] if state else None,
    )
    assert (two.best_loss, two.dtype) == (one.best_loss, one.dtype)
    for stepper, parameter in ((one, first), (two, second)):
        assert update(stepper, 5, parameter.sum() * 1e-3)
    assert first.item() == second.item()
    assert one.scaler.state_dict() == two.scaler.state_dict()
