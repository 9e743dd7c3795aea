"""The stages as a table, and the one lifecycle they all run in.

A stage is a function `run(job) -> metrics` from an input directory to an output directory. Everything that is not
the algorithm happens here: finding and checking the input, refusing a resume that would mix two recipes, locking,
timing, peak memory, provenance, commit.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qatcli import directory
from qatcli.directory import StageDirectory
from qatcli.errors import InputError, UsageError
from qatcli.events import read_log
from qatcli.finite import finite
from qatcli.inputs import content_digest, read_json
from qatcli.machine import device_name
from qatcli.memory import peak_memory, start_peak
from qatcli.recipe import Recipe, digest
from qatcli.runlog import RunLog, duration
from qatcli.trackers import open_trackers

if TYPE_CHECKING:
    import torch

    from qatcli.models.source import ModelSource

VERSIONED = ("qatcli", "torch", "transformers", "safetensors", "triton")
RESUMED = ("calibrate", "block-ap", "e2e-qp")  # what computes, and goes on where it was interrupted
# Keys that change where and how fast a stage runs but not what it computes: a resume may change them.
FREE_KEYS = (
    *("block_ap.cache", "export.formats", "eval.cache"),
    *("e2e_qp.micro_batch_size", "e2e_qp.gradient_checkpointing"),  # sums in another order
)
NAMING_FILES = ("source", "file", "data")


@dataclass(frozen=True)
class Stage:
    """One row of the table.

    `module` holds `run`; `after` are the stages whose directory is the default input, the first that is there (none:
    the recipe's model); `reads` are the kinds it accepts; `keys` are the recipe's sections and keys its result depends
    on, beside the input's.
    """

    module: str
    after: tuple[str, ...]
    reads: tuple[str, ...]
    writes: str
    keys: tuple[str, ...]


STAGES = {
    "import": Stage("importing", (), ("checkpoint",), "packed", ("model",)),
    "calibrate": Stage("calibrate", (), (), "calibration", ("model", "quant", "calibrate", "block_ap.amp")),
    "block-ap": Stage(
        "block_ap",
        ("calibrate",),
        ("calibration",),
        "quantized",
        ("model", "quant", "calibrate.seed", "calibrate.moment_samples", "block_ap"),
    ),
    "e2e-qp": Stage("e2e_qp", ("block-ap",), ("quantized", "packed"), "quantized", ("model", "calibrate", "e2e_qp")),
    "pack": Stage("pack", ("e2e-qp", "block-ap"), ("quantized", "calibration"), "packed", ("pack",)),
    "export": Stage("export", ("pack",), ("packed",), "exported", ("export",)),
    "eval": Stage("evaluate", ("pack",), ("packed", "quantized", "calibration"), "metrics", ("model", "eval", "quant")),
}


@dataclass(frozen=True)
class Job:
    """What a stage's `run` gets: the recipe, its input (None for the first stage), where to write, log and device.

    `variant` names the format of an export; other stages have none.
    """

    recipe: Recipe
    source: StageDirectory | None
    out: Path
    run_dir: Path
    log: RunLog
    device: torch.device
    variant: str = ""

    @property
    def input(self) -> StageDirectory:
        """The input of a stage that has one."""
        assert self.source is not None
        return self.source


def run_stage(
    name: str,
    recipe: Recipe,
    run_dir: Path,
    *,
    variant: str = "",
    source: Path | None = None,
    restart: bool = False,
    outdated: bool = False,
    device: str | None = None,
    log: RunLog | None = None,
) -> StageDirectory:
    """Run one stage to its end, or return its directory if the same recipe and input already finished it.

    With a `variant` the directory is `<stage>/<variant>`. Resumes an interrupted run of the same stage. `restart` makes
    it again from nothing, `outdated` what is finished, but not what is begun.
    Errors: InputError when recipe or input differ from what is there, or the input is missing or damaged; UsageError
    when another process is at work; and whatever the stage raises.
    """
    from qatcli.plan import require  # loads torch and transformers

    stage = STAGES[name]
    log = log or RunLog()
    chosen = choose_device(device)
    path = run_dir / name / variant
    with directory.locked(path):
        directory.recover(path)
        given = _open_input(stage, recipe, run_dir, source)
        identity = _identity(stage, recipe, given) | ({"variant": variant} if variant else {})
        # Unfinished work of the same identity beside a finished stage is an interrupted --restart: it is continued.
        begun = not restart and directory.is_begun(path, identity)
        restart |= outdated and not begun
        if path.is_dir() and not restart and not begun:
            finished = directory.open_stage(path)
            directory.refuse_changes(finished.facts["identity"], identity, path)
            log.say(f"{name}: already finished in {path}")
            return finished
        if doubt := require(recipe, name, variant, device=chosen, out=directory.partial_of(path)):
            log.warn(doubt)
        partial = directory.begin(path, identity, restart=restart)
        return _run(name, stage, Job(recipe, given, partial, run_dir, log, chosen, variant), path, identity)


def require_room(names: Iterable[str], recipe: Recipe, run_dir: Path, device: str | None) -> None:
    """ResourceError when one of these stages cannot run on this machine: said before the hours of those in front."""
    from qatcli.plan import require

    chosen = choose_device(device)
    for name in names:
        require(recipe, name, "", device=chosen, out=directory.partial_of(run_dir / name))


def _run(name: str, stage: Stage, job: Job, path: Path, identity: dict[str, Any]) -> StageDirectory:
    run = importlib.import_module(f"qatcli.stages.{stage.module}").run
    trackers = open_trackers(job.recipe.track, job.run_dir, f"{name}-{job.variant}" if job.variant else name)
    before = read_log(job.out, [])  # of an interrupted run that this one continues
    earlier = before.seconds or 0.0
    versions = {package: _version(package) for package in VERSIONED}
    with job.log.stage(job.out / directory.LOG_FILE, trackers) as log:
        recipe = job.recipe.model_dump(mode="json")
        log.event("start", stage=name, device=str(job.device), versions=versions, recipe=recipe)
        others = [f"{name_} {was}" for name_, was in before.versions.items() if was not in (None, versions.get(name_))]
        if others and name in RESUMED:
            log.warn(f"{name}: worked on with {', '.join(others)} before: an uninterrupted run may differ")
        start_peak(job.device)
        started = time.monotonic()
        metrics = finite(run(replace(job, log=log)))
        seconds = earlier + time.monotonic() - started
        log.event("done", stage=name, seconds=round(seconds, 3), metrics=metrics)
    facts = {
        "stage": name,
        "kind": stage.writes,
        "identity": identity,
        "input": None if job.source is None else str(job.source.path.absolute()),
        "recipe": recipe,
        "recipe_digest": digest(job.recipe),
        "seconds": round(seconds, 3),
        "peak_memory": peak_memory(job.device),
        "device": str(job.device),
        "machine": f"{device_name(job.device)}, {platform.machine()} {platform.system()}",
        "versions": versions,
        "metrics": metrics,
        "model_fingerprint": metrics.get("model_fingerprint") or _fingerprint(job.source),
    }
    if job.source is not None:
        _refuse_replaced_meanwhile(job.source)
    finished = directory.commit(path, job.out, facts)
    job.log.say(f"{name}{' ' + job.variant if job.variant else ''}: done in {duration(seconds)}, {path}")
    return finished


def _open_input(stage: Stage, recipe: Recipe, run_dir: Path, source: Path | None) -> StageDirectory | None:
    if stage.reads == ("checkpoint",):
        if source is None:
            raise UsageError("import needs --from", hint="give the directory of another tool's checkpoint")
        return directory.foreign_checkpoint(source)
    if not stage.after:
        if source is not None:
            raise UsageError("the first stage takes no --from: its input is the recipe's model.source")
        return None
    if source is not None:
        return directory.open_stage(source, kinds=stage.reads)
    for predecessor in stage.after:
        if (run_dir / predecessor).is_dir():
            found = directory.open_stage(run_dir / predecessor, kinds=stage.reads)
            _refuse_another_recipe(predecessor, found, recipe)
            _refuse_replaced(found, run_dir)
            return found
        if directory.partial_of(run_dir / predecessor).is_dir():
            break
    missing = run_dir / stage.after[0]
    raise InputError(
        f"{missing} does not exist or is not finished",
        hint=f"run `qat {stage.after[0]}` with the same recipe and --run first, `qat run` for the whole chain, "
        "or give another input with --from",
    )


def _refuse_replaced(found: StageDirectory, run_dir: Path) -> None:
    """InputError when a stage in the run directory was made from one there that has been made again since."""
    while name := found.facts.get("input"):
        file = run_dir / Path(name).name / directory.STAGE_FILE
        if Path(name).resolve() != file.parent.resolve() or not file.is_file():
            return
        if directory.result_digest(file.parent) != found.facts["identity"].get("input"):
            raise InputError(
                f"{found.path} was made from a {file.parent.name} that has been made again since",
                hint=f"run `qat {found.path.name} --restart` and the stages after it, or, if it is meant, give it with "
                "--from",
            )
        found = StageDirectory(file.parent, read_json(file))


def _refuse_replaced_meanwhile(source: StageDirectory) -> None:
    """InputError when the input was made again while the stage read it, tensor by tensor: it would mix the two."""
    if source.kind != "checkpoint" and directory.result_digest(source.path) != source.digest:
        raise InputError(
            f"{source.path} was made again while this stage read it", hint="begin the stage again with --restart"
        )


def _refuse_another_recipe(name: str, found: StageDirectory, recipe: Recipe) -> None:
    """InputError when a stage in the run directory was made by another recipe, or one that was edited since.

    An input that is given with --from may come from any recipe.
    """
    keys: list[str] = []
    names = [name]
    for name_ in names:  # grows: a stage and all before it
        keys += STAGES[name_].keys
        names += STAGES[name_].after
    made_from = _settings(keys, found.facts["recipe"])
    try:
        directory.refuse_changes(made_from, _settings(keys, recipe.model_dump(mode="json")), found.path)
    except InputError as error:
        hint = f"run `qat {name}` with --restart, put the recipe back, use another --run, or give --from {found.path}"
        raise InputError(error.message, hint=hint) from error


def _identity(stage: Stage, recipe: Recipe, source: StageDirectory | None) -> dict[str, Any]:
    """What the stage's result depends on; two runs of equal identity give equal bits."""
    settings = _settings(stage.keys, recipe.model_dump(mode="json"))
    given = {"content": dict(_contents(settings)), "input": None if source is None else source.digest}
    return json.loads(json.dumps({**settings, **given}))


def _contents(settings: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, str]]:
    """Where settings name local files, whose paths a recipe has made absolute, and what is in these: a file that was
    edited is another input."""
    for key, value in settings.items():
        if isinstance(value, list | tuple):
            value = dict(enumerate(value))
        if isinstance(value, dict):
            yield from _contents(value, f"{place}{key}.")
        elif (
            key in NAMING_FILES
            and isinstance(value, str)
            and os.path.isabs(value)
            and (digest := content_digest(value))
        ):
            yield f"{place}{key}", digest


