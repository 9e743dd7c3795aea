"""What each ingredient of the default method is worth, and the published recipe beside it, on one model and text.

    python benchmarks/ablation.py MODEL TEXT --out FOLDER --bits 2 --bits 3 --seed 2 --seed 3

For every number of bits: Block-AP with the default, the default without each ingredient, the published recipe (`method:
efficientqat`) and that recipe with each ingredient alone; then E2E-QP, from the default's Block-AP. The last fifth of
TEXT's documents is held out for the perplexity and the divergence (KL, nats per token) from full precision; the windows
of training come from the rest. A figure is the mean over the seeds (they choose the windows and their order) and half
of their range; seconds are those of training. FOLDER keeps runs and tables: the same command again continues.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml

import qatcli
from qatcli.recipe import load_recipe
from qatcli.recipe.methods import preset
from qatcli.recipe.schema import BlockApSection
from qatcli.runlog import RunLog
from qatcli.stages import run_stage

DOCUMENT_END = "<|endoftext|>"
HELD_OUT = "held-out"
Rows = Iterable[tuple[str, Sequence[str]]]  # name and recipe keys

PUBLISHED = "method=efficientqat"
UNTRAINED = "block_ap.epochs=0"
RATES = ("lr_units", "lr_weights", "lr_scales", "lr_norms")
GPTQ = "block_ap.rounding=gptq"
# What Block-AP is measured without: keys that take it out of the default.
WITHOUT: Rows = (
    ("weights in the search", ["quant.init=mse"]),
    ("a search", ["quant.init=minmax"]),
    ("readers in the loss", ["block_ap.loss=relative"]),
    ("readers and tokens in the loss", ["block_ap.loss=mse"]),
    ("lookahead", ["block_ap.lookahead=false"]),
    ("best iterate", ["block_ap.keep_best=false"]),
    ("new order every epoch", ["block_ap.shuffle=false"]),
    ("training of weights", ["block_ap.lr_weights=0"]),
    ("training of scales", ["block_ap.lr_scales=0"]),
    ("training of norms", ["block_ap.lr_norms=0"]),
    ("fixed zero points", ["block_ap.lr_zero_points=1", "quant.zero_points=any"]),
)
# What the published recipe is measured with, alone.
ALONE: Rows = (
    ("rates as reach", [f"block_ap.{key}={getattr(BlockApSection(), key)}" for key in (*RATES, "lr_zero_points")]),
    ("searched grid", ["quant.init=weighted"]),
    ("GPTQ's start", [GPTQ]),
    ("tokens in the loss", ["block_ap.loss=relative"]),
    ("readers and tokens in the loss", ["block_ap.loss=downstream"]),
    ("lookahead", ["block_ap.lookahead=true"]),
    ("best iterate", ["block_ap.keep_best=true"]),
    ("new order every epoch", ["block_ap.shuffle=true"]),
    ("fixed zero points", ["block_ap.lr_zero_points=0"]),
)
E2E_QP: Rows = (
    ("default", []),
    ("without distillation", ["e2e_qp.text_weight=1"]),
    ("without the text", ["e2e_qp.text_weight=0"]),
    ("without bounded steps", ["e2e_qp.max_step=null"]),
    ("without best iterate", ["e2e_qp.keep_best=false"]),
    *((f"from {count} tokens", [f"e2e_qp.teacher_tokens={count}"]) for count in (256, 16, 4)),
    ("with norms", ["e2e_qp.train=[scales,norms]", "e2e_qp.lr_norms=0.05"]),
)
PUBLISHED_E2E_QP: Rows = (
    ("published recipe", [PUBLISHED]),
    ("published + distillation", [PUBLISHED, "e2e_qp.text_weight=0"]),
)


def _expression(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise typer.BadParameter(f"not a regular expression: {error}") from error


def main(
    model: Annotated[Path, typer.Argument(exists=True, help="Folder or GGUF file of the full-precision model.")],
    text: Annotated[Path, typer.Argument(exists=True, help="Text file, documents separated by <|endoftext|>.")],
    out: Annotated[Path, typer.Option(help="Folder for runs and tables.")],
    bits: Annotated[list[int], typer.Option(help="Repeatable.")],
    seed: Annotated[list[int], typer.Option(help="Repeatable.")],
    group_size: int = 32,
    samples: Annotated[int, typer.Option(help="Training windows of each stage.")] = 128,
    seq_len: int = 256,
    windows: Annotated[int, typer.Option(help="Windows of held-out text.")] = 48,
    only: Annotated[
        re.Pattern[str], typer.Option(parser=_expression, metavar="REGEX", help="Rows whose whole name this matches.")
    ] = ".*",  # type: ignore[assignment]  # typer parses it
) -> None:
    """Run what has not run yet, and print the tables."""
    out.mkdir(parents=True, exist_ok=True)
    recipe = _recipe(model, text, out, group_size=group_size, samples=samples, seq_len=seq_len, windows=windows)
    report = out / f"ablation_{model.stem}.md"
    conditions = (
        f"{text.name}, groups of {group_size}, {samples} windows of {seq_len} tokens for each stage in batches of 4,"
        f" 2 epochs of Block-AP, 1 of E2E-QP, seeds {', '.join(map(str, seed))}; {windows} held-out windows;"
        f" qat {qatcli.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    )
    report.write_text(f"# Ingredients of the method on {model.stem}\n\n{conditions}\n", encoding="utf-8")
    for width in bits:
        bench = Bench(recipe, out / f"w{width}", width, seed, report, only)
        bench.table("Block-AP", bench.block_ap, block_ap_rows(width))
        bench.table("E2E-QP, from the default's Block-AP", bench.end_to_end, E2E_QP)
        published = partial(bench.end_to_end, start="published recipe", start_keys=[PUBLISHED])
        bench.table("E2E-QP of the published recipe, from its own Block-AP", published, PUBLISHED_E2E_QP)


def block_ap_rows(bits: int) -> Rows:
    """Baselines without training, the default, and every ingredient left out and alone."""
    published = preset("efficientqat", bits)["block_ap"]
    yield "round to nearest", [PUBLISHED, UNTRAINED]
    yield "searched grid, nearest", [UNTRAINED]
    yield "searched grid, GPTQ", [UNTRAINED, GPTQ]
    yield "default", []
    yield "with GPTQ's start", [GPTQ]
    yield "without rates as reach", [f"block_ap.{key}={published[key]}" for key in RATES]
    yield from ((f"without {name}", keys) for name, keys in WITHOUT)
    yield "published recipe", [PUBLISHED]
    yield from ((f"published + {name}", [PUBLISHED, *keys]) for name, keys in ALONE)


class Bench:
    """The runs of one width: a directory for each row and seed, in which finished stages stay."""

    def __init__(
        self, recipe: Path, out: Path, bits: int, seeds: Sequence[int], report: Path, only: re.Pattern[str]
    ) -> None:
        self._recipe, self._out, self._bits, self._seeds, self._report = recipe, out, bits, seeds, report
        self._only = only

    def table(self, title: str, measure: Callable[..., dict[str, float]], rows: Rows) -> None:
        """Print and keep one table, a row per variant as it is measured."""
        self._say(f"\n## {self._bits} bits: {title}\n\n| | perplexity | KL | seconds |\n|---|---|---|---|")
        for name, keys in rows:
            if self._only.fullmatch(name):
                self._say(_row(name, [measure(name, seed, keys) for seed in self._seeds]))

    def block_ap(self, name: str, seed: int, keys: Sequence[str]) -> dict[str, float]:
        """Calibration, Block-AP, and its figures."""
        return self._evaluated(self._run(name, seed), seed, keys, self._trained_blocks(name, seed, keys))

    def end_to_end(
        self, name: str, seed: int, keys: Sequence[str], start: str = "default", start_keys: Sequence[str] = ()
    ) -> dict[str, float]:
        """E2E-QP from the Block-AP of the row `start`, and its figures."""
        run, source = self._run(f"e2e {start} {name}", seed), self._trained_blocks(start, seed, start_keys).path
        return self._evaluated(run, seed, keys, self._stage("e2e-qp", run, seed, keys, source=source))

    def _trained_blocks(self, name: str, seed: int, keys: Sequence[str]) -> Any:
        """Block-AP of a row, from its own calibration; what is there already stays."""
        run = self._run(name, seed)
        self._stage("calibrate", run, seed, keys)
        return self._stage("block-ap", run, seed, keys)

    def _run(self, name: str, seed: int) -> Path:
        return self._out / "".join(c if c.isalnum() else "-" for c in name.lower()) / f"seed-{seed}"

    def _stage(self, stage: str, run: Path, seed: int, keys: Sequence[str], source: Path | None = None) -> Any:
        settings = load_recipe(self._recipe, [f"quant.bits={self._bits}", f"calibrate.seed={seed}", *keys])
        return run_stage(stage, settings, run, source=source, log=RunLog(verbosity=-1))

    def _evaluated(self, run: Path, seed: int, keys: Sequence[str], trained: Any) -> dict[str, float]:
        found = self._stage("eval", run, seed, keys, source=trained.path).facts["metrics"]["models"]["quantized"]
        divergence = found["divergence"][HELD_OUT]["mean_kl"]
        return {"perplexity": found["perplexity"][HELD_OUT], "kl": divergence, "seconds": trained.facts["seconds"]}

    def _say(self, line: str) -> None:
        print(line, flush=True)
        with open(self._report, "a", encoding="utf-8") as file:
            file.write(line + "\n")


def _row(name: str, runs: list[dict[str, float]]) -> str:
    cells = [name]
    for key, digits in (("perplexity", 3), ("kl", 4), ("seconds", 0)):
        values = [run[key] for run in runs]
        spread = f" ± {(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 and digits else ""
        cells.append(f"{statistics.mean(values):.{digits}f}{spread}")
    return "| " + " | ".join(cells) + " |"


def _recipe(model: Path, text: Path, out: Path, *, group_size: int, samples: int, seq_len: int, windows: int) -> Path:
    """The recipe of the default at 4 bits, and its two texts, in `out`."""
    documents = text.read_text(encoding="utf-8").split(DOCUMENT_END)
    kept = len(documents) * 4 // 5
    for name, part in (("train.txt", documents[:kept]), ("held-out.txt", documents[kept:])):
        (out / name).write_text(f"\n{DOCUMENT_END}\n".join(d.strip() for d in part), encoding="utf-8")
    size = {"samples": samples, "validation_samples": max(8, samples // 8), "seq_len": seq_len}
    steps = {"batch_size": 4, "micro_batch_size": 4, "gradient_checkpointing": False, "checkpoint_every": 8}
    recipe = {
        "model": {"source": str(model.absolute())},
        "quant": {"bits": 4, "group_size": group_size},
        "calibrate": {"data": [{"source": "./train.txt"}], **size},
        "block_ap": {"epochs": 2, "batch_size": 4},
        "e2e_qp": size | steps,
        "eval": {
            "perplexity": [{"name": HELD_OUT, "source": "./held-out.txt", "seq_len": seq_len, "windows": windows}],
            "speed": None,
            "baselines": [],
        },
    }
    (out / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return out / "recipe.yaml"


if __name__ == "__main__":
    typer.run(main)
