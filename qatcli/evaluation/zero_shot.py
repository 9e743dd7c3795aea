"""Zero-shot accuracy through lm-eval: from its hub data sets, or from local files where there is no network."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from qatcli.errors import InputError, RecipeError, missing_extra
from qatcli.evaluation.local_tasks import LOCAL_TASKS, file_digest, override
from qatcli.expectations import is_accuracy
from qatcli.runlog import RunLog

_BOOTSTRAPS = 1000  # only metrics without a formula for their error need them; accuracy has one


@dataclass(frozen=True)
class Suite:
    """Tasks ready to run. `protocol` says what they are, for the report and for cached results."""

    names: tuple[str, ...]
    loaded: Any
    limit: int | None
    protocol: dict[str, Any]


def load_suite(names: Sequence[str], *, data: Path | None, limit: int | None) -> Suite:
    """Build the tasks, which reads their rows.

    data: folder of local files for the five tasks of `LOCAL_TASKS`; other tasks, and all without it, come from the hub.
    limit: rows of each task, from its start; None is all. QatError when lm-eval is not installed, RecipeError for a
    task it does not know, InputError for data that are missing.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise missing_extra("lm-eval", "eval")
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    logging.getLogger("lm_eval").propagate = False
    folder = Path(lm_eval.tasks.__file__).parent
    local = [name for name in names if data is not None and name in LOCAL_TASKS]
    others = set(names) - LOCAL_TASKS.keys()
    # lm-eval has thousands of task files; the five are found without reading them all
    few = [folder / name for name in ("hellaswag", "piqa", "winogrande", "arc")]
    manager = TaskManager() if others else TaskManager(include_defaults=False, include_path=few)
    unknown = sorted(others - set(manager.all_tasks))
    if unknown:
        raise RecipeError(f"zero_shot: lm-eval has no task {unknown[0]}", hint="`lm-eval ls tasks` lists them")
    # a group's members may override keys of the task they name: here the rows, and nothing else
    members = [override(name, data) for name in local if data is not None]
    spec: list[Any] = [name for name in names if name not in local]
    try:
        loaded = manager.load([*spec, *([{"group": "local", "task": members}] if members else [])])
    except (OSError, ConnectionError, ValueError) as error:
        raise InputError(
            f"the data of {', '.join(spec) or 'the tasks'} could not be read: {error}",
            hint="check the network, or give a folder of local files: --data, in a recipe eval.zero_shot.data",
        ) from error
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    loaded["groups"] = {name: group for name, group in loaded["groups"].items() if name != "local"}
    rows = {name: file_digest(name, data) for name in local if data is not None}
    protocol = {
        "tasks": list(names),
        "limit": limit,
        "rows": rows | {name: _fingerprint(task) for name, task in loaded["tasks"].items() if name not in rows},
        "lm_eval": version("lm_eval"),
    }
    return Suite(tuple(names), loaded, limit, protocol)


def run_suite(
    suite: Suite,
    model: Any,
    tokenizer: Any,
    *,
    batch_tokens: int,
    dtype: torch.dtype,
    log: RunLog,
    title: str,
) -> dict[str, Any]:
    """Every task's figures and the mean accuracy of the asked ones.

    {"tasks": {name: {metric, value, stderr, shots, rows, all}}, "average": {value, stderr, tasks} or None}. `metric` is
    `acc` where the task has it, else its first; `all` holds every metric. A group's members are among the tasks, but
    the mean is of what was asked for, the group itself. It weighs tasks equally and its error treats them as
    independent.
    """
    from lm_eval.evaluator import evaluate

    from qatcli.evaluation.harness import RowModel

    for task in suite.loaded["tasks"].values():
        task.set_fewshot_seed(seed=1234)  # each task draws its examples on and on: every model gets the same
    lm = RowModel(model, tokenizer, batch_tokens=batch_tokens, dtype=dtype, log=log, title=title)
    found = evaluate(lm, suite.loaded, limit=suite.limit, bootstrap_iters=_BOOTSTRAPS, log_samples=False)
    shots, rows = found["n-shot"], found["n-samples"]
    tasks = {
        name: _figures(figures) | {"shots": shots.get(name), "rows": rows.get(name, {}).get("effective")}
        for name, figures in found["results"].items()
    }
    return {"tasks": tasks, "average": average([tasks[name] for name in suite.names if name in tasks])}


def average(tasks: Sequence[dict[str, Any]]) -> dict[str, float | None] | None:
    """The mean of the accuracies among the tasks, its standard error if all have one, and how many there are.

    None for fewer than two. A perplexity has no mean with them, and a group that lm-eval does not sum up has no value.
    """
    found = [task for task in tasks if is_accuracy(task["metric"]) and task["value"] is not None]
    if len(found) < 2:
        return None
    errors = [task["stderr"] for task in found]
    known = all(error is not None for error in errors)
    return {
        "value": sum(task["value"] for task in found) / len(found),
        "stderr": math.sqrt(sum(error**2 for error in errors)) / len(errors) if known else None,
        "tasks": len(found),
    }


def _figures(figures: dict[str, Any]) -> dict[str, Any]:
    """lm-eval's `{"acc,none": 0.5, "acc_stderr,none": 0.1, ...}` with the metric that counts taken out.

    Where it filtered the answers in several ways (gsm8k), the first counts.
    """
    metrics: dict[str, Any] = {}
    for key, value in figures.items():
        if "," in key:
            known = isinstance(value, int | float) and math.isfinite(value)
            metrics.setdefault(key.split(",")[0], value if known else None)
    metric = "acc" if "acc" in metrics else next(iter(metrics), "")
    errors = metrics.get(f"{metric}_stderr")
    return {"metric": metric, "value": metrics.get(metric), "stderr": errors, "all": metrics}


def _fingerprint(task: Any) -> str:
    """sha256 of the rows of a task from the hub."""
    digest = hashlib.sha256()
    for row in task.eval_docs:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()
