"""One stage or the whole chain of a recipe, with the result as plain data for the command line."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from qatcli import report
from qatcli.directory import BASELINE, CHAIN, EXPECT_FILE, StageDirectory, open_stage, recorded_digest, write_json
from qatcli.errors import InputError, RecipeError, ResourceError, UsageError
from qatcli.evaluation.options import ModelOptions, is_recipe, section
from qatcli.expectations import check
from qatcli.inputs import read_json
from qatcli.recipe import Recipe, load_recipe, recipe_name, untrained_gptq
from qatcli.runlog import RunLog, duration, wide
from qatcli.stages import choose_device, require_room, run_stage

RESTART = "restart.json"  # in a run directory: the digests of the results that a `qat run --restart` replaces


def run_one(
    stage: str,
    recipe_file: Path,
    overrides: Sequence[str],
    *,
    run_dir: Path | None,
    source: str | None,
    restart: bool,
    device: str | None,
    verbosity: int,
) -> dict[str, Any]:
    """Run one stage; {stage, path, seconds, metrics}."""
    recipe, run_dir, log = _begin(recipe_file, overrides, run_dir, verbosity)
    choose_device(device)  # like the recipe, looked at before the stages in front of a pipe are waited for
    path = _given_source(source)
    done = _run_stage(stage, recipe, run_dir, {}, source=path, restart=restart, device=device, log=log)
    facts = done.facts
    result = {"stage": stage, "path": str(done.path), "seconds": facts["seconds"], "metrics": facts["metrics"]}
    if stage == "eval":
        _print_tables(log, facts["metrics"])
        result["expectations"] = _expectations(log, recipe, facts["metrics"])
    return result


def run_exports(
    recipe_file: Path,
    overrides: Sequence[str],
    formats: Sequence[str],
    *,
    run_dir: Path | None,
    source: str | None,
    restart: bool,
    device: str | None,
    verbosity: int,
) -> Iterator[dict[str, Any]]:
    """Export to every format named, or the recipe's; {stage, format, path, seconds, metrics} of each when it is done.

    A later one may fail, and those before it stay.
    """
    chosen = [f"export.formats=[{','.join(formats)}]"] if formats else []
    recipe, run_dir, log = _begin(recipe_file, [*overrides, *chosen], run_dir, verbosity)
    choose_device(device)
    path = _given_source(source)
    for name in recipe.export.formats:
        done = run_stage("export", recipe, run_dir, variant=name, source=path, restart=restart, device=device, log=log)
        facts = done.facts
        yield {
            "stage": "export",
            "format": name,
            "path": str(done.path),
            "seconds": facts["seconds"],
            "metrics": facts["metrics"],
        }


def run_eval(
    targets: Sequence[str],
    overrides: Sequence[str],
    options: ModelOptions,
    *,
    run_dir: Path | None,
    source: str | None,
    restart: bool,
    device: str | None,
    verbosity: int,
) -> dict[str, Any]:
    """The eval stage of a recipe, or models of any kind side by side: {stage, models, protocol, ...}.

    UsageError for options of the one that are given with the other.
    """
    if any(is_recipe(target) for target in targets):
        if len(targets) > 1:
            raise UsageError("a recipe is evaluated by itself", hint="name its run's stage directories beside models")
        if options.given():
            hint = "a recipe says what is measured: use its section `eval`, or --set eval.KEY=VALUE"
            raise UsageError(f"{options.given()[0]} is for models", hint=hint)
        settings: dict[str, Any] = {"run_dir": run_dir, "source": source, "restart": restart, "device": device}
        return run_one("eval", Path(targets[0]), overrides, **settings, verbosity=verbosity)
    if overrides or run_dir or source or restart:
        raise UsageError("--run, --from, --set and --restart are for a recipe", hint="name a recipe, or leave them out")
    config = section(options)
    _quiet_libraries()
    from qatcli.evaluation.compare import compare

    log = RunLog(verbosity=verbosity)
    metrics = compare(targets, config, against=options.against, device=choose_device(device), log=log)
    _print_tables(log, metrics)
    return {"stage": "eval", **metrics}


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
    require_room([stage for stage in CHAIN if restart or not (run_dir / stage).is_dir()], recipe, run_dir, device)
    if restart or not (run_dir / CHAIN[0]).is_dir():
        _look_ahead(recipe, run_dir, device)
    if restart or not (run_dir / "pack").is_dir():
        _refuse_formats(recipe, run_dir, device)
    replaced = _replaced(run_dir, restart=restart)  # from here on --restart counts: nothing refused it
    if replaced and not restart:
        log.say("continuing `qat run --restart`: what it did not reach is made again")
    try:
        for stage in CHAIN:
            done[stage] = _run_stage(stage, recipe, run_dir, replaced, restart=restart, device=device, log=log)
            _update_report(run_dir, log, under_way=stage != CHAIN[-1])
        (run_dir / RESTART).unlink(missing_ok=True)
    except BaseException:
        _update_report(run_dir, log)
        raise
    metrics = done["eval"].facts["metrics"]
    _print_tables(log, metrics)
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
        "expectations": _expectations(log, recipe, metrics),
        "report": str(run_dir / report.HTML),
        "path": str(done["pack"].path),
    }


def _look_ahead(recipe: Recipe, run_dir: Path, device: str | None) -> None:
    """InputError or ResourceError for what the evaluation lacks: said before the hours of training."""
    from qatcli.evaluation.measure import check_ahead
    from qatcli.models.source import open_source

    if "gptq" in recipe.eval.baselines:
        try:
            require_room(["block-ap"], untrained_gptq(recipe), (run_dir / BASELINE).parent, device)
        except ResourceError as error:
            text = f"the baseline gptq of the evaluation: {error.message}"
            raise ResourceError(text, hint="take gptq out of eval.baselines") from error
    check_ahead(recipe.eval, open_source(**recipe.model.model_dump()).tokenizer())


def _refuse_formats(recipe: Recipe, run_dir: Path, device: str | None) -> None:
    """RecipeError for a format to export to that cannot hold the model: said before the hours of training."""
    from qatcli.plan import setting
    from qatcli.plan.report import refusal

    s = setting(recipe, choose_device(device), run_dir)
    for name in recipe.export.formats:
        if why := refusal(name, s):
            hint = f"take {name} out of export.formats, or {why.hint}"
            raise RecipeError(f"export.formats: {name} will be refused: {why.message}", hint=hint) from why


def _run_stage(
    stage: str,
    recipe: Recipe,
    run_dir: Path,
    replaced: Mapping[str, str],
    *,
    source: Path | None = None,
    **how: Any,
) -> StageDirectory:
    """`run_stage`, again where `replaced` has what is there; before an evaluation the baseline `gptq`, if it is asked
    for and the run has a calibration, and behind it what the recipe expects, for the report: a finished stage has the
    recipe that it was made with."""

    def outdated(name: str) -> bool:
        return name in replaced and recorded_digest(run_dir / name) == replaced[name]

    calibration, baseline = run_dir / "calibrate", (run_dir / BASELINE).parent
    if stage == "eval" and "gptq" in recipe.eval.baselines and calibration.is_dir():
        again = outdated(BASELINE)
        run_stage("block-ap", untrained_gptq(recipe), baseline, source=calibration, outdated=again, **how)
    done = run_stage(stage, recipe, run_dir, source=source, outdated=outdated(stage), **how)
    if stage == "eval":
        with suppress(OSError):  # what was made is worth more
            write_json(run_dir / EXPECT_FILE, recipe.model_dump(mode="json")["expect"])
    return done


def _replaced(run_dir: Path, *, restart: bool) -> dict[str, str]:
    """Stage -> digest of its result, where `qat run --restart` replaces it: this one, or one that was interrupted.

    Kept in a file: what the interrupted one did not reach was made from results that are gone, and would be refused.
    """
    file = run_dir / RESTART
    if restart and run_dir.is_dir():
        found = {stage: recorded_digest(run_dir / stage) for stage in (*CHAIN, BASELINE)}
        write_json(file, {stage: digest for stage, digest in found.items() if digest is not None})
    return read_json(file) if file.is_file() else {}


def _update_report(run_dir: Path, log: RunLog, *, under_way: bool = False) -> None:
    """Rewrite the run's page. A run is worth more than its page: what goes wrong here is a warning."""
    try:
        report.write_report(run_dir, under_way=under_way)
    except InputError:
        return  # the first stage was refused: there is nothing to report on
    except Exception as error:
        log.warn(f"the report was not written: {type(error).__name__}: {error}")


