"""Stage directories: what a finished stage leaves, how it is committed, and how an unfinished one is continued.

`<run>/<stage>/` exists only when the stage finished: work happens in `<stage>.partial/`, which is fsynced and renamed
once. `stage.json` says what the directory is, what it was made from and the sha256 of every file in it.
`<stage>.partial/resume.json` says what the unfinished work was made from, so that it is continued only by the same
recipe on the same input. Layout: docs/run-directory.md.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qatcli.errors import InputError, UsageError

FORMAT_VERSION = 1
STAGE_FILE = "stage.json"
RESUME_FILE = "resume.json"
LOG_FILE = "log.jsonl"


@dataclass(frozen=True)
class StageDirectory:
    """A finished stage: its path and the contents of its stage.json."""

    path: Path
    facts: dict[str, Any]

    @property
    def kind(self) -> str:
        return str(self.facts["kind"])

    @property
    def digest(self) -> str:
        """Identifies the directory's contents: sha256 of stage.json, which holds the sha256 of every file."""
        return str(self.facts.get("digest") or _sha256(self.path / STAGE_FILE))


def open_stage(path: Path, *, kinds: tuple[str, ...] = ()) -> StageDirectory:
    """Open a finished stage and verify every file's digest.

    InputError when it is absent, unfinished, of another kind, from another format version, or damaged.
    """
    if not (path / STAGE_FILE).is_file():
        if path.with_name(path.name + ".partial").is_dir():
            raise InputError(
                f"{path} is not finished", hint=f"run `qat {path.name}` again: it continues where it stopped"
            )
        raise InputError(f"{path} is not a stage directory: it has no {STAGE_FILE}")
    try:
        facts = json.loads((path / STAGE_FILE).read_text(encoding="utf-8"))
        files, kind, version = dict(facts["files"]), facts["kind"], facts["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path / STAGE_FILE} is malformed: {error!r}") from error
    if version != FORMAT_VERSION:
        raise InputError(f"{path} has format version {version}; this qat reads {FORMAT_VERSION}")
    if kinds and kind not in kinds:
        raise InputError(f"{path} holds a {kind}; expected {' or '.join(kinds)}")
    for name, expected in files.items():
        file = path / name
        if Path(name).is_absolute() or ".." in Path(name).parts or not file.is_file():
            raise InputError(f"{path} is incomplete: {name} is missing", hint="restore the file or run the stage again")
        if _sha256(file) != expected:
            raise InputError(
                f"{file} is damaged: its sha256 is not the one in {STAGE_FILE}",
                hint="restore the file, or run the stage again with --restart",
            )
    return StageDirectory(path, facts)


def foreign_checkpoint(path: Path) -> StageDirectory:
    """A checkpoint directory of another tool as a stage's input. InputError when it is not a directory."""
    if not path.is_dir():
        raise InputError(f"{path} is not a directory")
    digest = hashlib.sha256()
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        digest.update(f"{file.relative_to(path)} {_sha256(file)}\n".encode())
    return StageDirectory(path, {"kind": "checkpoint", "digest": digest.hexdigest()})


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold `<path>.lock` for as long as the stage works. UsageError when another process holds it.

    The operating system releases the lock when its holder dies, however it dies.
    """
    file = path.with_name(path.name + ".lock")
    file.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with open(file, "a+", encoding="utf-8") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                handle.seek(0)
                holder = handle.read().strip() or "another process"
                raise UsageError(
                    f"{path} is being written by {holder}", hint="wait for it, stop it, or choose another --run"
                ) from None
            if not (file.exists() and os.path.samestat(os.fstat(handle.fileno()), file.stat())):
                continue  # the holder before us removed the file between our opening and locking it
            handle.truncate(0)
            handle.write(f"process {os.getpid()} on {socket.gethostname()}")
            handle.flush()
            try:
                yield
            finally:
                file.unlink()
            return


def begin(path: Path, identity: dict[str, Any], *, restart: bool) -> Path:
    """The partial directory to work in: a new one, or that of an interrupted run with the same `identity`.

    UsageError names what differs when an interrupted run had another identity.
    """
    partial = path.with_name(path.name + ".partial")
    if restart and partial.exists():
        shutil.rmtree(partial)
    if (partial / RESUME_FILE).is_file():
        refuse_changes(json.loads((partial / RESUME_FILE).read_text(encoding="utf-8")), identity, partial)
        return partial
    if partial.exists():  # killed before resume.json was written: nothing in it is worth keeping
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    write_json(partial / RESUME_FILE, identity)
    return partial


def refuse_changes(old: dict[str, Any], new: dict[str, Any], path: Path) -> None:
    """UsageError that names every difference between what `path` was made from and what is asked now."""
    changes = [f"  {key}: was {before}, is {after}" for key, before, after in _differences(old, new)]
    if changes:
        raise UsageError(
            f"{path} was made from something else:\n" + "\n".join(changes),
            hint="use --restart to make it again, --run for another run directory, or put the recipe back",
        )


def commit(path: Path, partial: Path, facts: dict[str, Any]) -> StageDirectory:
    """Write stage.json, fsync everything and rename the partial directory to its final name."""
    not_digested = {partial / name for name in (LOG_FILE, RESUME_FILE, STAGE_FILE)}
    files = sorted(file for file in partial.rglob("*") if file.is_file() and file not in not_digested)
    digests = {str(file.relative_to(partial)): _sha256(file) for file in files}
    facts = {"format_version": FORMAT_VERSION, **facts, "files": digests}
    write_json(partial / STAGE_FILE, facts)
    for file in [*files, partial / STAGE_FILE]:
        _fsync(file)
    _fsync(partial)
    if path.exists():  # only after --restart: the old result stays until the new one is whole
        old = path.with_name(path.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        os.rename(path, old)
        os.rename(partial, path)
        shutil.rmtree(old)
    else:
        os.rename(partial, path)
    (path / RESUME_FILE).unlink()  # not earlier: hashing and syncing take long, and a kill meanwhile must lose nothing
    _fsync(path.parent)
    return StageDirectory(path, facts)


def write_json(file: Path, value: Any) -> None:
    """Write JSON so that the file appears complete or not at all."""
    temporary = file.with_name(file.name + ".writing")
    with open(temporary, "w", encoding="utf-8") as handle:
        json.dump(value, handle, indent=2)
        handle.write("\n")
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, file)


def adopt(written: Path, out: Path) -> None:
    """Move everything in `written` up into `out` and remove it."""
    for file in written.iterdir():
        file.rename(out / file.name)
    written.rmdir()


def _differences(old: Any, new: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(name), new.get(name), f"{key}.{name}" if key else name)
    elif old != new:
        yield key, old, new


def _sha256(file: Path) -> str:
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
