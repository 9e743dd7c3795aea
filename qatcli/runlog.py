"""What a stage tells its user while it runs: progress on stderr and one JSON object per event in log.jsonl.

On a terminal a live view shows the unit, the latest figures and the time left; elsewhere plain lines without control
characters. stdout is never touched: it carries data only. Events: docs/report.md.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from qatcli.finite import finite
from qatcli.interrupts import raise_if_interrupted
from qatcli.progress import Bar, Every, display, duration
from qatcli.trackers import Tracker

__all__ = ["RunLog", "duration", "wide"]

LONGEST_VALUE = 80  # characters of a value that -v prints
NARROWEST = 140  # columns of a table where there is no terminal to be narrower


class RunLog:
    """Events of one stage. `verbosity` -1 is quiet (errors only), 0 normal, 1 verbose."""

    def __init__(
        self,
        file: Path | None = None,
        *,
        verbosity: int = 0,
        console: Console | None = None,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        # Without markup: prompts, generated texts and paths are shown, and may hold what looks like a tag of rich.
        self.console = console or Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
        self.verbosity = verbosity
        self._file = file
        self._trackers = trackers

    @contextmanager
    def stage(self, file: Path, trackers: Sequence[Tracker] = ()) -> Iterator[RunLog]:
        """The log of one stage: events are appended to `file` and go to the trackers.

        A stage that does not reach its end leaves a last event that says why.
        """
        log = RunLog(file, verbosity=self.verbosity, console=self.console, trackers=trackers)
        failed = True
        try:
            yield log
            failed = False
        except BaseException as error:
            with contextlib.suppress(OSError):  # a full disk must not hide the error it caused
                log.event("stopped", error=f"{type(error).__name__}: {error}".removesuffix(": "))
            raise
        finally:
            for tracker in trackers:
                tracker.finish(failed=failed)

    def event(self, kind: str, **fields: Any) -> None:
        """Append one event to log.jsonl; with -v also print it."""
        if self._file is not None:
            record = {"time": round(time.time(), 3), "event": kind, **fields}
            with open(self._file, "a", encoding="utf-8") as handle:
                handle.write(json.dumps(finite(record), allow_nan=False) + "\n")
        for tracker in self._trackers:
            tracker.event(kind, fields)
        if self.verbosity > 0:
            self.console.print(f"{kind}: " + " ".join(f"{k}={_short(v)}" for k, v in fields.items()))

    def say(self, text: str) -> None:
        """One line for the user."""
        if self.verbosity >= 0:
            self.console.print(text)

    def warn(self, text: str) -> None:
        """One line that the user should not miss; also an event."""
        self.event("warning", text=text)
        if self.verbosity >= 0:
            self.console.print(f"warning: {text}")

    @contextmanager
    def progress(self, title: str, total: int, *, done: int = 0) -> Iterator[Bar]:
        """A progress bar of `total` units, `done` of which were finished by an earlier run."""
        with display(self.console, quiet=self.verbosity < 0) as show:
            due = Every()

            def update(bar: Bar) -> None:
                raise_if_interrupted()
                show(bar)
                if due():
                    self.event("progress", **bar.record())

            bar = Bar(title, total, done, update)
            due()
            self.event("progress", **bar.record())
            yield bar


def wide(console: Console) -> Console:
    """`console` with room for tables where there is no terminal; `print(width=...)` can only narrow them."""
    if not console.is_terminal:
        console.width = max(NARROWEST, console.width)
    return console


def _short(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 3] + "..."
