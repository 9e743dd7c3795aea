"""Trackers: which figures they get at which step, what is said without the package, and TensorBoard's real file."""

from __future__ import annotations

import contextlib
import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from qatcli import trackers
from qatcli.errors import QatError
from qatcli.runlog import RunLog


class Fake:
    """What Accelerate's trackers have in common."""

    def __init__(self) -> None:
        self.logged: list[tuple[int | None, dict[str, Any]]] = []
        self.state = "new"
        self.tracker: Any = None
        self.configuration: dict[str, Any] = {}

    def start(self) -> None:
        self.state = "started"

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.configuration = values

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.state = "finished"


@pytest.mark.parametrize(
    ("kind", "fields", "logged"),
    [
        ("step", {"step": 7, "loss": 0.5}, [(7, {"step/loss": 0.5})]),
        (
            "block",
            {"index": 3, "before": 1.0, "after": 0.5, "epochs": [1.0]},
            [(3, {"block/before": 1.0, "block/after": 0.5})],
        ),
        ("progress", {"count": 2, "title": "x", "lr": 1e-3}, [(2, {"progress/lr": 1e-3})]),
        ("done", {"metrics": {"models": {"a": {"ppl": 5.0}}, "ok": True}}, [(None, {"models/a/ppl": 5.0})]),
        ("warning", {"text": "x"}, []),
        ("block", {"index": 1, "relative_error": {"q_proj": 0.1}}, []),
    ],
)
def test_which_figures_go_where(kind: str, fields: dict[str, Any], logged: list[Any]) -> None:
    fake = Fake()
    trackers.Tracker(fake).event(kind, fields)
    assert fake.logged == logged


def test_a_counter_of_all_events_is_not_relied_on() -> None:
    """Weights & Biases drops what comes with a lower step than an event of another kind had."""
    fake, axes = Fake(), {}
    fake.tracker = SimpleNamespace(define_metric=lambda names, step_metric: axes.update({names: step_metric}))
    tracker = trackers.Tracker(fake)
    for kind, fields in [("progress", {"count": 30, "lr": 0.1}), ("block", {"index": 0, "after": 0.5})]:
        tracker.event(kind, fields)
    values = [{"progress/count": 30, "progress/lr": 0.1}, {"block/index": 0, "block/after": 0.5}]
    assert fake.logged == [(None, each) for each in values]
    assert axes.items() >= {("progress/*", "progress/count"), ("block/*", "block/index")}


RECIPE = {"method": "qat", "quant": {"bits": 2, "skip": ["a", "b"]}, "e2e_qp": {"max_step": None}}


def test_the_recipe_is_the_configuration_of_a_run() -> None:
    fake = Fake()
    fake.tracker = SimpleNamespace(define_metric=lambda *_, **__: None)
    trackers.Tracker(fake).event("start", {"device": "cpu", "recipe": RECIPE})
    assert fake.configuration == RECIPE
    assert fake.logged == []


def test_the_recipe_is_a_text_where_configurations_would_be_runs() -> None:
    fake, texts = Fake(), {}
    fake.tracker = SimpleNamespace(add_text=lambda tag, text: texts.update({tag: text}))
    trackers.Tracker(fake).event("start", {"device": "cpu", "recipe": RECIPE})
    assert yaml.safe_load(texts["recipe"]) == RECIPE
    assert fake.configuration == {}


@pytest.mark.parametrize("failed", [False, True])
def test_a_run_that_stopped_is_marked_as_failed(failed: bool) -> None:
    fake, codes = Fake(), list[int]()
    run = SimpleNamespace(define_metric=lambda *_, **__: None, finish=lambda exit_code: codes.append(exit_code))
    fake.tracker = run
    with contextlib.suppress(OSError), RunLog(verbosity=-1).stage(Path("/nowhere/log"), [trackers.Tracker(fake)]):
        if failed:
            raise OSError("no space left")  # nor for the log
    assert codes == [1] * failed
    assert (fake.state == "finished") != failed


def test_a_tracker_is_started_and_finished() -> None:
    fake = Fake()
    tracker = trackers.Tracker(fake)
    assert fake.state == "started"
    tracker.finish()
    assert fake.state == "finished"


def test_nothing_asked_nothing_opened(tmp_path: Path) -> None:
    assert trackers.open_trackers((), tmp_path, "pack") == []


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_without_the_package_the_extra_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda package: None)
    with pytest.raises(QatError, match=name) as caught:
        trackers.open_trackers((name,), tmp_path, "pack")
    assert caught.value.hint is not None
    assert "qatcli[tracking]" in caught.value.hint


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="needs the extra `tracking`")
def test_tensorboard_gets_every_step(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    opened = trackers.open_trackers(("tensorboard",), tmp_path, "e2e-qp")
    with RunLog(verbosity=-1).stage(tmp_path / "log.jsonl", opened) as log:
        log.event("start", recipe={"quant": {"bits": 2, "skip": ()}})
        for step in range(1, 4):
            log.event("step", step=step, loss=1.0 / step)
    found = EventAccumulator(str(tmp_path / "tensorboard" / "e2e-qp"))
    found.Reload()
    assert [(point.step, round(point.value, 3)) for point in found.Scalars("step/loss")] == [
        (1, 1.0),
        (2, 0.5),
        (3, 0.333),
    ]


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs the extra `tracking`")
def test_weights_and_biases_writes_a_run_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    (tmp_path / "run").mkdir()
    opened = trackers.open_trackers(("wandb",), tmp_path / "run", "e2e-qp")
    with RunLog(verbosity=-1).stage(tmp_path / "log.jsonl", opened) as log:
        log.event("start", recipe={"quant": {"bits": 2, "skip": ()}})
        log.event("step", step=1, loss=1.0)
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))) == 1