def _expectations(log: RunLog, recipe: Recipe, metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """What the recipe expects against what was measured, said and returned as data."""
    outcomes = check(recipe.model_dump()["expect"], metrics)
    for outcome in outcomes:
        log.say(f"{'reached' if outcome.passed else 'MISSED'}: {outcome.sentence()}")
    return [outcome.to_json() for outcome in outcomes]


def run_plan(
    recipe_file: Path, overrides: Sequence[str], *, run_dir: Path | None, device: str | None
) -> dict[str, Any]:
    """What the recipe will cost, and a table of it on stderr. The device need not be in this machine."""
    recipe, run_dir, log = _begin(recipe_file, overrides, run_dir, 0)
    import torch

    from qatcli.plan.report import make_plan, render

    elsewhere = re.fullmatch(r"cuda(:\d+)?", device or "") and not torch.cuda.is_available()
    plan = make_plan(recipe, torch.device("cuda") if elsewhere else choose_device(device), run_dir)
    wide(log.console).print(render(plan))
    return {"recipe": recipe_name(recipe_file), **plan}


def describe(path: Path, *, as_json: bool) -> str:
    """What a stage directory is, after its digests were verified."""
    stage = open_stage(path)
    facts = {key: value for key, value in stage.facts.items() if key != "files"}
    facts |= {"files": len(stage.facts["files"]), "verified": True}
    if as_json:
        return json.dumps(facts)
    made = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    # What was made: a recipe may have been given the model of another.
    grid = {**facts["recipe"]["quant"], **(made.get("quantization_config") or {})}
    lines = [
        f"{path}: {facts['kind']}, written by stage {facts['stage']} in {duration(facts['seconds'])}",
        f"input: {facts['input'] or facts['recipe']['model']['source']}",
        f"bits: {grid['bits']}, group size: {grid['group_size']}",
        f"files: {facts['files']}, every sha256 verified",
    ]
    return "\n".join(lines)


def _print_tables(log: RunLog, metrics: dict[str, Any]) -> None:
    from qatcli.evaluation.tables import tables

    if log.verbosity >= 0:
        for table in tables(metrics):
            wide(log.console).print(table)


def _given_source(source: str | None) -> Path | None:
    """The --from directory; `-` reads it from standard input."""
    if source != "-":
        return None if source is None else Path(os.path.expanduser(source))
    line = sys.stdin.readline().strip() if sys.stdin else ""  # None where it is closed
    if not line:
        raise UsageError("--from -: standard input is empty", hint="pipe the previous stage's output into it")
    if line.startswith("{"):
        raise UsageError("--from -: standard input is JSON", hint="leave --json out of the command in front")
    return Path(line)


def _begin(
    recipe_file: Path, overrides: Sequence[str], run_dir: Path | None, verbosity: int
) -> tuple[Recipe, Path, RunLog]:
    """What every command starts with: the recipe, its run directory and the log. The recipe is checked first."""
    recipe = load_recipe(recipe_file, overrides)
    _quiet_libraries()
    return recipe, run_dir or Path("runs") / recipe_name(recipe_file), RunLog(verbosity=verbosity)


def _quiet_libraries() -> None:
    """Silence the progress bars of libraries, ours says what is going on, and what torchao says when it is imported."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported, by lm-eval among others
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from datasets import disable_progress_bars
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    disable_progress_bars()
