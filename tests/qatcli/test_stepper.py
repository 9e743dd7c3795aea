"""Steps over losses and gradients that are not finite: what is skipped, what is restored, what a resume keeps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from qatcli.stepper import TRIES, Stepper
from qatcli.training import Schedule, parameter_group

CPU = torch.device("cpu")


def make_stepper(
    parameter: nn.Parameter,
    dtype: torch.dtype = torch.float32,
    grad_clip: float | None = None,
    lag: int | None = None,
) -> Stepper:
    groups: list[dict[str, object]] = [{"params": [parameter], "peak": 0.1}]
    return Stepper(groups, Schedule(8, floor=1.0), dtype=dtype, device=CPU, grad_clip=grad_clip, lag=lag)


def update(stepper: Stepper, step: int, loss: Tensor) -> bool:
    stepper.begin(step)
    stepper.backward(loss)
    return bool(stepper.finish(loss))


def test_every_element_goes_as_far_as_its_own_unit_says() -> None:
    """Units that differ by a factor of a thousand."""
    unit = torch.tensor([[0.001, 0.01], [0.1, 1.0]])
    start = torch.randn(2, 2)
    parameter = nn.Parameter(start.clone())
    schedule = Schedule(8, floor=0.05)
    group = parameter_group(parameter, 1.5, units="reach", unit=unit, schedule=schedule)
    stepper = Stepper([group], schedule, dtype=torch.float32, device=CPU, grad_clip=None)
    for step in range(8):
        assert update(stepper, step, parameter.sum())
    moved = (start - parameter.detach()) / unit
    torch.testing.assert_close(moved, torch.full_like(moved, 1.5), rtol=2e-3, atol=0)


def test_an_update_that_is_not_taken_moves_no_element() -> None:
    parameter = nn.Parameter(torch.randn(2, 4))
    schedule = Schedule(8, floor=1.0)
    group = parameter_group(parameter, 1.0, units="reach", unit=torch.rand(2, 4), schedule=schedule)
    stepper = Stepper([group], schedule, dtype=torch.float32, device=CPU, grad_clip=None, lag=1)
    start = parameter.detach().clone()
    assert not update(stepper, 0, parameter.sum() * math.nan)
    assert torch.equal(parameter.detach(), start)


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
        loss = (half.float() * 4).sum()
        stepper.backward(loss)
        taken.append(bool(stepper.finish(loss)))
    assert taken == [False, False, False, True, True, True]
    assert stepper.scaler.get_scale() == 65536 / 8
    assert (stepper.backoffs, stepper.dtype) == (0, torch.float16)
    assert parameter.item() == pytest.approx(0.7)


def test_clipping_sees_gradients_without_the_loss_scale() -> None:
    for dtype in (torch.float32, torch.float16):
        parameter = nn.Parameter(torch.ones(1))
        stepper = make_stepper(parameter, dtype, grad_clip=0.5)
        assert update(stepper, 0, parameter.sum() * 0.25)
        assert parameter.grad is not None
        assert parameter.grad.item() == pytest.approx(0.25), "below the bound: not clipped"
        assert update(stepper, 1, parameter.sum() * 10)
        assert parameter.grad.item() == pytest.approx(0.5, rel=1e-3)


# A verdict that is read late, as on a GPU.


@pytest.mark.parametrize("bad", ["loss", "gradient"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_before_a_failure_is_read_nothing_of_it_has_reached_the_weights(bad: str, dtype: torch.dtype) -> None:
    parameter = nn.Parameter(torch.ones(2))
    stepper = make_stepper(parameter, dtype, lag=1)
    stepper.scaler = torch.amp.GradScaler("cpu", init_scale=1.0, enabled=dtype == torch.float16)
    stepper.offer(1.0)
    assert update(stepper, 0, parameter.sum())
    state = {key: value.clone() for key, value in stepper.optimizer.state[parameter].items()}
    loss = parameter.sum() * math.nan if bad == "loss" else (parameter - parameter.detach()).sum().sqrt()
    assert not update(stepper, 1, loss)
    assert stepper.backoffs == 0, "not read yet"
    assert parameter.tolist() == pytest.approx([0.9, 0.9])
    assert all(torch.equal(value, state[key]) for key, value in stepper.optimizer.state[parameter].items())

    update(stepper, 2, parameter.sum())
    assert (stepper.backoffs, stepper.dtype) == (1, torch.float32)
    assert parameter.tolist() == [1, 1], "what the update between has done is undone"
    assert update(stepper, 3, parameter.sum())
    assert parameter.tolist() == pytest.approx([0.95, 0.95])


def test_updates_made_before_a_failure_is_read_do_not_count_as_further_failures() -> None:
    parameter = nn.Parameter(torch.ones(1))
    stepper = make_stepper(parameter, lag=1)
    for step in range(4):
        update(stepper, step, parameter.sum() * math.nan)
    assert stepper.backoffs == 2
    stepper.settle()
    assert stepper.backoffs == 2, "the fourth verdict went with the second failure"
    update(stepper, 4, parameter.sum() * math.nan)
    assert not stepper.exhausted
    stepper.settle()
    assert stepper.exhausted
    assert parameter.tolist() == [1]


def test_without_a_failure_it_does_not_matter_when_verdicts_are_read() -> None:
    values = []
    for lag in (0, 1, 3):
        parameter = nn.Parameter(torch.linspace(1, 2, 5))
        stepper = make_stepper(parameter, grad_clip=1.0, lag=lag)
        for step in range(6):
            assert update(stepper, step, parameter.square().sum())
        seen = stepper.loss
        stepper.settle()
        values.append((parameter.detach().clone(), stepper.loss))
        assert (seen == stepper.loss) == (lag == 0)
    for parameter, loss in values[1:]:
        assert torch.equal(parameter, values[0][0])
        assert loss == values[0][1]


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


def test_a_loss_that_is_not_finite_is_a_failure_whatever_its_gradient() -> None:
    parameter = nn.Parameter(torch.ones(2))
    stepper = make_stepper(parameter)
    stepper.offer(1.0)
    assert not update(stepper, 0, parameter.sum() + math.inf)
    assert (stepper.backoffs, parameter.tolist()) == (1, [1, 1])


def test_a_resumed_stepper_counts_on_towards_a_larger_loss_scale() -> None:
    one, two = (make_stepper(nn.Parameter(torch.ones(1)), torch.float16) for _ in range(2))
    one.offer(2.0)
    assert update(one, 0, one.parameters[0].sum() * 1e-3)
    state = one.scaler.state_dict()
    assert state["_growth_tracker"] == 1
    two.resume(one.best, one.best_loss, backoffs=0, scaler=[state["scale"], state["_growth_tracker"]])
    for stepper in (one, two):
        assert update(stepper, 5, stepper.parameters[0].sum() * 1e-3)
    assert one.scaler.state_dict() == two.scaler.state_dict()
