"""log.jsonl of one stage, read back: sessions, time at work, errors, progress, and the events by kind."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qatcli.directory import LOG_FILE

LIMIT = 2**28  # bytes; a million updates have 100 MB


@dataclass
class Log:
    """The events of a stage in the order in which they were written; several sessions where it was resumed."""

    events: list[dict[str, Any]] = field(default_factory=list)

    def of(self, kind: str) -> list[dict[str, Any]]:
        """All events of one kind."""
        return [event for event in self.events if event.get("event") == kind]

    @property
    def sessions(self) -> int:
        """How often the stage was begun or continued."""
        return len(self.of("start"))

    @property
    def started(self) -> float | None:
        """Unix time of the first event."""
        return self.events[0]["time"] if self.events else None

    @property
    def ended(self) -> float | None:
        """Unix time of the last event."""
        return self.events[-1]["time"] if self.events else None

    @property
    def seconds(self) -> float | None:
        """Time at work: from the start of each session to its last event. The pauses between them do not count."""
        if not self.events:
            return None
        total, begun, last = 0.0, self.events[0]["time"], self.events[0]["time"]
        for event in self.events:
            if event.get("event") == "start":
                total, begun = total + last - begun, event["time"]
            last = event["time"]
        return round(total + last - begun, 3)

    @property
    def recipe(self) -> dict[str, Any]:
        """The resolved recipe of the latest session."""
        starts = self.of("start")
        recipe = starts[-1].get("recipe") if starts else None
        return recipe if isinstance(recipe, dict) else {}

    @property
    def versions(self) -> dict[str, Any]:
        """Of the libraries, in the latest session."""
        starts = self.of("start")
        versions = starts[-1].get("versions") if starts else None
        return versions if isinstance(versions, dict) else {}

    @property
    def error(self) -> str | None:
        """Why the latest session ended early; None when it is at work, done, or was killed."""
        last = self.events[-1] if self.events else {}
        return str(last.get("error")) if last.get("event") == "stopped" else None

    @property
    def warnings(self) -> list[str]:
        """What the stage warned of."""
        return [str(event.get("text")) for event in self.of("warning")]

    @property
    def progress(self) -> dict[str, Any] | None:
        """The latest record of how far the stage is."""
        records = [
            r for r in self.of("progress") if isinstance(r.get("count"), int) and isinstance(r.get("total"), int)
        ]
        return {k: v for k, v in records[-1].items() if k != "event"} if records else None

    @property
    def peak_memory(self) -> dict[str, int]:
        """The largest memory that progress records saw, bytes; the peak between two records may be higher."""
        records = self.of("progress")
        seen = {
            key: [record[key] for record in records if isinstance(record.get(key), int)]
            for key in ("host_bytes", "device_bytes")
        }
        return {key: max(values) for key, values in seen.items() if values}


def read_log(directory: Path, problems: list[str]) -> Log:
    """The log of a stage directory. Lines that are no events are left out and counted in `problems`.

    The last line may be half written when the stage is at work: that is no problem.
    """
    file = directory / LOG_FILE
    if not file.is_file():
        return Log()
    if file.stat().st_size > LIMIT:
        problems.append(f"{file} is too large to be read")
        return Log()
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    events, broken = [], 0
    for number, line in enumerate(lines):
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            event = None
        if isinstance(event, dict) and isinstance(event.get("time"), int | float):
            events.append(event)
        elif line.strip() and number < len(lines) - 1:
            broken += 1
    if broken:
        problems.append(f"{file}: {broken} lines are no events")
    return Log(events)
