"""Kills, signals and broken disks at every stage: the same command again gives the bits of an undisturbed run.

The long version, with random points and real models, is benchmarks/survival.py.
"""

from __future__ import annotations

import json
import shutil
import signal
import threading
from pathlib import Path

import pytest
from harness import Chain, Fault, Row, Served, Spawned, contents, environment, random_fault

from qatcli.directory import CHAIN, open_stage


def check(row: Row, code: int) -> None:
    assert row.code == code, row.sentence
    assert row.problems == ()
    assert row.resumed == 0
    assert row.equal
    assert row.untouched
    assert row.again <= (2 if row.stage == "e2e-qp" else 1)


# In the middle of a write, between write and rename, in the commit: one kill for each stage.
KILLS = [
    ("calibrate", Fault("save", 3, "kill")),
    ("block-ap", Fault("replace", 3, "kill-after")),
    ("e2e-qp", Fault("save", 3, "kill-after")),
    ("pack", Fault("fsync", 4, "kill")),
    ("eval", Fault("rename", 1, "kill")),
    ("export", Fault("save", 2, "kill")),
]


@pytest.mark.parametrize(("stage", "fault"), KILLS, ids=[f"{stage}-{fault.kind}" for stage, fault in KILLS])
def test_a_killed_stage_continues_to_the_same_bits(chain: Chain, stage: str, fault: Fault) -> None:
    check(chain.disturb(stage, fault), -signal.SIGKILL)


@pytest.mark.parametrize(
    ("stage", "fault"),
    [
        ("block-ap", Fault("save", 2, "ENOSPC")),
        ("e2e-qp", Fault("write", 60, "ENOSPC")),  # half an event in the log
        ("pack", Fault("fsync", 2, "EIO")),
        ("eval", Fault("replace", 1, "EROFS")),
        ("export", Fault("copy", 1, "ENOSPC")),
    ],
)
def test_a_broken_disk_is_said_and_costs_nothing_that_was_done(chain: Chain, stage: str, fault: Fault) -> None:
    check(chain.disturb(stage, fault), 6)


@pytest.mark.parametrize(
    ("stage", "fault"),
    [
        ("block-ap", Fault("save", 1, "SIGTERM")),
        ("block-ap", Fault("save", 3, "SIGINT")),  # the last block
        ("e2e-qp", Fault("fsync", 3, "SIGINT")),
        ("pack", Fault("rename", 1, "SIGTERM")),  # the commit, which is finished first
    ],
)
def test_a_signal_ends_a_stage_after_the_write_in_hand(chain: Chain, stage: str, fault: Fault) -> None:
    row = chain.disturb(stage, fault)
    check(row, 130)
    assert row.again == 0, "what was being written when the signal came was written"


def test_an_interrupted_export_keeps_its_whole_shards(chain: Chain) -> None:
    run = chain.folder / "kept"
    shutil.copytree(chain.reference / "pack", run / "pack")
    spec = {"under": str(run), "kind": "save", "at": 3, "fault": "kill"}
    assert chain.launch(chain.command("export", run), spec).code == -signal.SIGKILL
    (work,) = run.glob("export/*.partial/.written.partial")
    kept = {file.stat().st_ino for file in work.glob("shard-*.tmp")}
    assert len(kept) == 2
    assert chain.launch(chain.command("export", run)).code == 0
    assert kept < {file.stat().st_ino for file in run.glob("export/gptq/*.safetensors")}
    assert chain.compare("export", run) == []


def test_an_interrupted_restart_keeps_the_old_result_and_is_continued(chain: Chain) -> None:
    run = chain.folder / "restarted"
    for stage in ("calibrate", "block-ap"):
        shutil.copytree(chain.reference / stage, run / stage)
    before = contents(run)
    spec = {"under": str(run), "kind": "save", "at": 2, "fault": "SIGTERM"}
    stopped = chain.launch([*chain.command("block-ap", run), "--restart"], spec)
    assert stopped.code == 130
    assert "but without --restart" in stopped.stderr
    assert contents(run).items() >= before.items()
    partial = run / "block-ap.partial" / "model-block-0000.safetensors"
    made = partial.stat().st_ino
    assert chain.launch(chain.command("block-ap", run)).code == 0
    assert (run / "block-ap" / partial.name).stat().st_ino == made
    assert chain.compare("block-ap", run) == []


