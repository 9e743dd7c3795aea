"""Disturb every stage of a chain, run the same command again, and compare with a chain that nobody disturbed.

chain = Chain(recipe, folder, launch)     `launch` runs one command: Served (CI) or Spawned (real processes)
chain.undisturbed()
chain.disturb("block-ap", Fault("save", 2, "kill"))   -> Row
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STAGES = ("calibrate", "block-ap", "e2e-qp", "pack", "eval", "export")
FAULTS = Path(__file__).with_name("faults.py")
KILLED = ("kill", "kill-after", "SIGKILL")
SIGNALLED = ("SIGINT", "SIGTERM")
DISK = ("ENOSPC", "EIO", "EROFS")
UNTIMED = {"seconds", "peak_memory", "speed", "speed_protocol"}  # what two equal runs may differ in
TIMEOUT = 1800
# The smoke recipe with little to compute, and an export of several shards.
SETTINGS = {
    "e2e_qp.samples": 8,
    "e2e_qp.gradient_checkpointing": "true",
    "eval.prompts": "[]",
    "eval.speed": "null",
    "eval.baselines": "[block_ap]",
    "eval.perplexity.0.windows": 2,
    "export.max_shard_gb": 4e-5,
    "export.runtimes": "false",
}
SMALLEST = tuple(part for key, value in SETTINGS.items() for part in ("--set", f"{key}={value}"))


@dataclass(frozen=True)
class Fault:
    """`fault` at the `at`-th operation of a kind (see faults.py), or after `at` seconds when kind is "time"."""

    kind: str
    at: float
    fault: str

    def __str__(self) -> str:
        return f"{self.fault} " + (f"after {self.at:.1f} s" if self.kind == "time" else f"at {self.kind} {self.at:.0f}")


@dataclass(frozen=True)
class Done:
    """How a command ended, and the processor time it took: on a busy machine its duration says little."""

    code: int
    cpu: float
    stderr: str
    stdout: str


@dataclass(frozen=True)
class Row:
    """One line of the table. `again` is what was made twice: blocks or updates; `lost` is processor time."""

    stage: str
    fault: Fault
    code: int
    sentence: str
    resumed: int
    equal: bool
    untouched: bool
    again: int
    lost: float
    problems: tuple[str, ...]


class Served:
    """Commands run in forks of one process that has imported everything."""

    def __init__(self, folder: Path, env: dict[str, str]) -> None:
        command = [sys.executable, str(FAULTS), "--serve"]
        self._output = folder / "command"
        self._errors = folder / "server.err"
        with open(self._errors, "w") as errors:
            self._process = subprocess.Popen(
                command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )

    def __call__(self, arguments: Sequence[str], spec: dict[str, Any] | None = None) -> Done:
        assert self._process.stdin is not None and self._process.stdout is not None
        request = {"fault": spec, "arguments": list(arguments), "output": str(self._output)}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, self._errors.read_text()
        answer = json.loads(line)
        stderr, stdout = (self._output.with_suffix(suffix).read_text() for suffix in (".err", ".out"))
        return Done(answer["code"], answer["cpu"], stderr, stdout)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(TIMEOUT)


class Spawned:
    """Commands run as processes of their own, as a user starts them."""

    def __init__(self, env: dict[str, str]) -> None:
        self._env = env

    def __call__(self, arguments: Sequence[str], spec: dict[str, Any] | None = None) -> Done:
        timed = spec is not None and spec.get("kind") == "time"
        watched = [str(FAULTS), json.dumps(spec)] if spec and not timed else ["-m", "qatcli"]
        before = _children()
        with subprocess.Popen(
            [sys.executable, *watched, *arguments], env=self._env, stderr=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process:
            if spec and timed:
                try:
                    process.wait(spec["at"])
                except subprocess.TimeoutExpired:
                    process.send_signal(getattr(signal, spec["fault"]))
            stdout, stderr = process.communicate(timeout=TIMEOUT)
        return Done(process.returncode, _children() - before, stderr.decode(), stdout.decode())


def _children() -> float:
    """Processor seconds of the processes started and ended so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@dataclass
