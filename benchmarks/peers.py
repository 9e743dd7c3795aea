"""AutoRound and GPTQModel beside a finished run: the same windows, bits and groups, all measured by `qat eval`.

    python benchmarks/peers.py recipes/smollm2/w3g64.yaml --run RUN --out FOLDER --peer autoround --peer gptqmodel

RUN is the recipe's run directory with `calibrate`, whose training windows the peers calibrate on, `block-ap` and
`pack`. Every peer has a process of its own, which tells its seconds and its peak of host memory, and its result stays
in FOLDER: the same command again continues. Prints a Markdown table: perplexity on the recipe's first text, divergence
from full precision (KL, nats per token), bits per weight, and what making it took. Install what should run: `pip
install auto-round gptqmodel`. Peers run with their own defaults but for what the recipe decides; AutoRound trains 200
updates of 8 windows, `autoround-asym` the same with zero points, gptqmodel does not train.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import qatcli
from qatcli.data import load_windows
from qatcli.models.source import open_source
from qatcli.recipe import Recipe, load_recipe

GIB = 2**30
BATCH = 8  # windows, AutoRound's default
STAGES = ("calibrate", "block-ap", "e2e-qp", "pack")


def main(
    recipe: Path,
    run: Annotated[Path, typer.Option(exists=True, help="The recipe's finished run.")],
    out: Annotated[Path, typer.Option(help="Folder for the peers' checkpoints.")],
    peer: Annotated[list[str], typer.Option(help="autoround, autoround-asym, gptqmodel; repeatable.")],
    key: Annotated[
        list[str] | None, typer.Option("--set", help="Recipe key that RUN was made with; repeatable.")
    ] = None,
) -> None:
    """Make what is not there yet, measure everything, print the table."""
    settings = load_recipe(recipe, key or [])
    unknown = sorted(set(peer) - set(PEERS))
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)}: choose from {', '.join(PEERS)}", param_hint="--peer")
    out.mkdir(parents=True, exist_ok=True)
    costs = {name: _cost(name, settings, run, out) for name in peer}
    text = settings.eval.perplexity[0]
    source = open_source(**settings.model.model_dump())
    rows = _evaluate([run / "block-ap", run / "pack", *(_checkpoint(out / name) for name in peer)], settings)
    made = [{}, _of_stages(run, STAGES[:2]), _of_stages(run, STAGES), *costs.values()]
    names = ["full precision", "qat: Block-AP", "qat: Block-AP + E2E-QP", *(_title(name) for name in peer)]
    print(
        f"{source.path.name}, {settings.quant.bits} bits, groups of {settings.quant.group_size},"
        f" {settings.calibrate.samples} windows of {settings.calibrate.seq_len} tokens; {text.name},"
        f" {text.windows or 'all'} windows of {text.seq_len}; qat {qatcli.__version__},"
        f" torch {torch.__version__}, {torch.get_num_threads()} threads\n"
    )
    print("| | perplexity | KL | top-1 | bits per weight | minutes | peak GiB |\n|---|---|---|---|---|---|---|")
    for name, row, cost in zip(names, rows, made, strict=True):
        print(_row(name, row, cost))


def _row(name: str, row: dict[str, Any], cost: dict[str, float]) -> str:
    (perplexity,), divergence = row["perplexity"].values(), next(iter(row["divergence"].values()), None)
    figures = [
        f"{perplexity:.2f}",
        f"{divergence['mean_kl']:.3f}" if divergence else "",
        f"{divergence['top1_agreement']:.1%}" if divergence else "",
        f"{row['size']['bits_per_weight']:.2f}" if row["size"]["bits_per_weight"] else "",
        f"{cost['seconds'] / 60:.0f}" if cost else "",
        f"{cost['bytes'] / GIB:.2f}" if cost else "",
    ]
    return f"| {name} | {' | '.join(figures)} |"


def _title(name: str) -> str:
    return f"{name} {version('auto-round' if name.startswith('autoround') else name)}"


def _of_stages(run: Path, stages: tuple[str, ...]) -> dict[str, float]:
    facts = [json.loads((run / stage / "stage.json").read_text(encoding="utf-8")) for stage in stages]
    return {
        "seconds": sum(stage["seconds"] for stage in facts),
        "bytes": max(stage["peak_memory"]["host_bytes"] for stage in facts),
    }


def _evaluate(models: list[Path], recipe: Recipe) -> list[dict[str, Any]]:
    """What `qat eval` says about full precision and the models, in this order."""
    text = recipe.eval.perplexity[0]
    command = [sys.executable, "-m", "qatcli", "eval", *map(str, models), "--against", recipe.model.source]
    command += ["--text", text.source, "--seq-len", str(text.seq_len), "--no-speed", "--json"]
    command += ["--windows", str(text.windows)] if text.windows else []
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return list(json.loads(done.stdout)["models"].values())


def _cost(name: str, recipe: Recipe, run: Path, out: Path) -> dict[str, float]:
    """Seconds and peak bytes of making the peer's checkpoint, which is made now if it is not there."""
    kept = out / f"{name}.json"
    if not kept.is_file():
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            cost = pool.submit(_make, name, recipe, run, (out / name).absolute()).result()
        kept.write_text(json.dumps(cost), encoding="utf-8")
    return json.loads(kept.read_text(encoding="utf-8"))


def _make(name: str, recipe: Recipe, run: Path, out: Path) -> dict[str, float]:
    """In a process of its own, whose peak is the peer's."""
    source = open_source(**recipe.model.model_dump())
    train, _ = load_windows(run / "calibrate")
    started = time.monotonic()
    PEERS[name](source.path, train.tokens.long(), recipe.quant.bits, recipe.quant.group_size, out)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": time.monotonic() - started, "bytes": peak}


def _checkpoint(folder: Path) -> Path:
    """AutoRound saves into a folder of its own below the one that it is given."""
    return next(folder.rglob("config.json")).parent


def _autoround(model: Path, windows: torch.Tensor, bits: int, group_size: int, out: Path, **options: Any) -> None:
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoRound(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16),
        AutoTokenizer.from_pretrained(model),
        scheme=f"W{bits}A16",
        group_size=group_size,
        dataset=list(windows.split(BATCH)),
        nsamples=len(windows),
        seqlen=windows.shape[1],
        batch_size=BATCH,
        device_map="cpu",
        **options,
    ).quantize_and_save(str(out), format="auto_gptq")


def _gptqmodel(model: Path, windows: torch.Tensor, bits: int, group_size: int, out: Path) -> None:
    os.cpu_count = lambda: 4  # where it is two or less, 7.6 asks a pool of one worker for two
    from gptqmodel import GPTQModel, QuantizeConfig

    out.mkdir(exist_ok=True)
    os.chdir(out)  # where it leaves its logs
    peer = GPTQModel.load(str(model), QuantizeConfig(bits=bits, group_size=group_size), device="cpu")
    peer.quantize(
        [{"input_ids": window, "attention_mask": torch.ones_like(window)} for window in windows], batch_size=1
    )
    peer.save(str(out))


PEERS: dict[str, Callable[..., None]] = {
    "autoround": _autoround,
    "autoround-asym": partial(_autoround, sym=False),
    "gptqmodel": _gptqmodel,
}


if __name__ == "__main__":
    typer.run(main)
