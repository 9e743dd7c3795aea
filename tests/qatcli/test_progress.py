"""Progress: estimates from the units of this session, lines at growing intervals, and data for the log."""

from __future__ import annotations

import io
import itertools
import sys

import pytest
from rich.console import Console

from qatcli.progress import Bar, Every, display, duration


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def bar(clock: Clock) -> Bar:
    return Bar("block-ap", 10, 0, lambda bar: None, clock=clock)


def test_nothing_is_known_before_the_first_unit(bar: Bar, clock: Clock) -> None:
    clock.now = 7.0
    assert bar.left() is None
    assert "left" not in bar.record()


def test_the_estimate_holds_from_the_first_unit_on(bar: Bar, clock: Clock) -> None:
    for unit in range(1, 4):
        clock.now = 20.0 * unit
        bar.advance()
        assert bar.left() == pytest.approx(20.0 * (10 - unit))
    clock.now += 5.0
    assert bar.left() == pytest.approx(20.0 * 7 - 5.0), "it counts down inside a unit"


def test_a_part_of_the_first_unit_gives_an_estimate(bar: Bar, clock: Clock) -> None:
    clock.now = 100.0  # loaded, compiled, warmed up
    bar.note(part=0.2)
    assert bar.left() is None, "it would count the set-up as a fifth of the work"
    clock.now += 5.0
    bar.note(part=0.3)
    assert bar.left() == pytest.approx(10 * (100.0 + 40.0) - 105.0)


def test_units_kept_from_an_interrupted_run_do_not_count(bar: Bar, clock: Clock) -> None:
    for _ in range(4):
        clock.now += 1.0
        bar.advance(reused=True)
    assert bar.left() is None
    clock.now += 30.0
    bar.advance()
    assert bar.left() == pytest.approx(5 * 30.0)


def test_the_latest_units_weigh_most(bar: Bar, clock: Clock) -> None:
    for seconds in (10.0, 10.0, 20.0, 20.0, 20.0, 20.0):
        clock.now += seconds
        bar.advance()
    assert 0.85 * 4 * 20.0 < float(bar.left() or 0) < 4 * 20.0


def test_several_units_at_once_and_the_end(bar: Bar, clock: Clock) -> None:
    clock.now = 10.0
    bar.advance(5)
    assert bar.left() == pytest.approx(10.0)
    bar.advance(5)
    assert bar.left() == 0.0


def test_throughput_and_figures(bar: Bar, clock: Clock) -> None:
    clock.now = 2.0
    bar.note("loss 0.5", lr=3e-4, tokens=1000)
    clock.now = 4.0
    bar.advance(tokens=1000)
    record = bar.record()
    assert record["tokens_per_second"] == 500.0
    assert record["lr"] == 3e-4
    assert (record["title"], record["count"], record["total"]) == ("block-ap", 1, 10)
    assert record["host_bytes"] > 2**20
    for said in ("loss 0.5", "lr 3.00e-04", "500 tokens/s", "host ", " GiB"):
        assert said in bar.figures()


def test_intervals_grow_with_the_time_spent(clock: Clock) -> None:
    due, times = Every(clock), []
    for second in range(36_000):
        clock.now = float(second)
        if due():
            times.append(second)
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert times[:3] == [0, 10, 20]
    assert max(gaps) <= 301
    assert gaps[-1] >= 290
    assert len(times) < 400


def test_where_there_is_no_terminal_there_are_plain_lines() -> None:
    out = io.StringIO()
    with display(Console(file=out, soft_wrap=True), quiet=False) as show:
        bar = Bar("e2e-qp", 3, 0, show)
        for step in range(3):
            bar.advance(detail=f"loss [{step}]")
    lines = out.getvalue().splitlines()
    assert len(lines) == 2, "the first and the last: the one between came too soon"
    assert lines[0].startswith("e2e-qp 1/3 eta 0:00 loss [0]")
    assert lines[1].startswith("e2e-qp 3/3 loss [2]")
    assert "\x1b" not in out.getvalue()


def test_on_a_terminal_the_view_is_live(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with display(Console(file=out, force_terminal=True, width=120), quiet=False) as show:
        bar = Bar("block-ap", 4, 1, show)
        bar.advance(detail="loss 0.5 -> 0.25", lr=1e-3, tokens=10)
    shown = out.getvalue()
    for said in ("block-ap", "2/4", "loss 0.5 -> 0.25", "lr 1.00e-03", "tokens/s", "GiB"):
        assert said in shown
    assert "\x1b" in shown


def test_quiet_is_silent() -> None:
    out = io.StringIO()
    with display(Console(file=out), quiet=True) as show:
        Bar("pack", 1, 0, show).advance()
    assert out.getvalue() == ""


def test_durations() -> None:
    assert [duration(s) for s in (0, 59.9, 61, 3723)] == ["0:00", "0:59", "1:01", "1:02:03"]
