"""The two files of a report: written whole, rewritten while a run is under way, and judged by exit code."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from qatcli import report
from qatcli.cli import app
from qatcli.directory import locked

Run = Callable[..., Path]
REFRESH = '<meta http-equiv="refresh"'


def qat(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def files(run: Path) -> set[str]:
    return {path.name for path in run.iterdir() if path.is_file()}


def test_both_files_and_nothing_else(make_run: Run) -> None:
    run = make_run()
    facts = report.write_report(run, refresh=5)
    assert files(run) == {"report.html", "report.json"}
    assert json.loads((run / "report.json").read_text()) == facts
    assert REFRESH not in (run / "report.html").read_text(), "a finished run does not change any more"


def test_only_a_watched_page_of_a_run_under_way_refreshes(make_run: Run) -> None:
    run = make_run(blocks=2, at_work=True)
    report.write_report(run)
    assert REFRESH not in (run / "report.html").read_text()
    report.write_report(run, refresh=5)
    assert REFRESH in (run / "report.html").read_text()


def test_watching_ends_when_no_stage_is_at_work(make_run: Run) -> None:
    run = make_run(blocks=2, at_work=True)
    seen: list[str] = []

    def sleep(seconds: float) -> None:
        seen.append(json.loads((run / "report.json").read_text())["run"]["status"])
        if len(seen) == 2:
            (run / "block-ap.lock").unlink()

    facts = report.watch(run, sleep=sleep)
    assert seen == ["running", "running", "stopped"]
    assert facts["run"]["status"] == "stopped"
    assert REFRESH not in (run / "report.html").read_text()


def test_a_pause_between_two_stages_does_not_end_the_watch(make_run: Run) -> None:
    run = make_run(blocks=2)
    seen: list[str] = []
    at_work = ExitStack()

    def sleep(seconds: float) -> None:
        seen.append(json.loads((run / "report.json").read_text())["run"]["status"])
        if len(seen) == 1:
            at_work.enter_context(locked(run / "block-ap"))
        else:
            at_work.close()

    report.watch(run, sleep=sleep)
    assert seen == ["stopped", "running", "stopped"]


def test_the_command_prints_the_page(make_run: Run) -> None:
    run = make_run()
    done = qat("report", run)
    assert (done.exit_code, done.stdout, done.stderr) == (0, f"{run}/report.html\n", "")


def test_json_is_the_report(make_run: Run) -> None:
    run = make_run()
    done = qat("report", run, "--json")
    assert done.stdout.count("\n") == 1
    facts = json.loads(done.stdout)
    assert facts.pop("path") == str(run / "report.html")
    assert facts == json.loads((run / "report.json").read_text())


def test_a_missed_expectation_exits_4_after_the_data(make_run: Run, metrics: dict[str, Any]) -> None:
    metrics["models"]["quantized"]["perplexity"]["wiki"] = 33.0
    run = make_run(metrics)
    done = qat("report", run)
    assert done.exit_code == 4
    assert done.stdout == f"{run}/report.html\n"
    assert "wiki is 33, expected at most 20.5" in done.stderr
    assert "hint: " in done.stderr


def test_watching_a_run_that_is_over(make_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report.time, "sleep", lambda seconds: None)
    run = make_run()
    done = qat("report", run, "--watch")
    assert done.exit_code == 0
    assert done.stdout == f"{run}/report.html\n"
    assert "until no stage is at work" in done.stderr


def test_no_run_exits_3(tmp_path: Path) -> None:
    done = qat("report", tmp_path)
    assert done.exit_code == 3
    assert "holds no stage" in done.stderr
    assert files(tmp_path) == set()