class Chain:
    """A recipe, the reference run of it, and how commands are started."""

    recipe: Path
    folder: Path
    launch: Served | Spawned
    options: tuple[str, ...] = ()
    formats: tuple[str, ...] = ("gptq",)
    counts: dict[str, Counter[str]] = field(default_factory=dict)  # stage -> operations by kind
    cpu: dict[str, float] = field(default_factory=dict)  # processor seconds of a stage

    @property
    def reference(self) -> Path:
        return self.folder / "reference"

    def command(self, stage: str, run: Path) -> list[str]:
        formats = [part for name in self.formats for part in ("--format", name)] if stage == "export" else []
        return [stage, str(self.recipe), "--run", str(run), *formats, *self.options]

    def undisturbed(self) -> None:
        """Make the reference, timing every stage and counting its operations."""
        for stage in STAGES:
            trace = self.folder / f"{stage}.json"
            done = self.launch(self.command(stage, self.reference), {"under": str(self.reference), "trace": str(trace)})
            assert done.code == 0, done.stderr
            self.counts[stage] = Counter(json.loads(trace.read_text()))
            self.cpu[stage] = done.cpu

    def disturb(self, stage: str, fault: Fault) -> Row:
        """Run a stage with a fault on copies of the reference's earlier stages, then again without."""
        run = self.folder / "run"
        shutil.rmtree(run, ignore_errors=True)
        earlier = STAGES[: STAGES.index(stage)]
        for name in earlier:
            shutil.copytree(self.reference / name, run / name)
        run.mkdir(exist_ok=True)
        before = contents(run)
        spec = {"under": str(run), "kind": fault.kind, "at": fault.at, "fault": fault.fault}
        struck = self.launch(self.command(stage, run), spec)
        problems = self._judge(stage, run, fault, struck)
        untouched = {name: digest for name, digest in contents(run).items() if name in before} == before
        again = self.launch(self.command(stage, run))
        if again.code:
            problems.append(f"the same command exits {again.code}: {again.stderr.strip()[-300:]}")
        differences = self.compare(stage, run)
        made_twice = repeated(run, stage)
        allowed = 2 if stage == "e2e-qp" else 1  # checkpoint_every of the smoke recipe; one block
        if made_twice > allowed:
            problems.append(f"{made_twice} units made twice")
        left = [
            path.name for path in run.rglob("*") if path.name.endswith((".partial", ".lock", ".writing", ".replaced"))
        ]
        return Row(
            stage,
            fault,
            struck.code,
            " ".join(struck.stderr.strip().splitlines()[-3:])[-160:],
            again.code,
            not differences,
            untouched,
            made_twice,
            struck.cpu + again.cpu - self.cpu[stage],
            (*problems, *differences, *(f"{name} is left" for name in left)),
        )

    def _judge(self, stage: str, run: Path, fault: Fault, struck: Done) -> list[str]:
        """What the contract says about a command that was struck, and was not kept."""
        problems = []
        finished = struck.code == 0 and fault.kind == "time"
        expected = {**dict.fromkeys(KILLED, -signal.SIGKILL), **dict.fromkeys(SIGNALLED, 130), **dict.fromkeys(DISK, 6)}
        if not finished and struck.code != expected[fault.fault]:
            problems.append(f"exit code {struck.code}: {struck.stderr.strip()[-300:]}")
        if "Traceback" in struck.stderr:
            problems.append("a traceback")
        if struck.code == 130 and "continue with" not in struck.stderr:
            problems.append("does not say how to continue")
        if struck.code == 6 and not ("error:" in struck.stderr and "hint:" in struck.stderr):
            problems.append("no sentence")
        committed = run / stage / ("" if stage != "export" else self.formats[0])
        if committed.is_dir():  # killed after the rename, perhaps before the last file of the work was removed
            missing = [name for name in self.compare(stage, run) if not name.endswith("resume.json is unexpected")]
            problems += [f"half a result under the final name: {name}" for name in missing]
        return problems

    def compare(self, stage: str, run: Path) -> list[str]:
        """Names of what differs between a finished stage and the reference's: files, digests and untimed metrics."""
        differences = []
        for file in sorted((self.reference / stage).rglob("*")):
            if not file.is_file() or file.name == "log.jsonl":
                continue
            other = run / file.relative_to(self.reference)
            if not other.is_file() or _content(file) != _content(other):
                differences.append(f"{other.relative_to(run)} differs")
        extra = {f.relative_to(run / stage) for f in (run / stage).rglob("*")}
        extra -= {f.relative_to(self.reference / stage) for f in (self.reference / stage).rglob("*")}
        return differences + [f"{stage}/{name} is unexpected" for name in sorted(extra)]


