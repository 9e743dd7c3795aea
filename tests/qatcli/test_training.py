"""The schedule against the reference's, reach, precision, and the best iterate."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qatcli import training
from qatcli.training import (
    Schedule,
    adamw,
    autocast,
    compute_dtype,
    parameter_group,
    restore,
    scale_unit,
    snapshot,
)

FP32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.filterwarnings("ignore:To get the last learning rate")
def test_schedule_is_the_one_of_the_reference() -> None:
    """EfficientQAT asks torch's cosine for `get_lr()` after each step; users' logs print it after the first epoch.

    4096 updates from 1e-4 to 1e-4 / 20: the log of OpenGVLab/EfficientQAT#24 shows quant_lr 5.246359588146619e-05
    after update 2048, which is the closed form one step later.
    """
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-4)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4096, eta_min=1e-4 / 20)
    ours = Schedule(4096, floor=1 / 20)
    optimizer.step()
    for update in range(1, 2049):
        reference.step()
        rate = reference.get_lr()[0]
        assert 1e-4 * ours.factor(update + 1) == pytest.approx(rate, rel=1e-5)
    assert rate == 5.246359588146619e-05
    assert 1e-4 * ours.factor(2049) == pytest.approx(5.246359588146619e-05, rel=1e-6)


def test_schedule_starts_at_the_peak_and_falls_to_the_floor() -> None:
    schedule = Schedule(100, floor=0.05)
    factors = [schedule.factor(step) for step in range(100)]
    assert factors[0] == 1
    assert factors == sorted(factors, reverse=True)
    assert schedule.factor(50) == pytest.approx((1 + 0.05) / 2)
    assert schedule.factor(100) == pytest.approx(0.05)


def test_warm_up_rises_in_equal_steps_to_the_peak() -> None:
    schedule = Schedule(20, floor=0.0, warmup=4)
    assert [schedule.factor(step) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert schedule.factor(5) < 1
    assert schedule.factor(20) == pytest.approx(0)


@settings(deadline=None, max_examples=30)
@given(steps=st.integers(1, 300), floor=st.floats(0, 1), warmup=st.integers(0, 20))
def test_total_is_the_sum_of_the_factors(steps: int, floor: float, warmup: int) -> None:
    schedule = Schedule(steps, floor=floor, warmup=min(warmup, steps - 1))
    factors = [schedule.factor(step) for step in range(steps)]
    assert all(0 < factor <= 1 for factor in factors)
    assert schedule.total() == pytest.approx(math.fsum(factors))


@pytest.mark.parametrize("steps", [4, 64, 512])
def test_reach_is_how_far_adam_goes_whatever_the_number_of_steps(steps: int) -> None:
    """A gradient of constant sign moves a parameter by `reach` of its units, in 4 steps as in 512."""
    parameter = nn.Parameter(torch.tensor([5.0, -3.0]))
    schedule = Schedule(steps, floor=0.05, warmup=steps // 8)
    optimizer = adamw([parameter_group(parameter, 1.5, units="reach", unit=0.02, schedule=schedule)])
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * schedule.factor(step)
        parameter.grad = torch.tensor([0.3, -7.0])
        optimizer.step()
    moved = parameter.detach() - torch.tensor([5.0, -3.0])
    torch.testing.assert_close(moved, torch.tensor([-0.03, 0.03]), rtol=1e-3, atol=0)


def test_absolute_rates_are_taken_as_they_are() -> None:
    parameter = nn.Parameter(torch.ones(2))
    group = parameter_group(
        parameter, 1e-4, units="absolute", unit=torch.tensor([0.1, 1.0]), schedule=Schedule(10, 0.0), max_step=1e-9
    )
    assert group == {"params": [parameter], "peak": 1e-4}


def test_a_short_run_takes_bounded_steps() -> None:
    """Eight updates cannot cover a reach of 1 in steps of at most 0.02; a thousand can, and are not held back."""

    def peak(steps: int, max_step: float | None) -> float:
        schedule = Schedule(steps, 0.0)
        group = parameter_group(
            nn.Parameter(torch.ones(1)), 1.0, units="reach", unit=0.5, schedule=schedule, max_step=max_step
        )
        return float(group["peak"])

    assert peak(8, 0.02) == pytest.approx(0.01)
    assert peak(1000, 0.02) == peak(1000, None) < 0.01


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_unit_of_a_scale_moves_the_outermost_level_by_one_step(bits: int) -> None:
    scale, outermost = torch.full((4, 2), 0.1), 2 ** (bits - 1)
    torch.testing.assert_close((scale + scale_unit(scale, bits)) * outermost, scale * (outermost + 1))


@pytest.mark.parametrize(("steps", "fraction", "expected"), [(32, 0.03, 1), (8, 0.1, 1), (100, 0.1, 10), (9, 0.0, 0)])
def test_warm_up_is_never_rounded_to_nothing(steps: int, fraction: float, expected: int) -> None:
    assert Schedule.of(steps, min_lr_factor=20.0, warmup=fraction).warmup == expected


def test_a_rate_of_zero_freezes() -> None:
    trained, frozen = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = adamw([{"params": [trained], "peak": 0.1}, {"params": [frozen], "peak": 0.0}])
    (trained.sum() + (frozen * 1).sum()).backward()
    optimizer.step()
    assert not frozen.requires_grad
    assert frozen.grad is None
    assert torch.equal(frozen.detach(), torch.ones(2))
    torch.testing.assert_close(trained.detach(), torch.full((2,), 0.9))


def test_weights_do_not_decay() -> None:
    parameter = nn.Parameter(torch.full((3,), 100.0))
    optimizer = adamw([{"params": [parameter], "peak": 0.1}])
    parameter.grad = torch.zeros(3)
    optimizer.step()
    assert torch.equal(parameter.detach(), torch.full((3,), 100.0))


def test_snapshots_are_copies_and_restore_in_place() -> None:
    parameters = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(3))]
    addresses = [p.data_ptr() for p in parameters]
    saved = snapshot(parameters)
    for parameter in parameters:
        parameter.data.add_(5)
    assert torch.equal(saved[0], torch.ones(2))
    restore(parameters, saved)
    assert [p.tolist() for p in parameters] == [[1, 1], [0, 0, 0]]
    assert [p.data_ptr() for p in parameters] == addresses, "an optimizer still trains the same tensors"
    parameters[0].data.add_(1)
    assert torch.equal(saved[0], torch.ones(2))
    with pytest.raises(ValueError, match="zip"):
        restore(parameters, saved[:1])


@pytest.mark.parametrize(
    ("amp", "device", "hardware", "expected"),
    [
        ("float32", "cuda", True, FP32),
        ("bfloat16", "cpu", False, BF16),
        ("float16", "cpu", False, torch.float16),
        ("auto", "cuda", True, BF16),
        ("auto", "cuda", False, FP32),
        ("auto", "cpu", True, BF16),
        ("auto", "cpu", False, FP32),
    ],
)
def test_compute_dtype(
    monkeypatch: pytest.MonkeyPatch, amp: str, device: str, hardware: bool, expected: torch.dtype
) -> None:
    """bf16 by itself only where the hardware multiplies it: emulated, it is slower than fp32."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *, including_emulation: hardware or including_emulation)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: hardware, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    monkeypatch.setattr(training, "device_name", lambda _: "AMD EPYC 9R14")
    assert compute_dtype(amp, torch.device(device)) == expected


@pytest.mark.parametrize(
    ("processor", "amx", "expected"),
    [("AMD EPYC 9R14", False, BF16), ("Intel(R) Xeon(R) Processor", False, FP32), ("INTEL(R) XEON(R)", True, BF16)],
)
def test_bf16_instructions_are_no_reason_alone(
    monkeypatch: pytest.MonkeyPatch, processor: str, amx: bool, expected: torch.dtype
) -> None:
    """Virtual machines may hide AMX; what Intel has beside it multiplies bf16 slower than fp32."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    monkeypatch.setattr(training, "device_name", lambda _: processor)
    assert compute_dtype("auto", torch.device("cpu")) == expected


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_autocast_computes_in_the_dtype(dtype: torch.dtype) -> None:
    with autocast(torch.device("cpu"), dtype):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
