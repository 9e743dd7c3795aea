"""Compare block-ap settings on some consecutive blocks, by what the whole model loses.

    python benchmarks/block_sweep.py recipes/smollm2/w3g64.yaml --first 16 --blocks 3 --samples 96 \
        --variant "block_ap.lr_scales=4" --variant "block_ap.lr_scales=1 block_ap.lr_weights=0.4"

Blocks FIRST to FIRST + BLOCKS - 1 are quantized one after another as block-ap does, all others stay in full precision.
Printed: the divergence (KL, nats per token) of the model's next-token distribution on held-out windows, then per block
the held-out loss before training and after every epoch. Fewer windows mean fewer updates, and rates that suit many
updates look too large with few: the whole chain decides. A variant is a space-separated list of recipe keys, as for
`qat --set`; quant.bits may be among them. No block looks ahead here, whatever `block_ap.lookahead` says.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import qatcli
from qatcli.activations import advance_stream, fill_streams
from qatcli.blockfiles import block_quants
from qatcli.blocktrain import (
    BlockResult,
    Objective,
    Windows,
    build_student,
    input_hessians,
    output_error,
    train_block,
)
from qatcli.data import sample_windows
from qatcli.evaluation.perplexity import divergence
from qatcli.grid import initial_grid
from qatcli.models.blocks import BlockModel, open_blocks
from qatcli.models.readers import readers_behind, stream_readers
from qatcli.models.source import open_source
from qatcli.recipe import Recipe, load_recipe
from qatcli.training import autocast, compute_dtype


@dataclass(frozen=True)
class Setting:
    """What all variants share: hidden states before the first block [S, T, H], and after each block in full precision.

    Each pair is (training windows, held-out windows). `logits` [V, T, vocabulary] are full precision's on the latter.
    """

    model: BlockModel
    network: Any
    arguments: list[dict[str, Any]]
    readers: list[Tensor]
    blocks: range
    inputs: tuple[Tensor, Tensor]
    targets: list[tuple[Tensor, Tensor]]
    logits: Tensor
    device: torch.device


def main(
    recipe: Path,
    first: Annotated[int, typer.Option(help="First block to quantize.")],
    variant: Annotated[list[str], typer.Option(help="Recipe keys of one variant; repeatable.")],
    blocks: Annotated[int, typer.Option(help="How many blocks.")] = 1,
    samples: Annotated[int | None, typer.Option(help="Training windows; the recipe's by default.")] = None,
) -> None:
    """Print one line per variant."""
    base = load_recipe(recipe, [f"calibrate.samples={samples}"] if samples else [])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"qat {qatcli.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads, {device}")
    setting = _prepare(base, range(first, first + blocks), device)
    for keys in variant:
        started = time.monotonic()
        divergence, results = _quantize(load_recipe(recipe, keys.split()), setting)
        losses = "; ".join(f"{r.before:.5f} -> " + " ".join(f"{loss:.5f}" for loss in r.validation) for r in results)
        print(f"KL {divergence:.5f}  {time.monotonic() - started:.0f} s  {keys}  ({losses})", flush=True)


def _prepare(recipe: Recipe, blocks: range, device: torch.device) -> Setting:
    source = open_source(**recipe.model.model_dump())
    model = open_blocks(source)
    config = recipe.calibrate
    windows = sample_windows(
        config.data,
        source.tokenizer(),
        samples=config.samples,
        validation_samples=config.validation_samples,
        seq_len=config.seq_len,
        seed=config.seed,
    )
    dtype = compute_dtype(recipe.block_ap.amp, device)
    hidden = model.hidden_size
    arguments = model.block_arguments(config.seq_len, device, torch.float32)
    readers = readers_behind(stream_readers(model, device))
    flows = []
    for tokens in (windows.train, windows.validation):
        flows.append(torch.empty(*tokens.shape, hidden, dtype=dtype))
        fill_streams([flows[-1]], model, tokens, device, dtype)
    inputs, targets = (flows[0], flows[1]), []
    for index in range(blocks.stop):
        if index == blocks.start:
            inputs = (flows[0].clone(), flows[1].clone())
        block = model.load_block(index, device, torch.float32)
        for flow in flows:
            advance_stream(flow, block, arguments[index], batch_size=4, device=device)
        if index in blocks:
            targets.append((flows[0].clone(), flows[1].clone()))
    network = source.load_model(torch.float32, device)
    setting = Setting(model, network, arguments, readers, blocks, inputs, targets, torch.empty(0), device)
    return Setting(**{**vars(setting), "logits": _logits(setting, targets[-1][1])})


def _quantize(recipe: Recipe, setting: Setting) -> tuple[float, list[BlockResult]]:
    """The model's divergence with the blocks quantized by `recipe`, and how each was trained."""
    device, results = setting.device, []
    train, held_out = (flow.clone() for flow in setting.inputs)
    for index, (train_target, held_out_target) in zip(setting.blocks, setting.targets, strict=True):
        block, prefix = setting.model.load_block(index, device, torch.float32), setting.model.block_name(index)
        arguments, quants = setting.arguments[index], block_quants(setting.model, index, recipe.quant)
        grids = {}
        for name, quant in quants.items():
            grids[name] = initial_grid(
                block.get_parameter(f"{name.removeprefix(prefix + '.')}.weight").detach(),
                bits=quant.bits,
                group_size=quant.group_size,
                zero_points=recipe.quant.zero_points,
                method=recipe.quant.init,
            )
        hessians = None
        if recipe.block_ap.rounding == "gptq":
            sample = train[: recipe.calibrate.moment_samples]
            hessians = input_hessians(block, prefix, list(quants), sample, arguments, device)
        students = build_student(block, prefix, quants, grids, zero_points=recipe.quant.zero_points, hessians=hessians)
        unseen = Windows(held_out, held_out_target)
        error = output_error(recipe.block_ap.loss, setting.readers[index])
        results.append(
            train_block(
                Objective(block, arguments, [error]),
                students,
                Windows(train, train_target),
                unseen,
                recipe.block_ap,
                zero_points=recipe.quant.zero_points,
                generator=torch.Generator().manual_seed(recipe.calibrate.seed + index),
                device=device,
            )
        )
        for flow in (train, held_out):
            advance_stream(flow, block, arguments, batch_size=4, device=device)
    ours, theirs = (each[:, :-1] for each in (_logits(setting, held_out), setting.logits))
    return divergence(ours, theirs, device).mean_kl, results


@torch.no_grad()
def _logits(setting: Setting, hidden: Tensor) -> Tensor:
    """What the rest of the model, in full precision, makes of hidden states after the last quantized block."""
    hidden = hidden.clone()
    for index in range(setting.blocks.stop, len(setting.model)):
        block = setting.network.get_submodule(setting.model.block_name(index))
        advance_stream(hidden, block, setting.arguments[index], batch_size=4, device=setting.device)
    with autocast(setting.device, hidden.dtype):
        normed = setting.network.base_model.norm(hidden.to(setting.device))
        logits: Tensor = setting.network.get_output_embeddings()(normed)
    return logits


if __name__ == "__main__":
    typer.run(main)
