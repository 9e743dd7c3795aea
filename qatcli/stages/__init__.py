"""The stages as a table, and the one lifecycle they all run in.

A stage is a function `run(job) -> metrics` from an input directory to an output directory. Everything that is not
the algorithm happens here: finding and checking the input, refusing a resume that would mix two recipes, locking,
timing, peak memory, provenance, commit.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import platform
import time
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from qatcli import directory
from qatcli.directory import StageDirectory
from qatcli.errors import InputError, UsageError
from qatcli.recipe import Recipe, digest
from qatcli.runlog import RunLog, duration

if TYPE_CHECKING:
    import torch

PROC_STATUS, PROC_CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
VERSIONED = ("qatcli", "torch", "transformers", "safetensors", "triton")
# Keys that change where and how fast a stage runs but not what it computes: a resume may change them.
FREE_KEYS = {"block_ap": ("cache",), "e2e_qp": ("checkpoint_every",), "export": ("formats",)}


@dataclass(frozen=True)
class Stage:
    """One row of the table.

    `module` holds `run`; `after` is the stage whose directory is the default input (None: the recipe's model);
    `reads` are the kinds it accepts; `sections` are the recipe sections its result depends on, beside the input's.
    """

    module: str
    after: tuple[str, ...]
    reads: tuple[str, ...]
    writes: str
    sections: tuple[str, ...]


STAGES = {
    "import": Stage("importing", (), ("checkpoint",), "packed", ("model",)),
    "calibrate": Stage("calibrate", (), (), "calibration", ("model", "quant", "calibrate")),
    "block-ap": Stage("block_ap", ("calibrate",), ("calibration",), "quantized", ("model", "quant", "block_ap")),
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
    device: str | None = None,
    log: RunLog | None = None,
) -> StageDirectory:
    """Run one stage to its end, or return its directory if the same recipe and input already finished it.

    With a `variant` the directory is `<stage>/<variant>`. Resumes an interrupted run of the same stage.
    Errors: UsageError when recipe or input differ from what is there, InputError when the input is missing or damaged,
    and whatever the stage raises.
    """
    stage = STAGES[name]
    log = log or RunLog()
    chosen = _device(device)
    path = run_dir / name / variant
    with directory.locked(path):
        given = _open_input(stage, run_dir, source)
        identity = _identity(stage, recipe, given) | ({"variant": variant} if variant else {})
        if path.is_dir() and not restart:
            finished = directory.open_stage(path)
            directory.refuse_changes(finished.facts["identity"], identity, path)
            log.say(f"{name}: already finished in {path}")
            return finished
        partial = directory.begin(path, identity, restart=restart)
        return _run(name, stage, Job(recipe, given, partial, run_dir, log, chosen, variant), path, identity)


def _run(name: str, stage: Stage, job: Job, path: Path, identity: dict[str, Any]) -> StageDirectory:
    run = importlib.import_module(f"qatcli.stages.{stage.module}").run
    log = job.log.to_file(job.out / directory.LOG_FILE)
    log.event("start", stage=name, device=str(job.device))
    _reset_peak(job.device)
    started = time.monotonic()
    metrics = run(replace(job, log=log))
    seconds = time.monotonic() - started
    log.event("done", stage=name, seconds=round(seconds, 3), metrics=metrics)
    facts = {
        "stage": name,
        "kind": stage.writes,
        "identity": identity,
        "input": None if job.source is None else str(job.source.path),
        "recipe": job.recipe.model_dump(mode="json"),
        "recipe_digest": digest(job.recipe),
        "seconds": round(seconds, 3),
        "peak_memory": _peak_memory(job.device),
        "device": str(job.device),
        "machine": f"{platform.machine()} {platform.system()}",
        "versions": {package: _version(package) for package in VERSIONED},
        "metrics": metrics,
    }
    finished = directory.commit(path, job.out, facts)
    job.log.say(f"{name}{' ' + job.variant if job.variant else ''}: done in {duration(seconds)}, {path}")
    return finished


def _open_input(stage: Stage, run_dir: Path, source: Path | None) -> StageDirectory | None:
    if stage.reads == ("checkpoint",):
        if source is None:
            raise UsageError("import needs --from", hint="give the directory of a GPTQ, AWQ or EfficientQAT checkpoint")
        return directory.foreign_checkpoint(source)
    if not stage.after:
        if source is not None:
            raise UsageError("the first stage takes no --from: its input is the recipe's model.source")
        return None
    if source is not None:
        return directory.open_stage(source, kinds=stage.reads)
    for predecessor in stage.after:
        if (run_dir / predecessor).is_dir():
            return directory.open_stage(run_dir / predecessor, kinds=stage.reads)
        if (run_dir / f"{predecessor}.partial").is_dir():
            break
    missing = run_dir / stage.after[0]
    raise InputError(
        f"{missing} does not exist or is not finished",
        hint=f"run `qat {stage.after[0]}` with the same recipe and --run first, `qat run` for the whole chain, "
        "or give another input with --from",
    )


def _identity(stage: Stage, recipe: Recipe, source: StageDirectory | None) -> dict[str, Any]:
    """What the stage's result depends on; two runs of equal identity give equal bits."""
    dump = recipe.model_dump(mode="json")
    sections = {}
    for section in stage.sections:
        free = FREE_KEYS.get(section, ())
        sections[section] = {key: value for key, value in dump[section].items() if key not in free}
    return json.loads(json.dumps({**sections, "input": None if source is None else source.digest}))


def _device(name: str | None) -> torch.device:
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UsageError(f"--device {name} is not a device", hint="use cpu, cuda or cuda:1") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name} is not supported", hint="use cpu, cuda or cuda:1")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {name}: torch sees no CUDA device", hint="use --device cpu, or see `qat doctor`")
    return device


def _peak_memory(device: torch.device) -> dict[str, int]:
    """Bytes: the process's resident peak since `_reset_peak`, and the device's peak."""
    import torch

    lines = PROC_STATUS.read_text().splitlines() if PROC_STATUS.exists() else []
    host = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)
    peak = {"host_bytes": host or psutil.Process().memory_info().rss}
    if device.type == "cuda":
        peak["device_bytes"] = torch.cuda.max_memory_allocated(device)
    return peak


def _reset_peak(device: torch.device) -> None:
    """Start a new peak for this stage, where the system lets us."""
    import torch

    with contextlib.suppress(OSError):
        PROC_CLEAR.write_text("5")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