def contents(folder: Path) -> dict[str, str]:
    """Path -> sha256 of every file below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def repeated(run: Path, stage: str) -> int:
    """Blocks or updates that the logs of a stage report more than once."""
    total = 0
    for log in (run / stage).rglob("log.jsonl"):
        events = [json.loads(line) for line in log.read_text().splitlines()]
        units = Counter((e["event"], e.get("index", e.get("step"))) for e in events if e["event"] in ("block", "step"))
        total += sum(count - 1 for count in units.values())
    return total


def _content(file: Path) -> object:
    """A file's bytes, or of JSON everything but times, paths and what follows from them."""
    if file.suffix != ".json":
        return file.read_bytes()
    value = json.loads(file.read_text())
    if file.name == "stage.json":
        value = {key: value[key] for key in ("stage", "kind", "identity", "metrics", "files", "model_fingerprint")}
        value["files"] = {name: digest for name, digest in value["files"].items() if not name.endswith("eval.json")}
    return _untimed(value)


def _untimed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _untimed(item) for key, item in value.items() if key not in UNTIMED}
    return [_untimed(item) for item in value] if isinstance(value, list) else value


def random_fault(chain: Chain, stage: str, faults: Sequence[str], choose: random.Random) -> Fault:
    """A fault at a random operation: a kind first, so that the many writes do not hide the few renames."""
    fault = choose.choice(faults)
    kinds = [kind for kind in chain.counts[stage] if fault not in DISK or kind != "unlink"]
    kind = choose.choice(sorted(kinds))
    return Fault(kind, choose.randint(1, chain.counts[stage][kind]), fault)


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown."""
    lines = ["| stage | fault | exit | same command again | digests equal | earlier outputs | made twice | lost |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in rows:
        cells = (row.stage, str(row.fault), row.code, "done" if row.resumed == 0 else f"exit {row.resumed}")
        checks = ("yes" if row.equal else "NO", "untouched" if row.untouched else "TOUCHED")
        lines.append("| " + " | ".join(map(str, (*cells, *checks, row.again, f"{row.lost:.1f} s"))) + " |")
    return "\n".join(lines)


def summary(rows: Sequence[Row], cpu: dict[str, float]) -> str:
    """One line per stage: disturbances, how many resumed to equal digests, work and processor time lost."""
    lines = [
        "| stage | undisturbed | kills | signals | disk faults | equal | made twice at most | lost, mean and worst |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|")
    for stage in STAGES:
        mine = [row for row in rows if row.stage == stage]
        if not mine:
            continue
        struck = [row for row in mine if row.code != 0]  # the others were over before the signal came
        kinds = [sum(row.fault.fault in group for row in struck) for group in (KILLED, SIGNALLED, DISK)]
        lost = [max(0.0, row.lost) for row in mine]
        good = sum(row.equal and not row.problems for row in mine)
        lines.append(
            f"| {stage} | {cpu[stage]:.1f} s | {kinds[0]} | {kinds[1]} | {kinds[2]} | {good} of {len(mine)} | "
            f"{max(row.again for row in mine)} | {sum(lost) / len(lost):.1f} s, {max(lost):.1f} s |"
        )
    return "\n".join(lines)


def environment(model: Path, text: Path, cache: Path) -> dict[str, str]:
    """What the smoke recipe and a quiet process without a network need."""
    own = {"QAT_SMOKE_MODEL": str(model), "QAT_SMOKE_TEXT": str(text), "XDG_CACHE_HOME": str(cache)}
    return {**os.environ, **own, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
