"""What is not a number in Python is null in JSON."""

from __future__ import annotations

import json
from pathlib import Path

from qatcli.directory import write_json
from qatcli.finite import finite
from qatcli.runlog import RunLog


def test_only_what_is_not_finite_changes() -> None:
    value = {"loss": float("nan"), "steps": [1, float("-inf"), 2.5], "pair": (float("inf"), "nan"), "none": None}
    assert finite(value) == {"loss": None, "steps": [1, None, 2.5], "pair": [None, "nan"], "none": None}


def test_files_and_logs_are_json(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"loss": None}
    RunLog(tmp_path / "log.jsonl", verbosity=-1).event("validation", loss=float("inf"))
    assert json.loads((tmp_path / "log.jsonl").read_text())["loss"] is None
