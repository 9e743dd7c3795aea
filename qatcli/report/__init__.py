"""A run as one page and as data: `report.html` and `report.json` in the run directory (docs/report.md).

Read from what the stages leave behind, finished or not; nothing is computed anew, so that it costs well under a second.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qatcli.report.collect import collect
from qatcli.report.page import render

HTML, JSON = "report.html", "report.json"
INTERVAL = 5  # seconds between two versions of a watched page


def write_report(run_dir: Path, *, under_way: bool = False, refresh: int | None = None) -> dict[str, Any]:
    """Write both files and return what report.json holds.

    `under_way` says that the caller is working on the run though no stage is at this moment; with `refresh` the page
    loads itself again after so many seconds as long as the run is under way. InputError when there is no run.
    """
    facts = collect(run_dir, under_way=under_way)
    _replace(run_dir / JSON, json.dumps(facts, indent=2, allow_nan=False) + "\n")
    _replace(run_dir / HTML, render(facts, refresh=refresh if facts["run"]["status"] == "running" else None))
    return facts


def watch(run_dir: Path, *, sleep: Callable[[float], None] = time.sleep) -> dict[str, Any]:
    """Write both files every few seconds until no stage of the run is at work; return what report.json holds then."""
    while True:
        facts = write_report(run_dir, refresh=INTERVAL)
        if facts["run"]["status"] != "running":
            sleep(INTERVAL)  # between two stages nobody works for a moment
            facts = write_report(run_dir, refresh=INTERVAL)
            if facts["run"]["status"] != "running":
                return facts
        sleep(INTERVAL)


def _replace(file: Path, text: str) -> None:
    """Write a file so that a browser never sees half of it."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8", errors="replace")
    os.replace(temporary, file)
