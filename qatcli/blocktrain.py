"""Training one block: the student's start, the loss, the loop, the best iterate (EfficientQAT section 3.2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qatcli.gptq import error_feedback
from qatcli.linear import FakeQuantLinear, replace_modules
from qatcli.models.blocks import run_block
from qatcli.packed import ModuleQuant, QuantizedLinear
from qatcli.recipe.schema import BlockApSection
from qatcli.training import Schedule, adamw, autocast, gradients_finite, peak_rate, restore, set_rates, snapshot

TRIES = 3  # restarts from the best iterate at half the rate, before a block is left at that iterate


@dataclass(frozen=True)
class Windows:
    """What a block trains on: `inputs` it receives and `targets` of the full-precision block, both [S, T, H]."""

    inputs: Tensor
    targets: Tensor


@dataclass
class BlockResult:
    """Losses on held-out windows before and after, the mean training loss of each epoch, and what went wrong."""

    before: float
    after: float = float("nan")
    epochs: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    backoffs: int = 0


Grid = tuple[Tensor, Tensor]  # scale, zero point


def build_student(
    block: nn.Module,
    prefix: str,
    quants: dict[str, ModuleQuant],
    grids: dict[str, Grid],
    *,
    symmetric: bool,
    hessians: dict[str, Tensor] | None,
) -> dict[str, FakeQuantLinear]:
    """Replace the block's linears by fake-quantized ones; returns them by full name.

    With `hessians` the weights start at GPTQ's compensated values and grids, else at the weights and given grids.
    """
    students: dict[str, FakeQuantLinear] = {}

    def student(name: str, linear: nn.Linear) -> nn.Module:
        full = f"{prefix}.{name}"
        quant = quants[full]
        weight, bias = linear.weight.detach().float(), linear.bias
        scale, zero_point = grids[full]
        if hessians is not None:
            weight, scale, zero_point = error_feedback(
                weight, hessians[full], bits=quant.bits, group_size=quant.group_size, symmetric=symmetric
            )
        students[full] = FakeQuantLinear(
            weight.clone(), bias, scale.float(), zero_point.float(), bits=quant.bits, group_size=quant.group_size
        ).to(weight.device)
        return students[full]

    replace_modules(block, [name.removeprefix(prefix + ".") for name in quants], student)
    return students


@torch.no_grad()
def input_hessians(
    block: nn.Module, prefix: str, names: list[str], inputs: Tensor, arguments: dict[str, Any], device: torch.device
) -> dict[str, Tensor]:
    """Per linear, the sum of x x^T [K, K] over the tokens of `inputs` [S, T, H], run window by window."""
    sums: dict[str, Tensor] = {}
    # q, k and v receive the same tensor: its product is computed once. The tensor is kept so that its id stays its own.
    shared: dict[int, tuple[Tensor, Tensor]] = {}

    def collect(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            if id(x) not in shared:
                rows = x.reshape(-1, x.shape[-1]).float()
                with torch.autocast(device.type, enabled=False):
                    shared[id(x)] = (x, rows.T @ rows)
            product = shared[id(x)][1]
            sums[name] = sums[name] + product if name in sums else product

        return hook

    handles = [
        block.get_submodule(name.removeprefix(prefix + ".")).register_forward_pre_hook(collect(name)) for name in names
    ]
    try:
        for window in inputs:
            with autocast(device, inputs.dtype):
                run_block(block, window[None].to(device), arguments)
            shared.clear()
    finally:
        for handle in handles:
            handle.remove()
    return sums


def block_loss(output: Tensor, target: Tensor, kind: str) -> Tensor:
    """Mean squared error over all elements, or (`relative`) each token's error over that token's energy.

    The relative form is what the next block sees through its norm. A few tokens carry massive activations that hold
    98 % of a hidden state's energy in some models; under a plain mean nothing else is seen.
    """
    target = target.float()
    error = (output.float() - target).square().mean(-1)
    if kind == "relative":
        error = error / target.square().mean(-1).clamp_min(1e-12)
    return error.mean()


@torch.no_grad()
def validation_loss(
    block: nn.Module, windows: Windows, arguments: dict[str, Any], kind: str, batch_size: int, device: torch.device
) -> float:
    """Mean loss over held-out windows."""
    total = 0.0
    for start in range(0, len(windows.inputs), batch_size):
        inputs = windows.inputs[start : start + batch_size].to(device)
        with autocast(device, inputs.dtype):
            output = run_block(block, inputs, arguments)
        target = windows.targets[start : start + batch_size].to(device)
        total += float(block_loss(output, target, kind)) * len(inputs)
    return total / len(windows.inputs)


def train_block(
    block: nn.Module,
    students: dict[str, FakeQuantLinear],
    train: Windows,
    held_out: Windows,
    arguments: dict[str, Any],
    config: BlockApSection,
    *,
    symmetric: bool,
    generator: torch.Generator,
    device: torch.device,
) -> BlockResult:
    """Train the block in place; with `keep_best` it ends at its best validation loss, the start included.

    A non-finite loss or gradient puts the best iterate back and goes on at half the rate; after `TRIES` of these the
    block stays at that iterate.
    """
    if config.epochs == 0:
        measured = validation_loss(block, held_out, arguments, config.loss, config.batch_size, device)
        return BlockResult(before=measured, after=measured)
    steps_per_epoch = -(-len(train.inputs) // config.batch_size)
    schedule = Schedule(
        config.epochs * steps_per_epoch, floor=1 / config.min_lr_factor if config.min_lr_factor else 0.0
    )
    optimizer = adamw(_parameter_groups(block, students, config, schedule, symmetric=symmetric))
    trained = [p for group in optimizer.param_groups for p in group["params"]]

    def validate() -> float:
        return validation_loss(block, held_out, arguments, config.loss, config.batch_size, device)

    result = BlockResult(before=validate())
    best_loss, best = result.before, snapshot(trained)
    step = 0
    for _ in range(config.epochs):
        total = torch.zeros((), device=device)
        for batch in _batches(len(train.inputs), config.batch_size, config.shuffle, generator):
            set_rates(optimizer, schedule, step)
            step += 1
            with autocast(device, train.inputs.dtype):
                output = run_block(block, train.inputs[batch].to(device), arguments)
            loss = block_loss(output, train.targets[batch].to(device), config.loss)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if not (bool(torch.isfinite(loss)) and gradients_finite(trained)):
                result.backoffs += 1
                restore(trained, best)
                if result.backoffs >= TRIES:
                    result.after = best_loss
                    return result
                for group in optimizer.param_groups:
                    group["peak"] /= 2
                optimizer.state.clear()
                continue
            if config.grad_clip is not None:
                torch.nn.utils.clip_grad_norm_(trained, config.grad_clip)
            optimizer.step()
            total += loss.detach()
        result.epochs.append(float(total) / steps_per_epoch)
        result.validation.append(validate())
        if result.validation[-1] < best_loss:
            best_loss, best = result.validation[-1], snapshot(trained)
    result.after = result.validation[-1] if result.validation else result.before
    if config.keep_best or not result.after < float("inf"):
        restore(trained, best)
        result.after = best_loss
    return result


def export_students(students: dict[str, FakeQuantLinear]) -> dict[str, QuantizedLinear]:
    """The canonical form of every trained linear."""
    return {name: student.export() for name, student in students.items()}


def _batches(count: int, size: int, shuffle: bool, generator: torch.Generator) -> tuple[Tensor, ...]:
    order = torch.randperm(count, generator=generator) if shuffle else torch.arange(count)
    return order.split(size)


def _parameter_groups(
    block: nn.Module,
    students: dict[str, FakeQuantLinear],
    config: BlockApSection,
    schedule: Schedule,
    *,
    symmetric: bool,
) -> list[dict[str, object]]:
    def group(parameter: nn.Parameter, rate: float, unit_size: float) -> dict[str, object]:
        peak = peak_rate(rate, units=config.lr_units, unit_size=unit_size, schedule=schedule)
        return {"params": [parameter], "peak": peak}

    groups = []
    for student in students.values():
        step_size = float(student.scale.detach().mean())
        groups.append(group(student.weight, config.lr_weights, step_size))
        groups.append(group(student.scale, config.lr_scales, step_size))
        groups.append(group(student.zero_point, 0.0 if symmetric else config.lr_zero_points, 1.0))
    inside = {id(p) for student in students.values() for p in student.parameters()}
    for name, parameter in block.named_parameters():
        if id(parameter) not in inside:
            # As the reference: every parameter called "weight" trains (the norms), biases do not.
            rate = config.lr_norms if name.endswith("weight") else 0.0
            groups.append(group(parameter, rate, float(parameter.detach().abs().mean())))
    return groups
