"""block-ap: train the weights, scales and zero points of one block at a time (EfficientQAT, arXiv 2407.11062, 3.2).

Reads:  calibration (token windows, initial grids) and the full-precision model, one block at a time.
Writes: a packed checkpoint with fp32 scales. One file per finished block, which is all that an interrupted run keeps:
        the activations are recomputed by one forward sweep, exactly as they were.
Targets are the full-precision block's outputs on full-precision inputs; the student receives the outputs of the
blocks already quantized.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qatcli.activations import StreamBudget, advance_stream, fill_stream, stream_budget
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
from qatcli.blocktrain import BlockResult, Windows, build_student, export_students, input_hessians, train_block
from qatcli.data import load_windows
from qatcli.errors import DivergedError
from qatcli.models.blocks import BlockModel, open_blocks
from qatcli.moments import input_moments, weight_errors
from qatcli.packed import ModuleQuant
from qatcli.progress import Bar
from qatcli.shards import load_tensors
from qatcli.stages import Job, open_model
from qatcli.training import compute_dtype


@dataclass(frozen=True)
class _Streams:
    """Hidden states [S, T, H] before the current block: full precision, and as the quantized model computes them."""

    target: Tensor
    student: Tensor


def run(job: Job) -> dict[str, Any]:
    """Train and save every block that is not there yet."""
    recipe, config, log = job.recipe, job.recipe.block_ap, job.log
    model = open_blocks(open_model(job))
    dtype = compute_dtype(config.amp, job.device)
    windows, held_out_windows = load_windows(job.input.path)
    cache = config.cache
    budget = stream_budget(job.device, Path(cache.dir or job.out), device_gb=cache.device_gb, host_gb=cache.host_gb)
    train = _open_streams(job, model, "train", windows.tokens, budget, dtype)
    held_out = _open_streams(job, model, "validation", held_out_windows.tokens, budget, dtype)
    arguments = model.block_arguments(windows.tokens.shape[1], job.device, torch.float32)
    kept = finished_blocks(job.out)

    with log.progress("block-ap", len(model)) as bar:
        for index in range(len(model)):
            quants = block_quants(model, index, recipe.quant)
            # The full-precision stream moves on first: its new state is this block's target.
            block = model.load_block(index, job.device, torch.float32)
            with input_moments(block, model.block_name(index)) as moments:
                for streams in (train, held_out):
                    advance_stream(
                        streams.target, block, arguments[index], batch_size=config.batch_size, device=job.device
                    )
                    _check_range(streams.target, model.block_name(index))
            if index not in kept:
                result = _train(job, model, index, block, quants, train, held_out, arguments[index], moments, bar)
                detail = f"loss {result['before']:.4g} -> {result['after']:.4g}"
            else:
                detail = "kept from the interrupted run"
            # Through the saved file, so that a resumed run sees the very same numbers.
            quantized = load_quantized_block(job.out, model, index, quants, job.device)
            for streams in (train, held_out):
                advance_stream(
                    streams.student, quantized, arguments[index], batch_size=config.batch_size, device=job.device
                )
            bar.advance(detail=detail, reused=index in kept)
    finish(job.out, model, recipe.quant)
    return _metrics(job)


def _check_range(stream: Tensor, name: str) -> None:
    """DivergedError when a full-precision block's outputs left the range of fp16, which nothing later would mend."""
    if stream.dtype == torch.float16 and not all(bool(torch.isfinite(window).all()) for window in stream):
        raise DivergedError(
            f"{name} of the full-precision model has outputs beyond float16's largest number",
            hint="set block_ap.amp to bfloat16, or to float32 where the device has no bfloat16",
        )


def _train(
    job: Job,
    model: BlockModel,
    index: int,
    block: torch.nn.Module,
    quants: dict[str, ModuleQuant],
    train: _Streams,
    held_out: _Streams,
    arguments: dict[str, Any],
    moments: dict[str, Tensor],
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
        grids[name] = (scale.to(job.device), zero_point.float().to(job.device))
    hessians = None
    if config.rounding == "gptq":
        sample = train.student[: recipe.calibrate.moment_samples or len(train.student)]
        hessians = input_hessians(block, prefix, list(quants), sample, arguments, job.device)
    students = build_student(block, prefix, quants, grids, zero_points=recipe.quant.zero_points, hessians=hessians)
    result: BlockResult = train_block(
        block,
        students,
        Windows(train.student, train.target),
        Windows(held_out.student, held_out.target),
        arguments,
        config,
        zero_points=recipe.quant.zero_points,
        generator=torch.Generator().manual_seed(recipe.calibrate.seed * 1_000_003 + index),
        device=job.device,
        progress=bar.note,
    )
    state = block.state_dict()  # with the buffers that the checkpoint keeps
    others = {f"{prefix}.{n}": t for n, t in state.items() if f"{prefix}.{n.rpartition('.')[0]}" not in quants}
    trained = export_students(students)
    # Against the weights as they were: those of `block` are the trained ones now.
    errors = weight_errors(model.load_block(index, job.device, torch.float32), prefix, trained, moments)
    seconds = round(time.monotonic() - started, 3)
    event = {**asdict(result), "relative_error": errors, "seconds": seconds}
    save_block(job.out, index, trained, others, log=job.log, event=event)
    if result.backoffs:
        job.log.warn(f"block {index}: non-finite loss or gradient {result.backoffs} times; best iterate kept")
    return event


def _open_streams(
    job: Job, model: BlockModel, name: str, windows: Tensor, budget: StreamBudget, dtype: torch.dtype
) -> _Streams:
    hidden = model.source.config().get_text_config().hidden_size
    shape = (*windows.shape, hidden)
    target = budget.allocate(f"{name}-target", shape, dtype)
    student = budget.allocate(f"{name}-student", shape, dtype)
    fill_stream(target, model, windows, job.device, dtype)
    student.copy_(target)
    return _Streams(target, student)


def _metrics(job: Job) -> dict[str, Any]:
    """Summary of all blocks, those of earlier interrupted runs included, from the log."""
    rows = [event for _, event in sorted(block_events(job.out).items())]
    return {
        "blocks": [
            {key: row[key] for key in ("index", "before", "after", "epochs", "backoffs", "seconds")} for row in rows
        ],
        "loss_before": sum(row["before"] for row in rows) / len(rows),
        "loss_after": sum(row["after"] for row in rows) / len(rows),
    }
