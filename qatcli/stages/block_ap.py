"""block-ap: train the weights, scales and zero points of one block at a time (EfficientQAT, arXiv 2407.11062, 3.2).

Reads:  calibration (token windows, initial grids) and the full-precision model, one block at a time.
Writes: a packed checkpoint with fp32 scales. One file per finished block, which is all that an interrupted run keeps:
        the activations are recomputed by one forward sweep, exactly as they were.
Targets are the full-precision block's outputs on full-precision inputs; the student receives the outputs of the
blocks already quantized. With `lookahead` the full-precision model is one block ahead: what the next block makes of the
student's output counts as well.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qatcli.activations import StreamBudget, advance_stream, check_range, fill_streams, stream_budget
from qatcli.attention import use_tiled_attention
from qatcli.blockfiles import (
    block_events,
    block_file,
    block_quants,
    finish,
    finished_blocks,
    load_quantized_block,
    read_linear,
    save_block,
)
from qatcli.blocktrain import (
    BlockResult,
    Error,
    Objective,
    Windows,
    build_student,
    export_students,
    input_hessians,
    output_error,
    train_block,
)
from qatcli.data import load_windows
from qatcli.errors import DivergedError, InputError
from qatcli.grid import in_range
from qatcli.models.blocks import BlockModel, open_blocks
from qatcli.models.readers import readers_behind, stream_readers
from qatcli.moments import input_moments, weight_errors
from qatcli.packed import ModuleQuant, PackedCheckpoint
from qatcli.progress import Bar
from qatcli.shards import load_tensors
from qatcli.stages import Job, open_model
from qatcli.training import compute_dtype


@dataclass(frozen=True)
class _Block:
    """A full-precision block, its arguments, the mean square of what each of its linears receives, and how the error
    of its output is measured."""

    module: torch.nn.Module
    arguments: dict[str, Any]
    moments: dict[str, Tensor]
    error: Error

    @property
    def runs(self) -> tuple[torch.nn.Module, dict[str, Any]]:
        return self.module, self.arguments


def run(job: Job) -> dict[str, Any]:
    """Train and save every block that is not there yet."""
    recipe, config, log = job.recipe, job.recipe.block_ap, job.log
    model = open_blocks(open_model(job))
    use_tiled_attention(model.skeleton, job.device)
    _check_grids(job, model)
    dtype = compute_dtype(config.amp, job.device)
    tokens, held_out_tokens = (windows.tokens for windows in load_windows(job.input.path))
    budget = stream_budget(job.device, config.cache, job.out)
    train = _open_streams(job, model, "train", tokens, budget, dtype)
    held_out = _open_streams(job, model, "validation", held_out_tokens, budget, dtype)
    arguments = model.block_arguments(tokens.shape[1], job.device, torch.float32)
    errors = _errors(job, model)
    kept = finished_blocks(job.out)

    def full_precision(index: int, *, ahead: bool = False) -> _Block:
        """Load a block and run it on its inputs: the targets become its outputs, or those of the next with `ahead`."""
        block = model.load_block(index, job.device, torch.float32).requires_grad_(False)
        with input_moments(block, model.block_name(index)) as moments:
            for streams in (train, held_out):
                into = streams.following if ahead else streams.targets
                assert into is not None
                advance_stream(
                    streams.targets,
                    block,
                    arguments[index],
                    batch_size=config.batch_size,
                    device=job.device,
                    into=into,
                )
                check_range(into, model.block_name(index))
        return _Block(block, arguments[index], moments, errors[index])

    with log.progress("block-ap", len(model)) as bar:
        block = full_precision(0)
        for index in range(len(model)):
            last = index + 1 == len(model)
            following = full_precision(index + 1, ahead=True) if config.lookahead and not last else None
            quants = block_quants(model, index, recipe.quant)
            if index not in kept:
                seen, unseen = (
                    replace(each, following=each.following if following else None) for each in (train, held_out)
                )
                result = _train(job, model, index, block, following, quants, seen, unseen, bar)
                detail = f"loss {result['before']:.4g} -> {result['after']:.4g}"
            else:
                detail = "kept from the interrupted run"
            # Through the saved file, so that a resumed run sees the very same numbers.
            quantized = load_quantized_block(job.out, model, index, quants, job.device)
            for streams in (train, held_out):
                advance_stream(
                    streams.inputs, quantized, arguments[index], batch_size=config.batch_size, device=job.device
                )
            del quantized  # the next block trains without it
            if following is not None:
                train, held_out = train.of_next_block(), held_out.of_next_block()
                block = following
            elif not last:
                block = full_precision(index + 1)
            bar.advance(detail=detail, reused=index in kept)
    del block, following  # embeddings and head, which are read now, may be larger than they are
    finish(job.out, model, recipe.quant)
    return _metrics(job)


def _errors(job: Job, model: BlockModel) -> list[Error]:
    """How the error of each block's output is measured; the whole model is read only for the loss that asks it."""
    kind = job.recipe.block_ap.loss
    readers = [torch.empty(0, model.hidden_size, device=job.device)] * (len(model) + 1)
    if kind == "downstream":
        with job.log.progress("block-ap: what reads the hidden states", len(model)) as bar:
            readers = stream_readers(model, job.device, progress=bar.advance)
    return [output_error(kind, behind) for behind in readers_behind(readers)]


