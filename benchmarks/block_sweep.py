"""Compare block-ap settings on single blocks: held-out loss before training and after every epoch, and seconds.

    python benchmarks/block_sweep.py recipes/smollm2/w2g64.yaml --block 12 \
        --variant block_ap.lr_weights=1 --variant "block_ap.lr_weights=3 block_ap.rounding=nearest"

The blocks receive full-precision inputs, so that every variant sees the same data and none depends on another block.
That leaves out what errors of earlier blocks add: a ranking here is a hint, the chain decides. A variant is a
space-separated list of recipe keys, as for `qat --set`; quant.bits may be among them.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import qatcli
from qatcli.activations import advance_stream, fill_stream
from qatcli.blockfiles import block_quants
from qatcli.blocktrain import Windows, build_student, input_hessians, train_block
from qatcli.data import sample_windows
from qatcli.grid import initial_grid
from qatcli.models.blocks import BlockModel, open_blocks
from qatcli.models.source import open_source
from qatcli.recipe import Recipe, load_recipe
from qatcli.training import compute_dtype


def main(
    recipe: Path,
    block: Annotated[list[int], typer.Option(help="Block to train; repeatable.")],
    variant: Annotated[list[str], typer.Option(help="Recipe keys of one variant; repeatable.")],
) -> None:
    """Print one line per variant and block."""
    base = load_recipe(recipe)
    source = open_source(**base.model.model_dump())
    model = open_blocks(source)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"qat {qatcli.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads, {device}")
    streams = _streams(base, model, source.tokenizer(), set(block), device)
    arguments = model.block_arguments(base.calibrate.seq_len, device, torch.float32)
    for keys in variant:
        chosen = load_recipe(recipe, keys.split())
        for index in block:
            print(f"block {index}  {keys}  {_train(chosen, model, index, streams[index], arguments[index], device)}")


def _streams(
    recipe: Recipe, model: BlockModel, tokenizer: Any, wanted: set[int], device: torch.device
) -> dict[int, tuple[Windows, Windows]]:
    """Inputs and targets of the wanted blocks, training and held-out."""
    config = recipe.calibrate
    windows = sample_windows(
        config.data,
        tokenizer,
        samples=config.samples,
        validation_samples=config.validation_samples,
        seq_len=config.seq_len,
        seed=config.seed,
    )
    dtype = compute_dtype(recipe.block_ap.amp, device)
    hidden = model.source.config().get_text_config().hidden_size
    flows: list[Tensor] = []
    for tokens in (windows.train, windows.validation):
        flows.append(torch.empty(*tokens.shape, hidden, dtype=dtype))
        fill_stream(flows[-1], model, tokens, device, dtype)
    arguments = model.block_arguments(config.seq_len, device, torch.float32)
    found = {}
    for index in range(max(wanted) + 1):
        inputs = [flow.clone() for flow in flows]
        full = model.load_block(index, device, torch.float32)
        for flow in flows:
            advance_stream(flow, full, arguments[index], batch_size=4, device=device)
        if index in wanted:
            train, held_out = (Windows(x, y.clone()) for x, y in zip(inputs, flows, strict=True))
            found[index] = (train, held_out)
    return found


def _train(
    recipe: Recipe,
    model: BlockModel,
    index: int,
    streams: tuple[Windows, Windows],
    arguments: dict[str, Any],
    device: torch.device,
) -> str:
    started = time.monotonic()
    train, held_out = streams
    full, prefix = model.load_block(index, device, torch.float32), model.block_name(index)
    quants = block_quants(model, index, recipe.quant)
    grids = {}
    for name, quant in quants.items():
        weight = full.get_submodule(name.removeprefix(prefix + ".")).weight.detach()
        grids[name] = initial_grid(
            weight,
            bits=quant.bits,
            group_size=quant.group_size,
            symmetric=recipe.quant.symmetric,
            method=recipe.quant.init,
        )
    hessians = None
    if recipe.block_ap.rounding == "gptq":
        sample = train.inputs[: recipe.calibrate.moment_samples]
        hessians = input_hessians(full, prefix, list(quants), sample, arguments, device)
    students = build_student(full, prefix, quants, grids, symmetric=recipe.quant.symmetric, hessians=hessians)
    result = train_block(
        full,
        students,
        train,
        held_out,
        arguments,
        recipe.block_ap,
        symmetric=recipe.quant.symmetric,
        generator=torch.Generator().manual_seed(recipe.calibrate.seed),
        device=device,
    )
    losses = " ".join(f"{loss:.5f}" for loss in result.validation)
    return f"{result.before:.5f} -> {losses}  {time.monotonic() - started:.0f} s"


if __name__ == "__main__":
    typer.run(main)
