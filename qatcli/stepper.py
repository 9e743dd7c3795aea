"""One optimizer step that survives what is not finite: loss scaling, skipping, backing off, the best iterate.

Both training stages step through here. A loss or gradient that is not finite puts the best iterate back and goes on
in fp32 at half the rate; after `TRIES` of these training stops at that iterate. In fp16 gradients overflow as a matter
of course while the loss scale finds its size; such a step is skipped and the scale halved, which is no failure.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from qatcli.training import Schedule, adamw, autocast, gradients_finite, restore, snapshot

TRIES = 3


class Stepper:
    """AdamW over parameter groups that carry their `peak` rate, and the best state of the parameters that train."""

    def __init__(
        self,
        groups: list[dict[str, object]],
        schedule: Schedule,
        *,
        dtype: torch.dtype,
        device: torch.device,
        grad_clip: float | None,
    ) -> None:
        self.optimizer = adamw(groups)
        self.parameters: list[Tensor] = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.schedule, self.grad_clip, self.device = schedule, grad_clip, device
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.backoffs = 0
        self.best, self.best_loss = snapshot(self.parameters), float("inf")
        self._dtype = dtype

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype: what was asked for until something was not finite, then fp32."""
        return torch.float32 if self.backoffs else self._dtype

    @property
    def exhausted(self) -> bool:
        """Whether training must stop."""
        return self.backoffs >= TRIES

    def autocast(self) -> AbstractContextManager[object]:
        """The compute dtype as a context."""
        return autocast(self.device, self.dtype)

    def begin(self, step: int) -> None:
        """Rates of update `step`, no gradients."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * self.schedule.factor(step) / 2**self.backoffs
        self.optimizer.zero_grad(set_to_none=True)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`."""
        self.scaler.scale(loss).backward()

    def finish(self, *, loss_finite: bool) -> bool:
        """Clip and step; False when the update was left out."""
        self.scaler.unscale_(self.optimizer)
        gradients = loss_finite and gradients_finite(self.parameters)
        if gradients:
            if self.grad_clip is not None:
                torch.nn.utils.clip_grad_norm_(self.parameters, self.grad_clip)
            self.scaler.step(self.optimizer)
        elif not (loss_finite and self.scaler.is_enabled() and self.scaler.get_scale() > 1):
            self._back_off()
            return False
        self.scaler.update()
        return gradients

    def offer(self, loss: float, *, always: bool = False) -> None:
        """Keep the present state if its `loss` is the lowest so far, or `always`."""
        if loss < self.best_loss or always:
            self.best_loss, self.best = loss, snapshot(self.parameters)

    def restore_best(self) -> None:
        """Put the best state back."""
        restore(self.parameters, self.best)

    def resume(self, best: list[Tensor], best_loss: float, *, backoffs: int, scaler: list[float] | None) -> None:
        """The state of an interrupted run; `scaler` is its loss scale and the steps since that grew."""
        self.best, self.best_loss, self.backoffs = best, best_loss, backoffs
        if scaler is None:
            self.scaler = torch.amp.GradScaler(self.device.type, enabled=False)
        else:
            state = self.scaler.state_dict()
            self.scaler.load_state_dict({**state, "scale": scaler[0], "_growth_tracker": int(scaler[1])})

    def _back_off(self) -> None:
        self.backoffs += 1
        self.restore_best()
        self.optimizer.state.clear()
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=False)
