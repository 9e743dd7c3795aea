"""lm-eval's own five tasks on local files: the definitions stay lm-eval's, only where the rows come from changes.

    hellaswag      hellaswag_val.jsonl       activity_label, ctx_a, ctx_b, endings, label
    piqa           piqa_val.jsonl            goal, sol1, sol2, label
    winogrande     winogrande_xl_val.jsonl   sentence, option1, option2, answer
    arc_easy       arc_easy_test.jsonl       question, choices, gold (or answerKey, with choices {text, label})
    arc_challenge  arc_challenge_test.jsonl  the same

Prompts, choices and scoring are those of the installed lm-eval, so they cannot drift from it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from qatcli.data.files import Row, read_rows
from qatcli.errors import InputError
from qatcli.inputs import sha256


@dataclass(frozen=True)
class LocalTask:
    """The file of one task, the split it replaces and the keys that lm-eval's definition reads."""

    file: str
    split: str
    keys: tuple[str, ...]
    convert: Callable[[Row], Row] = dict


def _arc(row: Row) -> Row:
    """The hub's form of an ARC row; `gold` is the index of the right choice."""
    if "gold" not in row:
        return row
    labels = list(ascii_uppercase[: len(row["choices"])])
    return {**row, "choices": {"text": row["choices"], "label": labels}, "answerKey": labels[row["gold"]]}


_ARC_KEYS = ("question", "choices", "answerKey")
LOCAL_TASKS = {
    "hellaswag": LocalTask(
        "hellaswag_val.jsonl", "validation", ("activity_label", "ctx_a", "ctx_b", "endings", "label")
    ),
    "piqa": LocalTask("piqa_val.jsonl", "validation", ("goal", "sol1", "sol2", "label")),
    "winogrande": LocalTask("winogrande_xl_val.jsonl", "validation", ("sentence", "option1", "option2", "answer")),
    "arc_easy": LocalTask("arc_easy_test.jsonl", "test", _ARC_KEYS, _arc),
    "arc_challenge": LocalTask("arc_challenge_test.jsonl", "test", _ARC_KEYS, _arc),
}


def override(name: str, folder: Path) -> dict[str, Any]:
    """What turns lm-eval's task `name` into the one on `folder`. InputError when its file is not there."""
    task = LOCAL_TASKS[name]
    path = folder / task.file
    if not path.is_file():
        files = ", ".join(each.file for each in LOCAL_TASKS.values())
        raise InputError(f"{path} does not exist", hint=f"a folder of local rows has {files}")
    splits = {f"{split}_split": split if split == task.split else None for split in ("training", "validation", "test")}
    return {"task": name, "custom_dataset": partial(_splits, path, task), **splits}


def file_digest(name: str, folder: Path) -> str:
    """sha256 of a task's rows."""
    return sha256(folder / LOCAL_TASKS[name].file)


def _splits(path: Path, task: LocalTask, **_: Any) -> dict[str, Any]:
    from datasets import Dataset

    rows = []
    for where, found in read_rows(path):
        try:
            row = task.convert(found)
        except (KeyError, TypeError, IndexError) as error:
            raise InputError(f"{where}: not a row of this task: {error!r}") from error
        missing = [key for key in task.keys if key not in row]
        if missing:
            raise InputError(f"{where}: has no `{missing[0]}`", hint=f"a row needs {', '.join(task.keys)}")
        rows.append({key: row[key] for key in task.keys})
    if not rows:
        raise InputError(f"{path} has no rows")
    return {task.split: Dataset.from_list(rows)}
