"""The facts of a run directory, from what its stages left: the content of report.json (docs/report.md).

A half-finished stage tells what its log holds so far. Files are read as data that anybody may have written: what is
missing is left out, what cannot be read becomes a problem that the page shows, and no stage is opened for its tensors.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from qatcli import __version__
from qatcli.directory import BASELINE, CHAIN, EXPECT_FILE, LOG_FILE, STAGE_FILE, at_work, partial_of, stage_of
from qatcli.errors import InputError
from qatcli.events import Log, read_log
from qatcli.expectations import check
from qatcli.finite import finite
from qatcli.inputs import read_json
from qatcli.report.evaluation import evaluation, is_number, mapping

FORMAT_VERSION = 1
STAGES = ("import", *CHAIN[:-1], BASELINE, CHAIN[-1])  # in the order in which a run comes to them
ROUNDED, TRAINED = "relative_error", "relative_error_after"
PROVENANCE = ("input", "digest", "model_fingerprint", "recipe_digest", "device", "machine")


def collect(run_dir: Path, *, under_way: bool = False) -> dict[str, Any]:
    """Everything that is known about a run. InputError when no stage was ever begun in `run_dir`."""
    if not os.path.isdir(run_dir):  # false, and no error, for a name that no directory can have
        raise InputError(f"{run_dir} is not a directory", hint="name a run directory, such as runs/smollm2/w2g64")
    problems: list[str] = []
    stages = [_stage(run_dir, name, problems) for name in STAGES]
    exports = [_stage(run_dir, f"export/{name}", problems) for name in _export_names(run_dir)]
    logs = {stage["name"]: stage.pop("log") for stage in stages + exports}
    metrics = {stage["name"]: stage.pop("metrics") for stage in stages + exports}
    begun = [stage for stage in stages + exports if stage["status"] != "waiting"]
    if all(stage["name"] == BASELINE for stage in begun):  # of no run: one that is called `gptq`, in this folder
        raise _no_run(run_dir)
    recipe, recipe_digest = _recipe(begun)
    if (run_dir / EXPECT_FILE).exists():
        try:
            recipe = {**recipe, "expect": read_json(run_dir / EXPECT_FILE)}
        except InputError as error:
            problems.append(error.message)
    measured = _evaluation(metrics["eval"], logs["eval"])
    unneeded = ("waiting", "stopped") if stages[-1]["status"] == "finished" else ("waiting",)  # for the evaluation
    stages = [stage for stage in stages if stage["name"] in CHAIN or stage["status"] not in unneeded]
    return finite(
        {
            "format_version": FORMAT_VERSION,
            "qat": __version__,
            "problems": problems,
            "run": {
                "name": "/".join(run_dir.resolve().parts[-2:]),
                "path": str(run_dir.resolve()),
                "status": "running" if under_way else _status(stages, exports),
                "written": round(time.time(), 3),
                "started": min((stage["started"] for stage in begun if stage["started"]), default=None),
                "ended": max((stage["ended"] for stage in begun if stage["ended"]), default=None),
                "seconds": round(sum(stage["seconds"] or 0 for stage in begun), 3),
            },
            "recipe": recipe,
            "recipe_digest": recipe_digest,
            "stages": [{key: value for key, value in stage.items() if key != "recipe"} for stage in stages],
            "blocks": _blocks(logs["calibrate"], logs["block-ap"]),
            "layers": _layers(logs["calibrate"], logs["block-ap"]),
            "calibration": metrics["calibrate"],
            "e2e_qp": _end_to_end(logs["e2e-qp"], metrics["e2e-qp"]),
            "evaluation": measured,
            "expectations": _expectations(recipe, measured) if metrics["eval"] else [],
            "exports": [
                {key: value for key, value in stage.items() if key != "recipe"}
                | {"format": stage["name"].removeprefix("export/"), **_export(metrics[stage["name"]])}
                for stage in exports
            ],
        }
    )


def _stage(run_dir: Path, name: str, problems: list[str]) -> dict[str, Any]:
    """What is known of one stage; `waiting` when nothing is there."""
    path = run_dir / name
    partial = partial_of(path)
    working = at_work(path)
    facts: dict[str, Any] = {}
    if (path / STAGE_FILE).exists():
        try:
            facts = read_json(path / STAGE_FILE)
        except InputError as error:
            problems.append(error.message)
    again = working and partial.is_dir()  # a stage that is being made again shows the new work
    log = read_log(partial if again or not path.is_dir() else path, problems)
    status = "finished" if path.is_dir() and not again else "waiting"
    if status == "waiting" and (working or partial.is_dir()):
        status = "running" if working else "stopped"
    recipe = facts.get("recipe") or log.recipe
    return {
        "name": name,
        "status": status,
        "started": log.started,
        "ended": log.ended,
        "seconds": facts["seconds"] if is_number(facts.get("seconds")) and not again else log.seconds,
        "sessions": log.sessions,
        "peak_memory": {k: v for k, v in mapping(facts.get("peak_memory")).items() if is_number(v)} or log.peak_memory,
        "progress": log.progress if status in ("running", "stopped") else None,
        "error": log.error if status == "stopped" else None,
        "warnings": log.warnings,
        **{key: facts.get(key) for key in PROVENANCE},
        "versions": mapping(facts.get("versions")),
        "files": len(mapping(facts.get("files"))),
        "recipe": mapping(recipe),
        "metrics": mapping(facts.get("metrics")),
        "log": log,
    }


def _status(stages: list[dict[str, Any]], exports: list[dict[str, Any]]) -> str:
    """`running`, `stopped` inside a stage, `finished` (evaluated, and nothing begun is open) or `incomplete`."""
    found = {stage["status"] for stage in stages + exports}
    for status in ("running", "stopped"):
        if status in found:
            return status
    return "finished" if stages[-1]["status"] == "finished" else "incomplete"


def _recipe(begun: list[dict[str, Any]]) -> tuple[dict[str, Any], str | None]:
    """The recipe of the stage that was begun last, and its digest where that stage is finished.

    The baseline's is another recipe's.
    """
    latest = max(begun, key=lambda stage: (stage["name"] != BASELINE, stage["started"] or 0))
    return latest["recipe"], latest["recipe_digest"]


def _blocks(calibrate: Log, block_ap: Log) -> list[dict[str, Any]]:
    """Per block: mean error of its weights as rounded and as trained, losses before, during and after, their cost."""
    rows: dict[int, dict[str, Any]] = {}
    for log, key in ((calibrate, ROUNDED), (block_ap, TRAINED)):
        for event in log.of("block"):
            if not isinstance(event.get("index"), int):
                continue
            known = {name: value for name, value in event.items() if name not in ("time", "event", "index", ROUNDED)}
            errors = _errors(event).values()
            rows.setdefault(event["index"], {}).update(known | ({key: sum(errors) / len(errors)} if errors else {}))
    return [{"index": index, **rows[index]} for index in sorted(rows) if rows[index]]


def _layers(calibrate: Log, block_ap: Log) -> list[dict[str, Any]]:
    """Relative error of every linear's weight, as rounded and as trained by block-ap, in the order of the model."""
    found: dict[str, dict[str, Any]] = {}
    for log, key in ((calibrate, ROUNDED), (block_ap, TRAINED)):
        for event in log.of("block"):
            for name, value in _errors(event).items() if isinstance(event.get("index"), int) else ():
                row = {"name": name, "block": event["index"], ROUNDED: None, TRAINED: None}
                found.setdefault(name, row)[key] = value
    return list(found.values())


