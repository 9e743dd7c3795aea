"""Parts that both training stages share: learning-rate reach, the schedule, parameter groups, precision.

Reach. Adam moves a parameter by about its learning rate per step, so the sum of the learning rates over a run bounds
how far it can travel. Quantization only cares how far that is in step sizes: a weight must travel about half a step to
change its code. The published absolute rates give a Llama-2-7B weight a reach of about 1.5 steps at 2 bits and 4096
updates, and a SmolLM2 weight one of 0.01 steps at 128 updates, which is why the recipe collapses there. With
`lr_units: reach` the rates are stated as that total distance: in step sizes for weights, in step sizes by which the
outermost level of the grid moves for scales, as a fraction for norms, in integer steps for zero points. They hold for
any number of updates, magnitude of weights and bits: the same relative change of a scale does twice the harm with
every bit, because the grid reaches twice as many steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Schedule:
    """Cosine decay with linear warm-up; `factor(step)` multiplies the peak learning rate.

    `floor` is the final factor (0.05 for the paper's lr/20).
    """

    steps: int
    floor: float
    warmup: int = 0

    @classmethod
    def of(cls, steps: int, *, min_lr_factor: float | None, warmup: float = 0.0) -> Schedule:
        """The schedule of a recipe's section. `warmup` is a fraction of the steps; any fraction above 0 is a step."""
        return cls(steps, floor=1 / min_lr_factor if min_lr_factor else 0.0, warmup=math.ceil(warmup * steps))

    def factor(self, step: int) -> float:
        """Factor for update `step` in [0, steps)."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * progress))

    def total(self) -> float:
        """Sum of the factors: how far a rate of 1 reaches."""
        return sum(self.factor(step) for step in range(self.steps))


def peak_rate(rate: float, *, units: str, unit_size: float, schedule: Schedule, max_step: float | None = None) -> float:
    """The peak learning rate for a parameter whose natural step is `unit_size`; `max_step` bounds it, in such steps."""
    if units == "absolute":
        return rate
    steps = rate / schedule.total()
    return unit_size * (steps if max_step is None else min(steps, max_step))


def scale_unit(scale: Tensor, bits: int) -> float:
    """The change of a scale that moves the outermost level of its grid, 2^(bits-1) codes away, by one step size."""
    return float(scale.detach().abs().mean()) / 2 ** (bits - 1)


def adamw(groups: list[dict[str, object]]) -> torch.optim.AdamW:
    """AdamW as the paper uses it: betas (0.9, 0.999), no weight decay. Groups of rate 0 are left out and frozen."""
    active = []
    for group in groups:
        parameters: Iterable[nn.Parameter] = group["params"]  # type: ignore[assignment]
        for parameter in parameters:
            parameter.requires_grad_(group["peak"] != 0)
        if group["peak"] != 0:
            active.append({**group, "lr": group["peak"]})
    return torch.optim.AdamW(active, betas=(0.9, 0.999), weight_decay=0.0, fused=True)


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Autocast to a 16-bit compute dtype; nothing for fp32."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def compute_dtype(amp: str, device: torch.device) -> torch.dtype:
    """bf16 where the hardware has it, else fp32; or what the recipe says."""
    if amp != "auto":
        dtype: torch.dtype = getattr(torch, amp)
        return dtype
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    capability = torch.backends.cpu.get_cpu_capability()
    native = capability.startswith("AVX512") and _cpu_has_bf16()
    return torch.bfloat16 if native else torch.float32


def snapshot(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Copies of parameters, to restore the best iterate."""
    return [p.detach().clone() for p in parameters]


@torch.no_grad()
def restore(parameters: Iterable[Tensor], saved: list[Tensor]) -> None:
    """Put a snapshot back."""
    for parameter, value in zip(parameters, saved, strict=True):
        parameter.copy_(value)


def _cpu_has_bf16() -> bool:
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in checks)
