"""calibrate: sample token windows, search initial scales and zero points, measure each layer's error.

Reads:  the recipe's model and text.
Writes: windows.safetensors {train int32 [S, T], validation int32 [V, T]} and a packed checkpoint of the weights rounded
        to the initial grids: the start of block-ap, and through `qat pack` a post-training quantized model.
Left out on purpose: rounding with error feedback (GPTQ). It needs inputs of already quantized blocks, which only
        block-ap has; `block_ap: {epochs: 0, rounding: gptq}` is GPTQ.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qat_kernels import quantize
from qatcli.activations import SWEEP_BATCH, advance_stream, check_range, fill_streams, stream_budget
from qatcli.attention import use_tiled_attention
from qatcli.blockfiles import block_quants, finish, finished_blocks, save_block
from qatcli.casting import all_finite
from qatcli.data import check_source, load_windows, sample_windows, save_windows
from qatcli.data.store import FILE as WINDOWS
from qatcli.directory import write_json
from qatcli.errors import InputError
from qatcli.grid import initial_grid
from qatcli.inputs import read_json
from qatcli.memory import release_memory
from qatcli.models.blocks import BlockModel, open_blocks
from qatcli.models.source import ModelSource
from qatcli.moments import input_moments, weight_errors
from qatcli.packed import ModuleQuant, QuantizedLinear
from qatcli.recipe.schema import QuantSection
from qatcli.stages import Job, open_model
from qatcli.training import compute_dtype

MODEL = "resume.model.json"  # the model that windows and blocks are of; removed once the stage is committed
WORST = 10  # layers that the metrics list by name


def run(job: Job) -> dict[str, Any]:
    """Sample windows, then round every block to its initial grids."""
    recipe, log = job.recipe, job.log
    config = recipe.calibrate
    source = open_model(job)
    model = open_blocks(source)
    use_tiled_attention(model.skeleton, job.device)
    quants = [block_quants(model, index, recipe.quant) for index in range(len(model))]

    if (job.out / WINDOWS).is_file():
        _refuse_another_model(job.out, source)
    else:
        tokenizer = source.tokenizer()
        for data in recipe.e2e_qp.data or ():
            check_source(data, tokenizer)  # now, and not after the hours of block-ap
        windows = sample_windows(
            config.data,
            tokenizer,
            samples=config.samples,
            validation_samples=config.validation_samples,
            seq_len=config.seq_len,
            seed=config.seed,
        )
        write_json(job.out / MODEL, {"fingerprint": source.fingerprint})
        save_windows(job.out, windows)
        release_memory()  # the text and its tokens
    train, _ = load_windows(job.out)

    kept = {index: event["relative_error"] for index, event in finished_blocks(job.out).items()}
    errors: dict[str, float] = {}
    with log.progress("calibrate", len(model)) as bar:
        for index, block, moments in _blocks_with_moments(job, model, train.tokens[: config.moment_samples]):
            if index not in kept:
                kept[index] = _round_block(job, model, index, block, quants[index], moments, recipe.quant)
            errors |= kept[index]
            block_errors = [errors[name] for name in quants[index]]
            bar.advance(detail=f"relative error {sum(block_errors) / max(1, len(block_errors)):.4f}")
    finish(job.out, model, recipe.quant)
    write_json(job.out / "layer-errors.json", errors)
    worst = sorted(errors, key=lambda name: errors[name], reverse=True)[:WORST]
    data = json.loads((job.out / "data.json").read_text())
    return {
        "relative_error": sum(errors.values()) / max(1, len(errors)),
        "worst_layers": {name: errors[name] for name in worst},
        "windows": len(train),
        "data_digest": data["digest"],
        "model_fingerprint": source.fingerprint,
    }


def _refuse_another_model(out: Path, source: ModelSource) -> None:
    """InputError when the blocks that an interrupted run left in `out` are of other weights."""
    if (out / MODEL).is_file() and read_json(out / MODEL)["fingerprint"] != source.fingerprint:
        raise InputError(
            f"the model at {source.path} is not the one that the unfinished run in {out} began with",
            hint="put that model back to continue, or use --restart",
        )


def _blocks_with_moments(job: Job, model: BlockModel, windows: Tensor) -> Any:
    """Each full-precision block with the mean square of every linear's inputs, {name: [K]}; empty without windows."""
    dtype = compute_dtype(job.recipe.block_ap.amp, job.device)
    stream = torch.empty(0)
    arguments: list[dict[str, Any]] = []
    if len(windows):
        budget = stream_budget(job.device, job.recipe.block_ap.cache, job.out)
        hidden = model.hidden_size
        stream = budget.allocate("calibrate", (*windows.shape, hidden), dtype)
        fill_streams([stream], model, windows, job.device, dtype)
        arguments = model.block_arguments(windows.shape[1], job.device, torch.float32)
    for index in range(len(model)):
        block = model.load_block(index, job.device, torch.float32)
        moments: dict[str, Tensor] = {}
        if len(windows):
            with input_moments(block, model.block_name(index)) as moments:
                advance_stream(stream, block, arguments[index], batch_size=SWEEP_BATCH, device=job.device)
            check_range(stream, model.block_name(index))
        yield index, block, moments


def _round_block(
    job: Job,
    model: BlockModel,
    index: int,
    block: nn.Module,
    quants: dict[str, ModuleQuant],
    moments: dict[str, Tensor],
    quant: QuantSection,
) -> dict[str, float]:
    """Round one block's linears to their initial grids, save it, and return each one's relative error."""
    prefix = model.block_name(index) + "."
    linears: dict[str, QuantizedLinear] = {}
    for name, q in quants.items():
        linear = block.get_submodule(name.removeprefix(prefix))
        assert isinstance(linear, nn.Linear)
        weight, shape = linear.weight.detach(), {"bits": q.bits, "group_size": q.group_size}
        if not all_finite(weight):
            raise InputError(f"{model.source.path}: {name} has weights that are not finite", hint="get the model again")
        if job.recipe.calibrate.moment_samples and name not in moments:
            raise InputError(
                f"{name} is not called as a linear: its model uses the weight itself", hint="add it to quant.skip"
            )
        scale, zero_point = initial_grid(
            weight, **shape, zero_points=quant.zero_points, method=quant.init, moment=moments.get(name)
        )
        codes = quantize(weight, scale, zero_point, **shape)
        linears[name] = QuantizedLinear(codes, scale, zero_point.to(torch.uint8), **shape, bias=linear.bias)
    errors = weight_errors(block, model.block_name(index), linears, moments)
    save_block(job.out, index, block, linears, prefix=prefix, log=job.log, event={"relative_error": errors})
    return errors
