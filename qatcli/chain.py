"""One stage or the whole chain of a recipe, with the result as plain data for the command line."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from qatcli.directory import StageDirectory, open_stage
from qatcli.recipe import Recipe, load_recipe, recipe_name
from qatcli.runlog import RunLog, duration
from qatcli.stages import run_stage

CHAIN = ("calibrate", "block-ap", "e2e-qp", "pack", "eval")


def run_one(
    stage: str,
    recipe_file: Path,
    overrides: Sequence[str],
    *,
    run_dir: Path | None,
    source: Path | None,
    restart: bool,
    device: str | None,
    verbosity: int,
) -> dict[str, Any]:
    """Run one stage; {stage, path, seconds, metrics}."""
    recipe, run_dir, log = _begin(recipe_file, overrides, run_dir, verbosity)
    done = run_stage(stage, recipe, run_dir, source=source, restart=restart, device=device, log=log)
    if stage == "eval":
        _print_table(log, done.facts["metrics"])
    facts = done.facts
    return {"stage": stage, "path": str(done.path), "seconds": facts["seconds"], "metrics": facts["metrics"]}


def run_exports(
    recipe_file: Path,
    overrides: Sequence[str],
    formats: Sequence[str],
    *,
    run_dir: Path | None,
    source: Path | None,
    restart: bool,
    device: str | None,
    verbosity: int,
) -> list[dict[str, Any]]:
    """Export to every format named, or to the recipe's; one {stage, format, path, seconds, metrics} each."""
    chosen = [f"export.formats=[{','.join(formats)}]"] if formats else []
    recipe, run_dir, log = _begin(recipe_file, [*overrides, *chosen], run_dir, verbosity)
    results = []
    for name in recipe.export.formats:
        done = run_stage(
            "export", recipe, run_dir, variant=name, source=source, restart=restart, device=device, log=log
        )
        facts = done.facts
        results.append(
            {
                "stage": "export",
                "format": name,
                "path": str(done.path),
                "seconds": facts["seconds"],
                "metrics": facts["metrics"],
            }
        )
    return results


def run_all(
    recipe_file: Path,
    overrides: Sequence[str],
    *,
    run_dir: Path | None,
    restart: bool,
    device: str | None,
    verbosity: int,
) -> dict[str, Any]:
    """Run the chain and summarize it. Perplexities are of the recipe's first evaluation text."""
    recipe, run_dir, log = _begin(recipe_file, overrides, run_dir, verbosity)
    done: dict[str, StageDirectory] = {}
    for stage in CHAIN:
        done[stage] = run_stage(stage, recipe, run_dir, restart=restart, device=device, log=log)
    metrics = done["eval"].facts["metrics"]
    _print_table(log, metrics)
    _print_samples(log, metrics)
    text = recipe.eval.perplexity[0].name if recipe.eval.perplexity else None
    return {
        "recipe": recipe_name(recipe_file),
        "bits": recipe.quant.bits,
        "group_size": recipe.quant.group_size,
        "ppl": {name: result["perplexity"].get(text) for name, result in metrics["models"].items()},
        "kl": {
            name: result["divergence"][text]["mean_kl"]
            for name, result in metrics["models"].items()
            if text in result["divergence"]
        },
        "protocol": metrics["protocol"].get(text),
        "bits_per_weight": metrics["size"]["bits_per_weight"],
        "bits_per_parameter": metrics["size"]["bits_per_parameter"],
        "seconds": {stage: directory.facts["seconds"] for stage, directory in done.items()},
        "peak_memory": {stage: directory.facts["peak_memory"] for stage, directory in done.items()},
        "path": str(done["pack"].path),
    }


def describe(path: Path, *, as_json: bool) -> str:
    """What a stage directory is, after its digests were verified."""
    stage = open_stage(path)
    facts = {key: value for key, value in stage.facts.items() if key != "files"}
    facts |= {"files": len(stage.facts["files"]), "verified": True}
    if as_json:
        return json.dumps(facts)
    lines = [
        f"{path}: {facts['kind']}, written by stage {facts['stage']} in {duration(facts['seconds'])}",
        f"input: {facts['input'] or facts['recipe']['model']['source']}",
        f"bits: {facts['recipe']['quant']['bits']}, group size: {facts['recipe']['quant']['group_size']}",
        f"files: {facts['files']}, every sha256 verified",
    ]
    return "\n".join(lines)


def _print_table(log: RunLog, metrics: dict[str, Any]) -> None:
    """Perplexity and divergence of every measured model, with the protocol as the caption."""
    if log.verbosity < 0:
        return
    table = Table(title="evaluation", title_justify="left", caption=_caption(metrics), caption_justify="left")
    table.add_column("model")
    for text in metrics["protocol"]:
        table.add_column(f"{text} ppl", justify="right")
        table.add_column("KL", justify="right")
        table.add_column("top-1", justify="right")
    for name, result in metrics["models"].items():
        row = [name]
        for text in metrics["protocol"]:
            apart = result["divergence"].get(text)
            row.append(f"{result['perplexity'][text]:,.2f}")
            row += [f"{apart['mean_kl']:.4f}", f"{apart['top1_agreement']:.1%}"] if apart else ["", ""]
        table.add_row(*row)
    log.console.print(table)


def _caption(metrics: dict[str, Any]) -> str:
    size = metrics["size"]
    texts = [
        f"{name}: {Path(p['source']).name}, {p['windows']} windows of {p['context']} tokens, {p['compute']}"
        for name, p in metrics["protocol"].items()
    ]
    mib = {part: count / 2**20 for part, count in size["bytes"].items()}
    weights = ", ".join(f"{part.replace('_', ' ')} {value:.2f} MiB" for part, value in mib.items())
    texts.append(f"size: {weights}")
    texts.append(
        f"{size['bits_per_weight']} bits per quantized weight, {size['bits_per_parameter']} per parameter in all"
    )
    return "\n".join(texts)


def _print_samples(log: RunLog, metrics: dict[str, Any]) -> None:
    if log.verbosity < 0 or not metrics["prompts"]:
        return
    models = {name: r["samples"] for name, r in metrics["models"].items() if r.get("samples")}
    table = Table(title="the same prompt, greedy decoding", title_justify="left", show_lines=True)
    table.add_column("prompt", ratio=1)
    for name in models:
        table.add_column(name, ratio=2)
    for index, prompt in enumerate(metrics["prompts"]):
        table.add_row(prompt, *(samples[index].strip() for samples in models.values()))
    log.console.print(table)


def _begin(
    recipe_file: Path, overrides: Sequence[str], run_dir: Path | None, verbosity: int
) -> tuple[Recipe, Path, RunLog]:
    """What every command starts with: the recipe, its run directory and the log. The recipe is checked first."""
    recipe = load_recipe(recipe_file, overrides)
    _quiet_libraries()
    return recipe, run_dir or Path("runs") / recipe_name(recipe_file), RunLog(verbosity=verbosity)


def _quiet_libraries() -> None:
    """Silence the progress bars of libraries, ours says what is going on, and what torchao says when it is imported."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from datasets import disable_progress_bars
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    disable_progress_bars()
