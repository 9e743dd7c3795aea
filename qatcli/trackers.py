"""Figures to TensorBoard or Weights & Biases while a stage runs, through Accelerate's trackers.

One tracker run per stage, because every stage counts its own steps. log.jsonl has the same figures and needs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from textwrap import indent
from typing import Any

import yaml

from qatcli.errors import missing_extra

STEPS = {"step": "step", "validation": "step", "block": "index", "progress": "count"}
"""Kind of event -> the field that places it on the x axis."""
PROJECT = "qat"


class Tracker:
    """One of Accelerate's trackers, fed with the events of one stage."""

    def __init__(self, tracker: Any) -> None:
        self._tracker = tracker
        tracker.start()
        # Weights & Biases counts the steps of all kinds of events together, and drops those that fall behind
        self._counts_together = hasattr(tracker.tracker, "define_metric")
        if self._counts_together:
            for kind, axis in STEPS.items():
                tracker.tracker.define_metric(f"{kind}/*", step_metric=f"{kind}/{axis}")

    def event(self, kind: str, fields: dict[str, Any]) -> None:
        """Send an event's figures: those of one step, or the metrics of a finished stage; at its start the recipe."""
        if kind == "start":
            recipe = fields.get("recipe") or {}
            if self._counts_together:
                self._tracker.store_init_configuration(recipe)
            else:  # TensorBoard's configurations are runs of their own
                self._tracker.tracker.add_text("recipe", indent(yaml.safe_dump(recipe, sort_keys=False), " " * 4))
        elif kind == "done":
            values = dict(_numbers(fields.get("metrics") or {}, ""))
            if values:
                self._tracker.log(values)
        elif kind in STEPS:
            scalars = {name: value for name, value in fields.items() if not isinstance(value, dict)}
            step = scalars.pop(STEPS[kind])
            values = {f"{kind}/{name}": value for name, value in _numbers(scalars, "")}
            if values and self._counts_together:
                self._tracker.log({**values, f"{kind}/{STEPS[kind]}": step})
            elif values:
                self._tracker.log(values, step=step)

    def finish(self, *, failed: bool = False) -> None:
        """Flush and close; Weights & Biases tells runs that failed from others."""
        if failed and self._counts_together:
            self._tracker.tracker.finish(exit_code=1)
        else:
            self._tracker.finish()


def open_trackers(names: Sequence[str], run_dir: Path, stage: str) -> list[Tracker]:
    """The trackers of a recipe's `track`, for one stage of a run. QatError when a package is missing."""
    for name in names:
        if find_spec(name) is None:
            raise missing_extra(name, "tracking")
    if not names:
        return []
    from accelerate import PartialState
    from accelerate.tracking import TensorBoardTracker, WandBTracker

    PartialState()  # Accelerate's logger refuses to work before it knows the processes
    opened: list[Tracker] = []
    for name in names:
        if name == "tensorboard":
            opened.append(Tracker(TensorBoardTracker(stage, logging_dir=run_dir / "tensorboard")))
        else:
            run = "/".join((*run_dir.absolute().parts[-2:], stage))
            opened.append(Tracker(WandBTracker(PROJECT, name=run, dir=str(run_dir))))
    return opened


def _numbers(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    """Every number in nested mappings, by its path."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{name}", value
