"""Parts that both training stages share: learning-rate reach, the schedule, parameter groups, precision.

Reach. Adam moves a parameter by about its learning rate per step, so the sum of the learning rates over a run bounds
how far it can travel. Quantization only cares how far that is in step sizes: a weight must travel about half a step to
change its code. The published absolute rates give a Llama-2-7B weight a reach of about 1.7 steps at 2 bits and 4096
updates, and a SmolLM2 weight one of 0.013 steps at 128 updates, which is why the recipe collapses there. With
`lr_units: reach` the rates are stated as that total distance: in step sizes for weights, in step sizes by which the
outermost level of the grid moves for scales, as a fraction for norms, in integer steps for zero points. They hold for
any number of updates, magnitude of weights and bits: the same relative change of a scale does twice the harm with
every bit, because the grid reaches twice as many steps. Weights go in mean step sizes of their linear: in those of its
groups two of three trials did worse (LOG.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qatcli.machine import device_name


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


def parameter_group(
    parameter: nn.Parameter,
    rate: float,
    *,
    units: str,
    unit: Tensor | float,
    schedule: Schedule,
    max_step: float | None = None,
) -> dict[str, Any]:
    """One group of the optimizer: `params`, `peak` rate, and `own`, how the natural steps of its elements differ.

    unit: the natural step of the parameter, or of each of its elements, a tensor of its shape. `own` is the ratio of
    these to their mean, with which the `Stepper` multiplies every update. `max_step` bounds the peak, in such steps.
    A schedule without steps trains nothing: the peak is 0.
    """
    if schedule.steps == 0:
        return {"params": [parameter], "peak": 0.0}
    if units == "absolute":
        return {"params": [parameter], "peak": rate}
    steps = rate / schedule.total()
    steps = steps if max_step is None else min(steps, max_step)
    if not isinstance(unit, Tensor):
        return {"params": [parameter], "peak": unit * steps}
    mean = unit.mean().clamp_min(torch.finfo(unit.dtype).tiny)
    return {"params": [parameter], "peak": float(mean) * steps, "own": unit / mean}


def scale_unit(scale: Tensor, bits: int) -> Tensor:
    """The change of each scale [N, G] that moves the outermost level of its grid, 2^(bits-1) codes off, by one step."""
    return scale.detach().abs() / 2 ** (bits - 1)


def adamw(groups: list[dict[str, Any]]) -> torch.optim.AdamW:
    """AdamW as the paper uses it: betas (0.9, 0.999), no weight decay. Groups of rate 0 are left out and frozen."""
    active = []
    for group in groups:
        for parameter in group["params"]:
            parameter.requires_grad_(group["peak"] != 0)
        if group["peak"] != 0:
            active.append({**group, "lr": group["peak"]})
    return torch.optim.AdamW(active, betas=(0.9, 0.999), weight_decay=0.0, fused=True)


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Autocast to a 16-bit compute dtype; nothing for fp32."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def active_dtype(x: Tensor) -> torch.dtype:
    """The compute dtype of an enclosing autocast, else that of `x`."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def compute_dtype(amp: str, device: torch.device) -> torch.dtype:
    """bf16 where the hardware multiplies it faster, else fp32; or what the recipe says."""
    if amp != "auto":
        dtype: torch.dtype = getattr(torch, amp)
        return dtype
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    capability = torch.backends.cpu.get_cpu_capability()
    faster = capability.startswith("AVX512") and _cpu_is_faster_in_bf16()
    return torch.bfloat16 if faster else torch.float32


def snapshot(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Copies of parameters, to restore the best iterate."""
    return [p.detach().clone() for p in parameters]


@torch.no_grad()
def restore(tensors: Iterable[Tensor], saved: Iterable[Tensor]) -> None:
    """Put a snapshot back, or the values of parameters into a snapshot."""
    for tensor, value in zip(tensors, saved, strict=True):
        tensor.copy_(value)


def _cpu_is_faster_in_bf16() -> bool:
    """With AMX, or AVX-512's dot products but for Intel's, which have 0.6 of fp32's rate (LOG.md)."""
    amx, avx512 = (
        getattr(torch.cpu, name, lambda: False)() for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    )
    return amx or (avx512 and "intel" not in device_name(torch.device("cpu")).casefold())
