"""The proof of `qat eval --zero-shot`: its accuracies beside those of lm-eval run by hand on the same rows.

    python benchmarks/zero_shot_parity.py MODEL DATA_DIR [--limit 40] [--tasks piqa,arc_easy] [--out FILE]

MODEL is a GGUF file or a Hugging Face directory, DATA_DIR holds the five local files of docs/evaluation.md. By hand
means: transformers loads the model, lm-eval's HFLM wraps it, and `simple_evaluate` runs lm-eval's own task definitions
with `dataset_path: json` on the rows written in the hub's form. No code of ours takes part in that half.
Prints a Markdown table, which `--out` also writes; exit code 1 when an accuracy or its error differs.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from string import ascii_uppercase
from typing import Any

FILES = {  # task -> file of raw rows, folder of lm-eval's definition
    "winogrande": ("winogrande_xl_val.jsonl", "winogrande"),
    "piqa": ("piqa_val.jsonl", "piqa"),
    "hellaswag": ("hellaswag_val.jsonl", "hellaswag"),
    "arc_easy": ("arc_easy_test.jsonl", "arc"),
    "arc_challenge": ("arc_challenge_test.jsonl", "arc"),
}
EQUAL = 1e-9  # both halves divide the same counts; anything above is a question answered differently


def main() -> int:
    """Run both halves, print, and say by the exit code whether they are equal."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="GGUF file or Hugging Face directory")
    parser.add_argument("data", type=Path, help="folder of the five files")
    parser.add_argument("--limit", type=int, default=40, help="rows per task (default 40)")
    parser.add_argument("--tasks", default=",".join(FILES))
    parser.add_argument("--out", type=Path, help="file for the table")
    arguments = parser.parse_args()
    tasks = arguments.tasks.split(",")
    started = time.monotonic()
    ours = with_qat(arguments.model, arguments.data, tasks, arguments.limit)
    middle = time.monotonic()
    theirs = by_hand(arguments.model, arguments.data, tasks, arguments.limit)
    seconds = (middle - started, time.monotonic() - middle)
    text, equal = table(tasks, ours, theirs)
    text += (
        f"\n{arguments.model.name}, fp32, the first {arguments.limit} rows of each task; lm-eval {version('lm_eval')}, "
        f"transformers {version('transformers')}, torch {version('torch')}, {platform.machine()} CPU. "
        f"qat {seconds[0]:.0f} s, by hand {seconds[1]:.0f} s, loading included.\n"
    )
    sys.stdout.write(text)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")
    return 0 if equal else 1


def with_qat(model: Path, data: Path, tasks: list[str], limit: int) -> dict[str, Any]:
    """Task -> what the real command prints for it."""
    command = [sys.executable, "-m", "qatcli", "eval", str(model), "--zero-shot", ",".join(tasks)]
    command += ["--data", str(data), "--limit", str(limit), "--no-speed", "--json", "--device", "cpu"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    (found,) = json.loads(done.stdout)["models"].values()
    return dict(found["zero_shot"]["tasks"])


def by_hand(model: Path, data: Path, tasks: list[str], limit: int) -> dict[str, Any]:
    """Task -> lm-eval's own figures."""
    import lm_eval.tasks
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"gguf_file": model.name} if model.suffix == ".gguf" else {}
    folder = model.parent if where else model
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **where)
    lm = HFLM(pretrained=loaded, tokenizer=AutoTokenizer.from_pretrained(folder, **where), batch_size=8, device="cpu")
    definitions = Path(lm_eval.tasks.__file__).parent
    folders = [definitions / name for name in sorted({name for _, name in FILES.values()})]
    manager = TaskManager(include_defaults=False, include_path=folders)
    with tempfile.TemporaryDirectory() as scratch:
        members = [{"task": name, **hub_rows(name, data, Path(scratch))} for name in tasks]
        found = simple_evaluate(
            model=lm,
            tasks=[{"group": "local", "task": members}],
            task_manager=manager,
            limit=limit,
            bootstrap_iters=10,  # 0 would leave the errors out, though those of accuracy have a formula
            log_samples=False,
        )
    return dict(found["results"])


def hub_rows(name: str, data: Path, scratch: Path) -> dict[str, Any]:
    """Write the rows of a task as the hub has them, and the keys that make lm-eval read that file."""
    file = scratch / f"{name}.jsonl"
    with open(data / FILES[name][0], encoding="utf-8") as rows, open(file, "w", encoding="utf-8") as out:
        for row in map(json.loads, rows):
            if "gold" in row:  # ARC: the local rows have the choices as a list and the answer as an index
                labels = list(ascii_uppercase[: len(row["choices"])])
                row["choices"] = {"text": row["choices"], "label": labels}
                row["answerKey"] = labels[row.pop("gold")]
            out.write(json.dumps(row) + "\n")
    splits = {split: str(file) for split in ("train", "validation", "test")}
    return {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": splits}}


def table(tasks: list[str], ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[str, bool]:
    """The Markdown table, and whether every accuracy and error is equal."""
    lines = [
        "| task | rows | qat acc | lm-eval acc | qat error | lm-eval error | equal |",
        "|---|---|---|---|---|---|---|",
    ]
    verdicts = []
    for name in tasks:
        mine, hand = ours[name], theirs[name]
        pairs = ((mine["value"], hand["acc,none"]), (mine["stderr"], hand["acc_stderr,none"]))
        verdicts.append(all(abs(one - other) < EQUAL for one, other in pairs))
        figures = " | ".join(f"{figure:.6f}" for pair in pairs for figure in pair)
        lines.append(f"| {name} | {mine['rows']} | {figures} | {'yes' if verdicts[-1] else 'NO'} |")
    return "\n".join(lines) + "\n", all(verdicts)


if __name__ == "__main__":
    sys.exit(main())