def _settings(keys: Iterable[str], recipe: dict[str, Any]) -> dict[str, Any]:
    """The part of a dumped recipe that `keys` (`section` or `section.key`) name, without the free keys."""
    chosen: dict[str, Any] = {}
    for section, _, only in (key.partition(".") for key in keys):
        for key, value in dict(recipe.get(section) or {}).items():
            if only in ("", key) and f"{section}.{key}" not in FREE_KEYS:
                chosen.setdefault(section, {})[key] = value
    return chosen


def open_model(job: Job) -> ModelSource:
    """The recipe's full-precision model. InputError when it is not, or the job's input was made from another one."""
    from qatcli.models.source import open_source

    source = open_source(**job.recipe.model.model_dump())
    if source.quantized:
        raise InputError(
            f"model.source {job.recipe.model.source} is quantized already: its config.json says so",
            hint="give the full-precision model; `qat import` and `qat eval` read quantized ones",
        )
    made_from = _fingerprint(job.source)
    if made_from not in (None, source.fingerprint):
        raise InputError(
            f"{job.input.path} was made from another model than model.source {job.recipe.model.source}",
            hint="point model.source at that model, or begin again with `qat run --restart` and this one",
        )
    return source


def _fingerprint(stage: StageDirectory | None) -> str | None:
    """Of the full-precision model at the start of a chain; None for what came from elsewhere."""
    return stage.facts.get("model_fingerprint") if stage else None


def choose_device(name: str | None) -> torch.device:
    """The device that --device names, by default the GPU if there is one. UsageError when it cannot be used.

    It becomes torch's current one, by which libraries and figures of memory go.
    """
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UsageError(f"--device {name} is not a device", hint="use cpu, cuda or cuda:1") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name} is not supported", hint="use cpu, cuda or cuda:1")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {name}: torch sees no CUDA device", hint="use --device cpu, or see `qat doctor`")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: there are {torch.cuda.device_count()}, counted from 0")
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
