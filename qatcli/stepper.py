"""One optimizer step that survives what is not finite: loss scaling, skipping, backing off, the best iterate.

Both training stages step through here. A loss or gradient that is not finite puts the best iterate back and goes on
in fp32 at half the rate; after `TRIES` of these training stops at that iterate. In fp16 gradients overflow as a matter
of course while the loss scale finds its size; such a step is skipped and the scale halved, which is no failure.

Nothing here waits for a GPU. Whether an update is finite is decided where it is computed: the optimizer's kernel leaves
the parameters alone when it is not. The host reads that a step late, when it is long there, and backs off then; what
the step between has done is undone with the rest. On a CPU, where there is nothing to wait for, it reads at once.
"""

from __future__ import annotations

from collections import deque
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from qatcli.training import Schedule, adamw, autocast, restore, snapshot

TRIES = 3
LAG_ON_GPU = 1  # updates between making a verdict and reading it


class Stepper:
    """AdamW over parameter groups that carry their `peak` rate, and the best state of the parameters that train."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        schedule: Schedule,
        *,
        dtype: torch.dtype,
        device: torch.device,
        grad_clip: float | None,
        lag: int | None = None,
    ) -> None:
        self.optimizer = adamw(groups)
        self.parameters: list[Tensor] = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.schedule, self.grad_clip, self.device = schedule, grad_clip, device
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.backoffs = 0
        self.loss = float("nan")
        """That of the latest update that was read back."""
        self._lag = (0 if device.type == "cpu" else LAG_ON_GPU) if lag is None else lag
        self._unread: deque[tuple[Tensor, Any]] = deque()
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

    def finish(self, loss: Tensor) -> Tensor:
        """Clip and step, unless `loss` (a scalar) or a gradient is not finite; bool on the device: whether it did."""
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        largest = torch.nn.utils.get_total_norm(gradients, float("inf"))
        loss_finite = torch.isfinite(loss.detach())
        taken = loss_finite & torch.isfinite(largest)
        failed = ~taken
        if self.scaler.is_enabled():
            failed &= ~(loss_finite & (self.scaler.scale(torch.ones_like(largest)) > 1))
        if self.grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.grad_clip)
        self.optimizer.found_inf = (~taken).float()  # type: ignore[attr-defined]  # as GradScaler tells it
        self._step()
        self.scaler.update()
        self._unread.append(_to_host(torch.stack([failed.float(), loss.detach().float()])))
        self._read(self._lag)
        return taken

    def settle(self) -> None:
        """Read what was not read yet: the state is now that of the last update."""
        self._read(0)

    def offer(self, loss: float, *, always: bool = False) -> None:
        """Keep the present state if its `loss` is the lowest so far, or `always`."""
        if loss < self.best_loss or always:
            self.best_loss = loss
            restore(self.best, self.parameters)  # into the memory of the best one before

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

    @torch.no_grad()
    def _step(self) -> None:
        """One update of Adam; where elements have their `own` unit, the way each was moved is multiplied by it."""
        moved = [
            (p, p.clone(), group["own"])
            for group in self.optimizer.param_groups
            if "own" in group
            for p in group["params"]
        ]
        self.optimizer.step()
        for parameter, start, own in moved:
            parameter.copy_(torch.lerp(start, parameter, own))

    def _read(self, left: int) -> None:
        """Read verdicts until `left` are unread; the updates after a failure count no more, whatever became of them."""
        while len(self._unread) > left:
            verdict, arrived = self._unread.popleft()
            if arrived is not None:
                arrived.synchronize()
            failed, self.loss = verdict.tolist()
            if failed:
                self._unread.clear()
                self._back_off()

    def _back_off(self) -> None:
        self.backoffs += 1
        self.restore_best()
        self.optimizer.state.clear()
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=False)


def _to_host(values: Tensor) -> tuple[Tensor, Any]:
    """A copy in host memory, and the event after which it is there."""
    if values.device.type == "cpu":
        return values, None
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    return host, torch.cuda.current_stream(values.device).record_event()
