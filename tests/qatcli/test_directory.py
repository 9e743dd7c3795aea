"""Stage directories: whole or not there, verified when read, continued only by the same recipe and input."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qatcli import directory
from qatcli.directory import (
    StageDirectory,
    begin,
    commit,
    foreign_checkpoint,
    locked,
    open_stage,
    recover,
    refuse_changes,
)
from qatcli.errors import InputError, UsageError

IDENTITY: dict[str, Any] = {"quant": {"bits": 2, "group_size": 64}, "input": "abc"}
FACTS: dict[str, Any] = {"stage": "block-ap", "kind": "quantized", "identity": IDENTITY, "recipe": {}, "metrics": {}}


def finish(path: Path, content: str = "weights", *, restart: bool = False, **facts: Any) -> StageDirectory:
    """Run a stage that writes two files, from `begin` to `commit`."""
    partial = begin(path, IDENTITY, restart=restart)
    (partial / "model.safetensors").write_text(content)
    (partial / "sub").mkdir(exist_ok=True)
    (partial / "sub" / "more.json").write_text("{}")
    (partial / "log.jsonl").write_text('{"event": "start"}\n')
    return commit(path, partial, FACTS | facts)


def edit(path: Path, how: Callable[[dict[str, Any]], Any]) -> None:
    """Change stage.json as someone would who also corrects its digest."""
    facts = json.loads((path / "stage.json").read_text())
    how(facts)
    facts.pop("digest", None)
    facts["digest"] = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    (path / "stage.json").write_text(json.dumps(facts))


def names(path: Path) -> list[str]:
    return sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    """A finished stage directory."""
    finish(tmp_path / "run" / "block-ap")
    return tmp_path / "run" / "block-ap"


def test_a_finished_stage_holds_its_files_and_nothing_else(stage: Path) -> None:
    assert names(stage) == ["log.jsonl", "model.safetensors", "stage.json", "sub/more.json"]
    assert [path.name for path in stage.parent.iterdir()] == ["block-ap"]
    opened = open_stage(stage, kinds=("packed", "quantized"))
    assert opened.kind == "quantized"
    assert opened.facts["identity"] == IDENTITY
    assert opened.facts["format_version"] == 1


def test_digests_are_the_sha256_of_every_file_but_the_log(stage: Path) -> None:
    expected = {
        "model.safetensors": hashlib.sha256(b"weights").hexdigest(),
        "sub/more.json": hashlib.sha256(b"{}").hexdigest(),
    }
    assert open_stage(stage).facts["files"] == expected


def test_the_digest_of_a_stage_follows_every_file(tmp_path: Path) -> None:
    first, same, other = (finish(tmp_path / name, content) for name, content in [("a", "x"), ("b", "x"), ("c", "y")])
    assert first.digest == same.digest == open_stage(tmp_path / "a").digest
    assert first.digest != other.digest


def test_nothing_stands_under_the_final_name_before_commit(tmp_path: Path) -> None:
    path = tmp_path / "block-ap"
    partial = begin(path, IDENTITY, restart=False)
    (partial / "model.safetensors").write_text("half")
    assert not path.exists()
    with pytest.raises(InputError, match="not finished") as caught:
        open_stage(path)
    assert caught.value.hint is not None
    assert "qat block-ap" in caught.value.hint


@pytest.mark.parametrize("name", ["model.safetensors", "sub/more.json"])
def test_a_changed_file_is_named(stage: Path, name: str) -> None:
    content = (stage / name).read_text()
    (stage / name).write_text(content[:-1] + "~")
    with pytest.raises(InputError, match=f"{name} is damaged"):
        open_stage(stage)


def test_a_missing_file_is_named(stage: Path) -> None:
    (stage / "sub" / "more.json").unlink()
    with pytest.raises(InputError, match=r"incomplete: sub/more\.json is missing"):
        open_stage(stage)


def test_another_kind_is_refused_with_what_is_expected(stage: Path) -> None:
    with pytest.raises(InputError, match="holds a quantized; expected packed or metrics"):
        open_stage(stage, kinds=("packed", "metrics"))


def test_another_format_version_is_refused(stage: Path) -> None:
    edit(stage, lambda facts: facts.update(format_version=2))
    with pytest.raises(InputError, match="format version 2; this qat reads 1"):
        open_stage(stage)


@pytest.mark.parametrize("content", ["", "[]", "{", "null", '{"files": {}}', '{"files": 3, "kind": "x"}', "\x00"])
def test_a_malformed_stage_file_is_an_input_error(stage: Path, content: str) -> None:
    (stage / "stage.json").write_text(content)
    with pytest.raises(InputError, match=r"stage\.json is malformed"):
        open_stage(stage)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "sub/../../secret"])
def test_a_stage_file_cannot_point_outside_its_directory(stage: Path, name: str) -> None:
    (stage.parent / "secret").write_text("x")
    digest = hashlib.sha256(b"x").hexdigest()
    edit(stage, lambda facts: facts["files"].update({name: digest}))
    with pytest.raises(InputError, match="outside"):
        open_stage(stage)


def test_every_flipped_bit_of_a_stage_file_is_found(stage: Path) -> None:
    content = (stage / "stage.json").read_bytes()
    for position in range(0, len(content), 7):
        for bit in range(8):
            damaged = bytearray(content)
            damaged[position] ^= 1 << bit
            (stage / "stage.json").write_bytes(damaged)
            if _parsed(damaged) == _parsed(content):
                continue  # white space for white space
            with pytest.raises(InputError):
                open_stage(stage)
    (stage / "stage.json").write_bytes(content)
    open_stage(stage)


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return None


@pytest.mark.parametrize("target", ["model.safetensors", "stage.json"])
def test_a_link_out_of_a_stage_is_refused(stage: Path, target: str) -> None:
    outside = stage.parent / "outside"
    (stage / target).rename(outside)
    (stage / target).symlink_to(outside)
    with pytest.raises(InputError, match="link that leads out"):
        open_stage(stage)


def test_a_directory_without_a_stage_file_is_no_stage(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no stage\.json"):
        open_stage(tmp_path)
    with pytest.raises(InputError, match=r"no stage\.json"):
        open_stage(tmp_path / "nowhere")


# Resume.


def test_the_same_identity_continues_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "run" / "block-ap"
    first = begin(path, IDENTITY, restart=False)
    (first / "block-0").write_text("done")
    again = begin(path, json.loads(json.dumps(IDENTITY)), restart=False)
    assert again == first
    assert (again / "block-0").read_text() == "done"


def test_what_only_a_resume_needs_is_kept_until_the_commit_and_not_longer(tmp_path: Path) -> None:
    path = tmp_path / "e2e-qp"
    partial = begin(path, IDENTITY, restart=False)
    (partial / "resume.safetensors").write_text("optimizer")
    (partial / "model.safetensors").write_text("weights")
    assert list(commit(path, partial, FACTS).facts["files"]) == ["model.safetensors"]
    assert names(path) == ["model.safetensors", "stage.json"]


def test_another_identity_is_refused_by_the_names_of_the_keys(tmp_path: Path) -> None:
    path = tmp_path / "block-ap"
    partial = begin(path, IDENTITY, restart=False)
    (partial / "block-0").write_text("done")
    changed = {"quant": {"bits": 3, "group_size": 64, "symmetric": True}, "input": "abc"}
    with pytest.raises(InputError) as caught:
        begin(path, changed, restart=False)
    lines = caught.value.message.splitlines()
    assert lines[1:] == ["  quant.bits: was 2, is 3", "  quant.symmetric: was None, is True"]
    assert caught.value.hint is not None
    assert "--restart" in caught.value.hint
    assert (partial / "block-0").read_text() == "done"


def test_a_stage_that_failed_before_it_made_anything_takes_the_corrected_recipe(tmp_path: Path) -> None:
    path = tmp_path / "eval"
    partial = begin(path, IDENTITY, restart=False)
    (partial / "log.jsonl").write_text('{"event": "start"}\n')
    (partial / "written").mkdir()
    (partial / "written" / "model.safetensors.writing").write_text("half")
    assert begin(path, IDENTITY, restart=False) == partial
    assert (partial / "log.jsonl").is_file()
    changed = {"input": "corrected"}
    assert names(begin(path, changed, restart=False)) == ["resume.json"]
    assert directory.is_begun(path, changed)


@pytest.mark.parametrize(
    ("place", "identity", "command"),
    [
        ("runs/x/eval.partial", {}, "qat eval --restart"),
        ("runs/x/block-ap", {}, "qat block-ap --restart"),
        ("runs/x/export/awq.partial", {"variant": "awq"}, "qat export --format awq --restart"),
        ("runs/x/gptq/block-ap", {}, "qat eval --restart"),
    ],
)
def test_the_hint_restarts_one_stage(place: str, identity: dict[str, str], command: str) -> None:
    with pytest.raises(InputError) as caught:
        refuse_changes({}, {"input": "a", **identity}, Path(place))
    assert f"`{command}`" in str(caught.value.hint)


def test_restart_begins_with_an_empty_directory(tmp_path: Path) -> None:
    path = tmp_path / "block-ap"
    (begin(path, IDENTITY, restart=False) / "block-0").write_text("done")
    partial = begin(path, {"input": "other"}, restart=True)
    assert names(partial) == ["resume.json"]
    assert begin(path, {"input": "other"}, restart=False) == partial


def test_a_restart_keeps_the_old_result_until_the_new_one_is_whole(stage: Path) -> None:
    before = open_stage(stage).digest
    partial = begin(stage, {"input": "new"}, restart=True)
    (partial / "model.safetensors").write_text("new weights")
    assert open_stage(stage).digest == before
    commit(stage, partial, FACTS)
    assert (stage / "model.safetensors").read_text() == "new weights"
    assert names(stage) == ["model.safetensors", "stage.json"]
    assert [path.name for path in stage.parent.iterdir()] == ["block-ap"]
    open_stage(stage)


def test_leftovers_of_a_process_killed_before_it_began_are_removed(tmp_path: Path) -> None:
    partial = tmp_path / "block-ap.partial"
    partial.mkdir()
    (partial / "resume.json.writing").write_text("{")
    assert names(begin(tmp_path / "block-ap", IDENTITY, restart=False)) == ["resume.json"]


@pytest.mark.parametrize("call", ["write_json", "sha256", "sync"])
def test_a_process_killed_while_committing_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Hashing and syncing a large model takes minutes: what is there must survive them."""
    path = tmp_path / "block-ap"
    partial = begin(path, IDENTITY, restart=False)
    (partial / "block-0").write_text("done")

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(directory, call, die)
        with pytest.raises(KeyboardInterrupt):
            commit(path, partial, FACTS)
    assert not path.exists()
    again = begin(path, IDENTITY, restart=False)
    assert (again / "block-0").read_text() == "done"
    commit(path, again, FACTS)
    assert names(path) == ["block-0", "stage.json"]
    assert list(open_stage(path).facts["files"]) == ["block-0"]