def test_an_interrupted_restart_of_the_chain_is_continued_to_its_end(chain: Chain) -> None:
    """The stages that it did not reach were made from results that are gone; those it made are kept."""
    run = chain.folder / "chain"
    for stage in CHAIN:
        shutil.copytree(chain.reference / stage, run / stage)
    command = [*chain.command("run", run), "--set", "block_ap.lr_norms=0.2"]
    within_block_ap = {"under": str(run), "kind": "save", "at": 7, "fault": "SIGTERM"}
    stopped = chain.launch([*command, "--restart"], within_block_ap)
    assert stopped.code == 130, stopped.stderr
    made = (run / "block-ap.partial" / "model-block-0000.safetensors").stat().st_ino
    finished = chain.launch(command)
    assert finished.code == 0, finished.stderr
    assert (run / "block-ap" / "model-block-0000.safetensors").stat().st_ino == made
    stages = [open_stage(run / stage) for stage in CHAIN]
    inputs = [stage.facts["identity"]["input"] for stage in stages[1:]]
    assert inputs == [stage.digest for stage in stages[:-1]]
    assert not (run / "restart.json").exists()


def test_what_does_not_change_the_result_may_change_on_a_resume(chain: Chain) -> None:
    """Begun with activations in memory, killed in the second block, ended with all of them in files: the same bits."""
    run = chain.folder / "moved"
    shutil.copytree(chain.reference / "calibrate", run / "calibrate")
    spec = {"under": str(run), "kind": "save", "at": 2, "fault": "kill"}
    assert chain.launch(chain.command("block-ap", run), spec).code == -signal.SIGKILL
    cache = ("--set", "block_ap.cache.host_gb=0", "--set", f"block_ap.cache.dir={chain.folder / 'files'}")
    elsewhere = (*cache, "--device", "cpu", "-v")
    reserved = {"under": str(chain.folder / "files"), "trace": str(chain.folder / "files.json")}
    done = chain.launch([*chain.command("block-ap", run), *elsewhere], reserved)
    assert done.code == 0, done.stderr
    assert json.loads(Path(reserved["trace"]).read_text())["open"] == 6, "three streams of each set of windows"
    assert list((chain.folder / "files").iterdir()) == []
    assert chain.compare("block-ap", run) == []


def test_a_real_short_write_is_said(chain: Chain, tiny_llama: Path, tiny_text: Path) -> None:
    """The kernel's own: no file may become larger than 4 KiB."""
    run = chain.folder / "limited"
    shutil.copytree(chain.reference / "calibrate", run / "calibrate")
    limited = chain.launch(chain.command("block-ap", run), {"under": str(run), "largest_file": 4096})
    assert limited.code == 6, limited.stderr
    assert "File too large" in limited.stderr
    assert chain.launch(chain.command("block-ap", run)).code == 0
    assert chain.compare("block-ap", run) == []


def test_the_second_process_on_a_run_directory_is_refused(
    chain: Chain, tiny_llama: Path, tiny_text: Path, tmp_path: Path
) -> None:
    run = chain.folder / "twice"
    env = environment(tiny_llama, tiny_text, chain.folder / "cache")
    other = Served(tmp_path, env) if isinstance(chain.launch, Served) else Spawned(env)
    shutil.copytree(chain.reference / "calibrate", run / "calibrate")
    spec = {"under": str(run), "kind": "save", "at": 1, "fault": "pause", "until": str(tmp_path / "go")}
    first: list[int] = []
    thread = threading.Thread(target=lambda: first.append(chain.launch(chain.command("block-ap", run), spec).code))
    thread.start()
    while not (run / "block-ap.partial" / "log.jsonl").is_file():
        thread.join(0.05)
        assert thread.is_alive()
    refused = other(["run", *chain.command("block-ap", run)[1:]])
    (tmp_path / "go").touch()
    thread.join()
    if isinstance(other, Served):
        other.close()
    assert refused.code == 2
    assert "is being written by process" in refused.stderr
    assert first == [0]
    assert chain.compare("block-ap", run) == []


def test_random_faults_strike_operations_that_happen(chain: Chain) -> None:
    import random

    for seed in range(50):
        fault = random_fault(chain, "block-ap", ("kill", "ENOSPC"), random.Random(seed))
        assert 1 <= fault.at <= chain.counts["block-ap"][fault.kind]
