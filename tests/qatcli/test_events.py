"""What is read back from log.jsonl."""

from __future__ import annotations

import json
from pathlib import Path

from qatcli.directory import LOG_FILE
from qatcli.events import Log, read_log


def test_time_at_work_leaves_out_the_pause_between_sittings() -> None:
    times = [(110, "start"), (130, "block"), (3730, "start"), (3760, "stopped")]
    log = Log([{"time": float(time), "event": kind} for time, kind in times])
    assert (log.sessions, log.seconds) == (2, 20 + 30)
    assert Log().seconds is None


def test_lines_that_are_no_events_are_counted(tmp_path: Path) -> None:
    good = json.dumps({"time": 1.0, "event": "start"})
    (tmp_path / LOG_FILE).write_text("\n".join([good, "no json", "[1]", '{"event": "start"}', good[:10]]))
    problems: list[str] = []
    assert len(read_log(tmp_path, problems).events) == 1
    assert problems == [f"{tmp_path / LOG_FILE}: 3 lines are no events"]  # the last one may be half written
