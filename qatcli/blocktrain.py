"""Training one block: the student's start, the loss, the loop, the best iterate (EfficientQAT section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qatcli.activations import in_order, read_batches
from qatcli.gptq import error_feedback
from qatcli.grid import ZeroPoints
from qatcli.linear import FakeQuantLinear, replace_modules
from qatcli.losses import downstream_error, relative_error, squared_error
from qatcli.models.blocks import run_block
from qatcli.moments import watched_inputs
from qatcli.packed import ModuleQuant, QuantizedLinear
from qatcli.recipe.schema import BlockApSection
from qatcli.stepper import Stepper
from qatcli.training import Schedule, autocast, parameter_group, scale_unit


@dataclass(frozen=True)
class Windows:
    """What a block trains on, all [S, T, H]: `inputs` it receives, `targets` of the full-precision block, and
    `following`, what the next full-precision block makes of these, if training looks so far ahead."""

    inputs: Tensor
    targets: Tensor
    following: Tensor | None = None

    @property
    def streams(self) -> tuple[Tensor, ...]:
        """Those that are there, in this order."""
        found = (self.inputs, self.targets)
        return found if self.following is None else (*found, self.following)

    def of_next_block(self) -> Windows:
        """What the next block is to give, in the place of what this one was: `following` is yet to be computed."""
        assert self.following is not None
        return Windows(self.inputs, self.following, self.targets)


@dataclass
class BlockResult:
    """Losses on held-out windows before and after, the mean training loss of each epoch, and what went wrong."""

    before: float
    after: float = float("nan")
    epochs: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    backoffs: int = 0


Grid = tuple[Tensor, Tensor]  # scale, zero point
KINDS_OF_BLOCKS = 256  # with each size of batch; torch compiles 8 by itself and runs the others uncompiled


def build_student(
    block: nn.Module,
    prefix: str,
    quants: dict[str, ModuleQuant],
    grids: dict[str, Grid],
    *,
    zero_points: ZeroPoints,
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
                weight, hessians[full], bits=quant.bits, group_size=quant.group_size, zero_points=zero_points
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

    def collect(name: str, x: Tensor) -> None:
        if id(x) not in shared:
            rows = x.reshape(-1, x.shape[-1]).float()
            with torch.autocast(device.type, enabled=False):
                shared[id(x)] = (x, rows.T @ rows)
        product = shared[id(x)][1]
        sums[name] = sums[name] + product if name in sums else product

    with watched_inputs({name: block.get_submodule(name.removeprefix(prefix + ".")) for name in names}, collect):
        for (window,) in read_batches([inputs], in_order(len(inputs), 1), device):
            with autocast(device, inputs.dtype):
                run_block(block, window, arguments)
            shared.clear()
    return sums


Error = Callable[[Tensor, Tensor], Tensor]  # of an output against its target, each [B, T, H]; per token, [B, T]


def output_error(kind: str, readers: Tensor) -> Error:
    """How `block_ap.loss` measures the error of a hidden state; `readers` [R, H] are what reads it."""
    errors: dict[str, Error] = {
        "downstream": partial(downstream_error, readers=readers),
        "relative": relative_error,
        "mse": squared_error,
    }
    return errors[kind]


@dataclass(frozen=True)
class Objective:
    """What a block is trained for: the error of its output, and, if the next block is given, the mean of it and of the
    error after that block in full precision, which is what the rest of the model makes of the first one."""

    block: nn.Module
    arguments: dict[str, Any]
    errors: Sequence[Error]  # of the block's output, of that after the next block
    following: tuple[nn.Module, dict[str, Any]] | None = None  # and its arguments

    def __call__(self, inputs: Tensor, targets: Sequence[Tensor], *, run: Callable[..., Tensor] = run_block) -> Tensor:
        """The loss, a scalar, of a batch [B, T, H]; `targets` are the batch of `Windows.streams` without the inputs."""
        output = run(self.block, inputs, self.arguments)
        loss = self.errors[0](output, targets[0]).mean()
        if self.following is None:
            return loss
        block, arguments = self.following
        return (loss + self.errors[1](run(block, output, arguments), targets[1]).mean()) / 2


@torch.no_grad()
def validation_loss(objective: Objective, windows: Windows, batch_size: int, device: torch.device) -> float:
    """Mean loss over held-out windows."""
    losses = []
    batches = in_order(len(windows.inputs), batch_size)
    for inputs, *targets in read_batches(windows.streams, batches, device):
        with autocast(device, inputs.dtype):
            losses.append(objective(inputs, targets))
    counts = [len(rows) for rows in batches]
    return sum(loss * count for loss, count in zip(torch.stack(losses).tolist(), counts, strict=True)) / sum(counts)


def train_block(
    objective: Objective,
    students: dict[str, FakeQuantLinear],
    train: Windows,
    held_out: Windows,
    config: BlockApSection,
    *,
    zero_points: ZeroPoints,
    generator: torch.Generator,
    device: torch.device,
    progress: Callable[..., None] = lambda *_, **__: None,
) -> BlockResult:
    """Train the objective's block in place; with `keep_best` it ends at its best validation loss, the start included.

    A non-finite loss or gradient puts the best iterate back, see `Stepper`; a block that keeps failing stays at it.
    Without epochs, or without a parameter whose rate is not zero, it is only measured.
    """

    def validate() -> float:
        return validation_loss(objective, held_out, config.batch_size, device)

    result = BlockResult(before=validate())
    steps_per_epoch = -(-len(train.inputs) // config.batch_size)
    schedule = Schedule.of(config.epochs * steps_per_epoch, min_lr_factor=config.min_lr_factor)
    groups = _parameter_groups(objective.block, students, config, schedule, zero_points=zero_points)
    if not any(group["peak"] for group in groups):
        result.after = result.before
        return result
    run = _compiled(device, config.compile)
    stepper = Stepper(groups, schedule, dtype=train.inputs.dtype, device=device, grad_clip=config.grad_clip)
    stepper.offer(result.before)
    step = 0
    for _ in range(config.epochs):
        total = torch.zeros((), device=device)
        batches = _batches(len(train.inputs), config.batch_size, config.shuffle, generator)
        for inputs, *targets in read_batches(train.streams, batches, device):
            stepper.begin(step)
            step += 1
            with stepper.autocast():
                loss = objective(inputs.to(stepper.dtype), targets, run=run)
            stepper.backward(loss)
            total += torch.where(stepper.finish(loss), loss.detach(), 0)
            rate, tokens = stepper.optimizer.param_groups[0]["lr"], inputs[..., 0].numel()
            # On a GPU the loss of the first update is read during the second.
            detail = "" if step == 1 and math.isnan(stepper.loss) else f"loss {stepper.loss:.4g}"
            progress(detail, part=step / schedule.steps, lr=rate, tokens=tokens)
            if stepper.exhausted:
                break
        stepper.settle()
        result.backoffs = stepper.backoffs
        if stepper.exhausted:
            result.after = stepper.best_loss
            return result
        result.epochs.append(float(total) / steps_per_epoch)
        result.validation.append(validate())
        stepper.offer(result.validation[-1])
    result.after = result.validation[-1]
    if config.keep_best or not result.after < float("inf"):
        stepper.restore_best()
        result.after = stepper.best_loss
    return result


def export_students(students: dict[str, FakeQuantLinear]) -> dict[str, QuantizedLinear]:
    """The canonical form of every trained linear."""
    return {name: student.export() for name, student in students.items()}


def _compiled(device: torch.device, choice: bool | None) -> Callable[..., Tensor]:
    """`run_block`, compiled where the recipe says so. Not on a CPU by itself: a step of SmolLM2 took 10 % longer."""
    if not (device.type == "cuda" if choice is None else choice):
        return run_block
    # A resumed run meets other blocks and batches first and has to get the same kernels: so no shape may become
    # dynamic, and no kind of block (bits, group sizes, attention) may come too late to be compiled.
    torch._dynamo.config.recompile_limit = max(KINDS_OF_BLOCKS, torch._dynamo.config.recompile_limit)
    return torch.compile(run_block, dynamic=False)


def _batches(count: int, size: int, shuffle: bool, generator: torch.Generator) -> tuple[Tensor, ...]:
    order = torch.randperm(count, generator=generator) if shuffle else torch.arange(count)
    return order.split(size)


def _parameter_groups(
    block: nn.Module,
    students: dict[str, FakeQuantLinear],
    config: BlockApSection,
    schedule: Schedule,
    *,
    zero_points: ZeroPoints,
) -> list[dict[str, Any]]:
    def group(parameter: nn.Parameter, rate: float, unit: float) -> dict[str, Any]:
        return parameter_group(parameter, rate, units=config.lr_units, unit=unit, schedule=schedule)

    groups = []
    for student in students.values():
        groups.append(group(student.weight, config.lr_weights, float(student.scale.detach().mean())))
        groups.append(group(student.scale, config.lr_scales, float(scale_unit(student.scale, student.bits).mean())))
        groups.append(group(student.zero_point, config.lr_zero_points if zero_points == "any" else 0.0, 1.0))
    inside = {id(p) for student in students.values() for p in student.parameters()}
    for name, parameter in block.named_parameters():
        if id(parameter) not in inside:
            # As the reference: norms train, biases do not. A linear that `quant.skip` names stays as it is.
            rate = config.lr_norms if name.endswith("weight") and parameter.ndim == 1 else 0.0
            groups.append(group(parameter, rate, float(parameter.detach().abs().mean())))
    return groups
