"""The names of models in tables, and figures in their units."""

from __future__ import annotations

from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from qatcli.evaluation.tables import _labels, _tasks


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["runs/w2/pack", "runs/w3/pack"], ["w2/pack", "w3/pack"]),
        (["/models/full", "runs/w3/pack", "a.gguf"], ["full", "pack", "a.gguf"]),
        (["owner/model"], ["model"]),
        (["pack", "w2/pack/"], ["pack", "w2/pack"]),
        (["full_precision", "quantized"], ["full_precision", "quantized"]),
    ],
)
def test_models_go_by_the_end_of_their_path(names: list[str], labels: list[str]) -> None:
    assert list(_labels(names).values()) == labels


def test_only_accuracies_are_percent() -> None:
    tasks = {
        "piqa": {"metric": "acc", "value": 0.62, "stderr": 0.011, "shots": 0},
        "mmlu": {"metric": "acc", "value": 0.25, "stderr": 0.02, "shots": 0},
        "mmlu_law": {"metric": "acc", "value": 0.3, "stderr": None, "shots": 0},
        "wikitext": {"metric": "word_perplexity", "value": 25.31, "stderr": 0.5, "shots": 0},
    }
    average: dict[str, Any] = {"value": 0.435, "stderr": 0.012, "tasks": 2}
    metrics = {
        "models": {"a": {"zero_shot": {"tasks": tasks, "average": average}}},
        "zero_shot_protocol": {"limit": None, "lm_eval": "0.4", "compute": "float32"},
    }
    console = Console(file=StringIO(), width=200)
    console.print(_tasks(metrics, {"a": "a"}))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for said in ("62.0 +-1.1", "30.0 ", " 25.31 +-0.50", "43.5 +-1.2", "average of 2 tasks"):
        assert said in shown, said