def test_half_written_files_and_lines_do_not_survive_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "block-ap"
    partial = begin(path, IDENTITY, restart=False)
    (partial / "log.jsonl").write_text('{"event": "start"}\n{"event": "blo')
    (partial / "resume.safetensors.writing").write_text("half")
    begin(path, IDENTITY, restart=False)
    assert names(partial) == ["log.jsonl", "resume.json"]
    assert (partial / "log.jsonl").read_text() == '{"event": "start"}\n'


@pytest.mark.parametrize("step", ["rename", "discard"])
def test_a_process_killed_between_the_renames_of_a_restart(
    stage: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    partial = begin(stage, IDENTITY, restart=True)
    (partial / "model.safetensors").write_text("new weights")
    rename = os.rename

    def die_before_the_new(source: Path, target: Path) -> None:
        if source == partial:
            raise KeyboardInterrupt
        rename(source, target)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        if step == "rename":
            patched.setattr(os, "rename", die_before_the_new)
        else:
            patched.setattr(directory, "_discard", die)
        with pytest.raises(KeyboardInterrupt):
            commit(stage, partial, FACTS)
    recover(stage)
    assert (stage / "model.safetensors").read_text() == "new weights"
    assert [path.name for path in stage.parent.iterdir()] == ["block-ap"]
    assert names(stage) == ["model.safetensors", "stage.json"]
    open_stage(stage)


def test_a_rename_that_fails_leaves_the_old_result(stage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_stage(stage).digest
    partial = begin(stage, IDENTITY, restart=True)
    (partial / "model.safetensors").write_text("new weights")
    rename = os.rename

    def fail_for_the_new(source: Path, target: Path) -> None:
        if source == partial:
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_for_the_new)
    with pytest.raises(OSError, match="Input/output"):
        commit(stage, partial, FACTS)
    assert open_stage(stage).digest == before
    assert partial.is_dir()


@pytest.mark.parametrize("name", ["block-ap.partial", "block-ap.partial/log.jsonl", "block-ap.lock"])
def test_nothing_is_written_through_a_link(tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    run = tmp_path / "run"
    begin(run / "block-ap", IDENTITY, restart=False)
    if name.endswith(".partial"):
        (run / name).rename(outside)
        precious = outside / "resume.json"
    else:
        outside.write_text("precious")
        precious = outside
    content = precious.read_text()
    (run / name).symlink_to(outside)
    with pytest.raises(InputError, match="link"), locked(run / "block-ap"):
        begin(run / "block-ap", {"input": "other"}, restart=False)
    if not name.endswith(".lock"):
        begin(run / "block-ap", IDENTITY, restart=True)  # the link goes, what it leads to stays
    assert precious.read_text() == content


def test_refuse_changes_accepts_what_is_equal() -> None:
    refuse_changes(IDENTITY, json.loads(json.dumps(IDENTITY)), Path("x"))
    with pytest.raises(InputError, match="input: was abc, is None"):
        refuse_changes(IDENTITY, {"quant": IDENTITY["quant"]}, Path("x"))


# Locks.


def test_a_second_process_is_refused_while_the_first_works(tmp_path: Path) -> None:
    path = tmp_path / "run" / "block-ap"
    script = "import sys; from pathlib import Path; from qatcli.directory import locked\n"
    script += "with locked(Path(sys.argv[1])): print('locked', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", script, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(UsageError, match=f"process {holder.pid} on"), locked(path):
            pass
        holder.kill()
        holder.wait()
    with locked(path):  # the system released what the dead process held
        assert str(os.getpid()) in path.with_name("block-ap.lock").read_text()


def test_who_looks_whether_a_stage_is_at_work_turns_no_writer_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "block-ap"
    assert not directory.at_work(path)
    with locked(path):
        assert directory.at_work(path)
        assert directory.at_work(path)
    lock = path.with_name("block-ap.lock")
    lock.write_text("process 1 on elsewhere")  # killed, and its lock with it
    assert not directory.at_work(path)
    with open(lock) as reader:
        fcntl.flock(reader, fcntl.LOCK_SH)
        monkeypatch.setattr(time, "sleep", lambda pause: pause and fcntl.flock(reader, fcntl.LOCK_UN))
        with locked(path):
            assert directory.at_work(path)


def test_a_lock_is_gone_when_the_stage_is_done(tmp_path: Path) -> None:
    path = tmp_path / "block-ap"
    with locked(path), locked(tmp_path / "other"):
        assert len(list(tmp_path.iterdir())) == 2
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RuntimeError, match="a bug"), locked(path):
        raise RuntimeError("a bug")
    with locked(path):
        pass


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_a_run_directory_where_none_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for run, message in [(tmp_path / "file", "is not a directory"), (Path("/proc/x"), "/proc/x cannot be made")]:
        with pytest.raises(UsageError, match=message), locked(run / "block-ap"):
            pass


# Inputs that no stage wrote.


def test_a_foreign_checkpoint_is_identified_by_its_content(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text("weights")
    first = foreign_checkpoint(tmp_path / "a")
    assert first.kind == "checkpoint"
    assert first.digest == foreign_checkpoint(tmp_path / "b").digest
    (tmp_path / "b" / "model.safetensors").write_text("other")
    assert first.digest != foreign_checkpoint(tmp_path / "b").digest
    with pytest.raises(InputError, match="not a directory"):
        foreign_checkpoint(tmp_path / "missing")


def test_what_is_renamed_is_on_disk_and_then_the_name(tmp_path: Path, disk_order: list[str]) -> None:
    finish(tmp_path / "block-ap")
    at, partial = disk_order.index(f"named {tmp_path}/block-ap"), f"{tmp_path}/block-ap.partial"
    files = ("resume.json.writing", "model.safetensors", "sub/more.json", "stage.json.writing", "stage.json")
    assert {partial, *(f"{partial}/{name}" for name in files)} <= set(disk_order[:at])
    assert str(tmp_path) in disk_order[at:]


def test_a_lock_that_its_holder_removed_meanwhile_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was removed between opening and locking: another process would lock a new file of that name."""
    path, open_lock, opened = tmp_path / "block-ap", directory._open_lock, []

    def removed_once(file: Path) -> Any:
        opened.append(open_lock(file))
        if len(opened) == 1:
            file.unlink()
        return opened[-1]

    monkeypatch.setattr(directory, "_open_lock", removed_once)
    with locked(path):
        assert len(opened) == 2
        assert directory.at_work(path)


def test_a_lock_that_somebody_removed_is_not_missed_at_the_end(tmp_path: Path) -> None:
    """Nor is that of another, who has locked a new file since, taken away."""
    path = tmp_path / "block-ap"
    with locked(path):
        (tmp_path / "block-ap.lock").unlink()
    with locked(path):
        (tmp_path / "block-ap.lock").unlink()
        (tmp_path / "block-ap.lock").write_text("another's")
    assert (tmp_path / "block-ap.lock").read_text() == "another's"
