"""The log of a stage: events in log.jsonl whatever is shown, and a last event that says how the stage ended."""

from __future__ import annotations

import json
import signal
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from qatcli import interrupts
from qatcli.interrupts import interruptible
from qatcli.runlog import NARROWEST, RunLog, wide


def events(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


class Recorder:
    """Stands for a tracker."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.failed: bool | None = None

    def event(self, kind: str, fields: dict[str, Any]) -> None:
        self.seen.append(kind)

    def finish(self, *, failed: bool) -> None:
        self.failed = failed


@pytest.mark.parametrize("verbosity", [-1, 0, 1])
def test_events_are_logged_whatever_is_shown(
    tmp_path: Path, verbosity: int, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "log.jsonl"
    with RunLog(verbosity=verbosity).stage(file) as log:
        log.event("step", step=1, loss=0.123456789)
        log.warn("be careful")
    found = events(file)
    assert [event["event"] for event in found] == ["step", "warning"]
    assert found[0]["loss"] == 0.123456789
    shown = capsys.readouterr()
    assert shown.out == ""
    assert ("loss=0.1235" in shown.err) == (verbosity == 1)
    assert ("warning: be careful" in shown.err) == (verbosity >= 0)


def test_progress_is_logged_at_its_beginning_and_not_at_every_unit(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    with RunLog(verbosity=-1).stage(file) as log, log.progress("pack", 100, done=3) as bar:
        for _ in range(97):
            bar.advance()
    (event,) = events(file)
    assert (event["event"], event["title"], event["count"], event["total"]) == ("progress", "pack", 3, 100)


def test_progress_ends_at_a_signal_that_was_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One dropped by a finalizer has to stop a stage at its next unit, not after its last."""
    advanced = []

    def work() -> None:
        with interruptible(), RunLog(verbosity=-1).progress("block-ap", 2) as bar:
            for arrived in ([], [signal.SIGTERM]):
                monkeypatch.setattr(interrupts, "_arrived", arrived)
                bar.advance()
                advanced.append(arrived)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert advanced == [[]]


@pytest.mark.parametrize(
    ("error", "said"), [(ValueError("a reason"), "ValueError: a reason"), (KeyboardInterrupt(), "KeyboardInterrupt")]
)
def test_a_stage_that_fails_says_why_and_raises(tmp_path: Path, error: BaseException, said: str) -> None:
    file, tracker = tmp_path / "log.jsonl", Recorder()
    with pytest.raises(type(error)), RunLog(verbosity=-1).stage(file, [tracker]):  # type: ignore[list-item]
        raise error
    assert events(file)[-1]["error"] == said
    assert tracker.seen == ["stopped"]
    assert tracker.failed is True


def test_a_disk_that_cannot_be_written_does_not_hide_the_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="first"), RunLog(verbosity=-1).stage(tmp_path / "gone" / "log.jsonl"):
        raise ValueError("first")


def test_events_go_to_the_trackers_of_their_stage_only(tmp_path: Path) -> None:
    tracker, log = Recorder(), RunLog(verbosity=-1)
    with log.stage(tmp_path / "log.jsonl", [tracker]) as inside:  # type: ignore[list-item]
        inside.event("step", step=1, loss=1.0)
    log.event("outside")
    assert tracker.seen == ["step"]
    assert tracker.failed is False


def test_long_values_are_cut_on_the_screen(capsys: pytest.CaptureFixture[str]) -> None:
    RunLog(verbosity=1).event("start", recipe={"key": "x" * 1000})
    assert len(capsys.readouterr().err) < 150


def test_what_looks_like_markup_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """A prompt, a generated text, a path: rich would drop the one and raise at the other."""
    log = RunLog()
    table = Table("text")
    table.add_row("[b]bold[/b] [INST] hi [/INST]")
    log.console.print(table)
    log.say("runs/[v2]/pack")
    shown = capsys.readouterr().err
    assert "[b]bold[/b] [INST] hi [/INST]" in shown
    assert "runs/[v2]/pack" in shown


@pytest.mark.parametrize(("terminal", "widest"), [(False, NARROWEST), (True, 80)])
def test_tables_have_room_where_there_is_no_terminal(terminal: bool, widest: int) -> None:
    console = Console(file=StringIO(), width=80, force_terminal=terminal, color_system=None, legacy_windows=False)
    table = Table(*(f"column {index}" for index in range(20)), expand=True)
    wide(console).print(table)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(len(line) for line in lines) == widest
