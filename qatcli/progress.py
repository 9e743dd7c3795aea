"""How far a stage is: units done, time left, rates and memory, as a live view on a terminal or as plain lines.

The time left is that of the units of this session, the latest weighing most, so it holds from the first finished unit
on; a stage that knows how far it is inside a unit (`part`) gets an estimate before that, from its second part on: the
first also loads, compiles and warms up.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

LATEST = 0.3  # weight of the latest unit in the running means of seconds per unit and tokens per second
SHORTEST, LONGEST = 10.0, 300.0  # seconds between two records of one stage; they grow apart with the time spent


@dataclass
class Bar:
    """Counts finished units of a stage; `show` is called with the bar after every change."""

    title: str
    total: int
    count: int
    show: Callable[[Bar], None]
    clock: Callable[[], float] = time.monotonic
    detail: str = ""
    lr: float | None = None
    tokens_per_second: float | None = None
    unit_seconds: float | None = None
    started: float = field(init=False)
    _first_part: tuple[float, float] | None = field(init=False, default=None)  # of the unit: when, and how much
    _part: float = field(init=False, default=0.0)
    _unit_started: float = field(init=False)
    _tokens_since: float = field(init=False)

    def __post_init__(self) -> None:
        self.started = self._unit_started = self._tokens_since = self.clock()

    def advance(
        self, units: int = 1, detail: str = "", *, lr: float | None = None, tokens: int = 0, reused: bool = False
    ) -> None:
        """Mark units finished; `detail` holds the latest figures, `tokens` counts those processed since the last call.

        `reused` units were kept from an interrupted run: their time says nothing about the others.
        """
        now = self.clock()
        if units and not reused:
            self.unit_seconds = _mean(self.unit_seconds, (now - self._unit_started) / units)
        self.count += units
        self._unit_started, self._first_part, self._part = now, None, 0.0
        self._update(now, detail, lr, tokens)

    def note(self, detail: str = "", *, part: float = 0.0, lr: float | None = None, tokens: int = 0) -> None:
        """Show figures without finishing a unit; `part` in [0, 1] is how much of the current unit is done."""
        now = self.clock()
        if part and self._first_part is None:
            self._first_part = now, part
        self._part = part
        self._update(now, detail, lr, tokens)

    def left(self) -> float | None:
        """Seconds until the last unit is done, None as long as nothing is known."""
        now = self.clock()
        waited, seconds = now - self._unit_started, self.unit_seconds
        if seconds is None:
            if self._first_part is None or self._part <= self._first_part[1]:
                return None
            since, done = self._first_part
            seconds = since - self._unit_started + (now - since) * (1 - done) / (self._part - done)
        return max(0.0, seconds * (self.total - self.count) - waited)

    def elapsed(self) -> float:
        """Seconds since the bar was opened."""
        return self.clock() - self.started

    def figures(self) -> str:
        """The latest figures as text: those of the stage, learning rate, throughput, memory."""
        parts = [self.detail] if self.detail else []
        if self.lr is not None:
            parts.append(f"lr {self.lr:.2e}")
        if self.tokens_per_second is not None:
            parts.append(f"{self.tokens_per_second:,.0f} tokens/s")
        return "  ".join([*parts, *(f"{name} {count / 2**30:.2f} GiB" for name, count in memory().items())])

    def record(self) -> dict[str, Any]:
        """The same as data, for log.jsonl. Keys without a value are left out; memory in bytes, `left` in seconds."""
        left = self.left()
        values = {
            "title": self.title,
            "count": self.count,
            "total": self.total,
            "left": None if left is None else round(left, 1),
            "lr": self.lr,
            "tokens_per_second": None if self.tokens_per_second is None else round(self.tokens_per_second, 1),
            **{f"{name}_bytes": count for name, count in memory().items()},
        }
        return {key: value for key, value in values.items() if value is not None}

    def _update(self, now: float, detail: str, lr: float | None, tokens: int) -> None:
        if tokens:
            self.tokens_per_second = _mean(self.tokens_per_second, tokens / max(now - self._tokens_since, 1e-9))
            self._tokens_since = now
        self.lr = self.lr if lr is None else lr
        self.detail = detail or self.detail
        self.show(self)


class Every:
    """True at most once per interval, which grows with the time spent: an hour-long stage does not fill a log."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started, self._last = clock(), float("-inf")

    def __call__(self) -> bool:
        now = self._clock()
        if now - self._last < min(LONGEST, max(SHORTEST, (now - self._started) / 50)):
            return False
        self._last = now
        return True


@contextmanager
def display(console: Console, *, quiet: bool) -> Iterator[Callable[[Bar], None]]:
    """A function that shows a bar: live on a terminal, one line now and then elsewhere, nothing when quiet."""
    if quiet:
        yield lambda bar: None
    elif console.is_terminal and sys.stderr.isatty():
        view = _View()
        with Live(view, console=console, refresh_per_second=2):
            yield view.update
    else:
        due = Every()

        def line(bar: Bar) -> None:
            if due() or bar.count >= bar.total:
                left = bar.left()
                eta = "" if left is None or bar.count >= bar.total else f" eta {duration(left)}"
                console.print(f"{bar.title} {bar.count}/{bar.total}{eta} {bar.figures()}")

        yield line


class _View:
    """Two lines: bar, count, time spent and left; below them the latest figures."""

    def __init__(self) -> None:
        self._bar: Bar | None = None

    def update(self, bar: Bar) -> None:
        self._bar = bar

    def __rich__(self) -> Group:
        bar = self._bar
        if bar is None:
            return Group()
        left = bar.left()
        eta = "" if left is None or bar.count >= bar.total else f"eta {duration(left)}"
        row = Table.grid(padding=(0, 1))
        row.add_row(
            Text(bar.title, style="bold"),
            ProgressBar(total=max(1, bar.total), completed=bar.count, width=30),
            f"{bar.count}/{bar.total}",
            duration(bar.elapsed()),
            Text(eta, style="cyan"),
        )
        return Group(row, Text("  " + bar.figures(), style="dim", overflow="ellipsis", no_wrap=True))


def memory() -> dict[str, int]:
    """Bytes in use now: `host` is this process's resident memory, `device` what torch holds on the GPU, if it does."""
    used = {"host": psutil.Process().memory_info().rss}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        used["device"] = torch.cuda.memory_allocated()
    return used


def duration(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def _mean(before: float | None, latest: float) -> float:
    return latest if before is None else (1 - LATEST) * before + LATEST * latest
