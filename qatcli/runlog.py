"""What a stage tells its user while it runs: progress on stderr and one JSON object per event in log.jsonl.

On a terminal a live line shows the unit, the latest figures and the time left; elsewhere plain lines without control
characters. stdout is never touched: it carries data only.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PLAIN_INTERVAL = 10.0  # seconds between progress lines where there is no terminal


class RunLog:
    """Events of one stage. `verbosity` -1 is quiet (errors only), 0 normal, 1 verbose."""

    def __init__(self, file: Path | None = None, *, verbosity: int = 0) -> None:
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.verbosity = verbosity
        self._file = file

    def to_file(self, file: Path) -> RunLog:
        """The same log, with events appended to `file`."""
        return RunLog(file, verbosity=self.verbosity)

    def event(self, kind: str, **fields: Any) -> None:
        """Append one event to log.jsonl; with -v also print it."""
        if self._file is not None:
            record = {"time": round(time.time(), 3), "event": kind, **fields}
            with open(self._file, "a", encoding="utf-8") as handle:
                handle.write(json.dumps(record) + "\n")
        if self.verbosity > 0:
            self.console.print(f"{kind}: " + " ".join(f"{k}={_short(v)}" for k, v in fields.items()), markup=False)

    def say(self, text: str) -> None:
        """One line for the user."""
        if self.verbosity >= 0:
            self.console.print(text, markup=False)

    def warn(self, text: str) -> None:
        """One line that the user should not miss; also an event."""
        self.event("warning", text=text)
        if self.verbosity >= 0:
            self.console.print(f"warning: {text}", markup=False)

    @contextmanager
    def progress(self, title: str, total: int, *, done: int = 0) -> Iterator[_Bar]:
        """A progress bar of `total` units, `done` of which were finished by an earlier run."""
        if self.verbosity >= 0 and self.console.is_terminal and sys.stderr.isatty():
            with Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("eta"),
                TimeRemainingColumn(elapsed_when_finished=False),
                TextColumn("{task.fields[detail]}", markup=False),
                console=self.console,
            ) as live:
                task = live.add_task(title, total=total, completed=done, detail="")
                yield _Bar(total, done, lambda n, detail: live.update(task, completed=n, detail=detail))
        else:
            yield _Bar(total, done, self._plain_printer(title, total, done))

    def _plain_printer(self, title: str, total: int, done: int) -> Any:
        start = time.monotonic()
        last = 0.0

        def show(count: int, detail: str) -> None:
            nonlocal last
            now = time.monotonic()
            if self.verbosity < 0 or (count < total and now - last < PLAIN_INTERVAL):
                return
            last = now
            finished = count - done
            left = (now - start) / finished * (total - count) if finished > 0 else None
            eta = "" if left is None or count >= total else f" eta {duration(left)}"
            self.console.print(f"{title} {count}/{total}{eta} {detail}".rstrip(), markup=False)

        return show


class _Bar:
    """Counts finished units."""

    def __init__(self, total: int, done: int, show: Any) -> None:
        self.total = total
        self.count = done
        self._show = show

    def advance(self, units: int = 1, detail: str = "") -> None:
        """Mark units finished; `detail` holds the latest figures."""
        self.count += units
        self._show(self.count, detail)

    def note(self, detail: str) -> None:
        """Show figures without finishing a unit."""
        self._show(self.count, detail)


def duration(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