def _check_grids(job: Job, model: BlockModel) -> None:
    """InputError when the calibration, which may come from another recipe with --from, has other bits or groups."""
    found = PackedCheckpoint.open(job.input.path).modules
    for index in range(len(model)):
        quants = block_quants(model, index, job.recipe.quant)
        for name in model.linears(index):
            if found.get(name) != quants.get(name):
                made, wanted = (_grid_in_words(modules.get(name)) for modules in (found, quants))
                raise InputError(
                    f"{job.input.path} has {name} at {made}, the recipe at {wanted}",
                    hint="run `qat calibrate` with this recipe, or put its quant section back",
                )


def _grid_in_words(quant: ModuleQuant | None) -> str:
    return "full precision" if quant is None else f"{quant.bits} bits in groups of {quant.group_size}"


def _train(
    job: Job,
    model: BlockModel,
    index: int,
    block: _Block,
    following: _Block | None,
    quants: dict[str, ModuleQuant],
    train: Windows,
    held_out: Windows,
    bar: Bar,
) -> dict[str, Any]:
    """Train and save block `index`; the event that log.jsonl keeps about it."""
    recipe, config = job.recipe, job.recipe.block_ap
    started = time.monotonic()
    prefix = model.block_name(index)
    initial = load_tensors(block_file(job.input.path, index))
    grids = {}
    for name, quant in quants.items():
        _, scale, zero_point = read_linear(initial, name, quant)
        if not in_range(zero_point, recipe.quant.zero_points, quant.bits):
            raise InputError(
                f"{job.input.path} has zero points of {name} that the recipe's quant.zero_points excludes",
                hint="run `qat calibrate` with this recipe, or put its quant section back",
            )
        grids[name] = (scale.to(job.device), zero_point.float().to(job.device))
    hessians = None
    if config.rounding == "gptq":
        sample = train.inputs[: recipe.calibrate.moment_samples]
        hessians = input_hessians(block.module, prefix, list(quants), sample, block.arguments, job.device)
    students = build_student(
        block.module, prefix, quants, grids, zero_points=recipe.quant.zero_points, hessians=hessians
    )
    del hessians  # as large as the block, which is trained now
    errors = [each.error for each in (block, following) if each is not None]
    result: BlockResult = train_block(
        Objective(block.module, block.arguments, errors, None if following is None else following.runs),
        students,
        train,
        held_out,
        config,
        zero_points=recipe.quant.zero_points,
        generator=torch.Generator().manual_seed(recipe.calibrate.seed * 1_000_003 + index),
        device=job.device,
        progress=bar.note,
    )
    if not math.isfinite(result.after):
        raise DivergedError(
            f"block {index} has no finite loss on the held-out windows, before training or after",
            hint="set block_ap.amp to bfloat16, or to float32 where the device has no bfloat16",
        )
    trained = export_students(students)
    # Against the weights as they were: those of the block are the trained ones now.
    rounding_errors = weight_errors(model.load_block(index, job.device, torch.float32), prefix, trained, block.moments)
    seconds = round(time.monotonic() - started, 3)
    event = {**asdict(result), "relative_error": rounding_errors, "seconds": seconds}
    save_block(job.out, index, block.module, trained, prefix=f"{prefix}.", log=job.log, event=event)
    if result.backoffs:
        job.log.warn(f"block {index}: non-finite loss or gradient {result.backoffs} times; best iterate kept")
    return event


def _open_streams(
    job: Job, model: BlockModel, name: str, windows: Tensor, budget: StreamBudget, dtype: torch.dtype
) -> Windows:
    shape = (*windows.shape, model.hidden_size)
    target = budget.allocate(f"{name}-target", shape, dtype)
    student = budget.allocate(f"{name}-student", shape, dtype)
    ahead = job.recipe.block_ap.lookahead and len(model) > 1
    following = budget.allocate(f"{name}-following", shape, dtype) if ahead else None
    fill_streams([target, student], model, windows, job.device, dtype)
    return Windows(student, target, following)


def _metrics(job: Job) -> dict[str, Any]:
    """Summary of all blocks, those of earlier interrupted runs included, from the log."""
    rows = [event for _, event in sorted(block_events(job.out).items())]
    before = [row["before"] for row in rows if row["before"] is not None]  # null where it was not finite
    return {
        "blocks": [
            {key: row[key] for key in ("index", "before", "after", "epochs", "backoffs", "seconds")} for row in rows
        ],
        "loss_before": sum(before) / len(before) if before else None,
        "loss_after": sum(row["after"] for row in rows) / len(rows),
    }