def _errors(event: dict[str, Any]) -> dict[str, float]:
    """The relative error of every linear that a stage's `block` event names."""
    return {name: value for name, value in mapping(event.get("relative_error")).items() if is_number(value)}


def _end_to_end(log: Log, metrics: dict[str, Any]) -> dict[str, Any]:
    """Learning curves as [update, loss] pairs. Updates repeated after an interruption count once, the last time."""
    train = {event["step"]: event.get("loss") for event in log.of("step") if is_number(event.get("step"))}
    held_out = {event["step"]: event.get("loss") for event in log.of("validation") if is_number(event.get("step"))}
    return {
        **metrics,
        "train": [[step, train[step]] for step in sorted(train)],
        "held_out": [[step, held_out[step]] for step in sorted(held_out)],
    }


def _evaluation(metrics: dict[str, Any], log: Log) -> dict[str, Any]:
    """The evaluation's metrics, or the models that an unfinished evaluation has measured so far."""
    measured = {str(event.get("model")): event for event in log.of("measured")}
    models = {
        name: {key: value for key, value in event.items() if key not in ("time", "event", "model")}
        for name, event in measured.items()
    }
    return evaluation(metrics or {"models": models})


def _expectations(recipe: dict[str, Any], measured: dict[str, Any]) -> list[dict[str, Any]]:
    expect = {name: mapping(wanted) for name, wanted in mapping(recipe.get("expect")).items()}
    readable = {n: w for n, w in expect.items() if is_number(w.get("value")) and is_number(w.get("tolerance"))}
    return [outcome.to_json() for outcome in check(readable, measured)]


def _export(metrics: dict[str, Any]) -> dict[str, Any]:
    found = mapping(metrics.get("verification"))
    notes = found.get("notes")
    verification = {**found, "notes": notes if isinstance(notes, list) else []}
    return {"bytes": metrics.get("bytes"), "verified": metrics.get("verified") is True, "verification": verification}


def _export_names(run_dir: Path) -> list[str]:
    folder = run_dir / "export"
    return sorted({stage_of(path) for path in folder.iterdir() if path.is_dir()}) if folder.is_dir() else []


def _no_run(run_dir: Path) -> InputError:
    logs = (Path(folder) for folder, _, files in os.walk(run_dir) if LOG_FILE in files)
    below = sorted({str(log.parent) for log in logs if stage_of(log) in (*CHAIN, "import")})
    hint = f"runs below it: {', '.join(below[:5])}" if below else "start one with `qat run RECIPE`"
    return InputError(f"{run_dir} is not a run directory: it holds no stage", hint=hint)
