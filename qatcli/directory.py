"""Stage directories: what a finished stage leaves, how it is committed, and how an unfinished one is continued.

`<run>/<stage>/` exists only when the stage finished: work happens in `<stage>.partial/`, which is fsynced and renamed
once. `stage.json` says what the directory is, what it was made from, the sha256 of every file in it and its own.
`<stage>.partial/resume.json` says what the unfinished work was made from, so that it is continued only by the same
recipe on the same input. What is found here may have been put here by anyone: no link is followed out of a directory.
Layout: docs/run-directory.md.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from qatcli.errors import InputError, UsageError
from qatcli.finite import finite
from qatcli.inputs import file_inside, read_json, sha256
from qatcli.interrupts import raise_if_interrupted, write_in_hand
from qatcli.writing import WRITING, sync, whole_file

CHAIN = ("calibrate", "block-ap", "e2e-qp", "pack", "eval")  # the stages of `qat run`, in this order
BASELINE = "gptq/block-ap"  # of an evaluation that compares with it, which makes it
FORMAT_VERSION = 1
STAGE_FILE = "stage.json"
RESUME_FILE = "resume.json"
RESUME_FILES = "resume.*"  # what continuing needs, and a finished stage does not
LOG_FILE = "log.jsonl"
EXPECT_FILE = "expect.json"  # of a run directory: figures that the recipe expects, which may change without a restart
REMAKE = "restore the file, or run the stage again with --restart"
PARTIAL = ".partial"  # suffix of a directory until its stage is finished
REPLACED = ".replaced"  # suffix of a finished one while another takes its place
FACTS = {"stage": str, "kind": str, "identity": dict, "recipe": dict, "metrics": dict, "files": dict}  # of stage.json


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
        """Identifies the contents and what they were made from: equal for equal bits, however often they were made."""
        return _digest({key: self.facts[key] for key in ("kind", "identity", "files")})


def partial_of(path: Path) -> Path:
    """Where the stage directory `path` is made."""
    return path.with_name(path.name + PARTIAL)


def stage_of(path: Path) -> str:
    """The name of the stage that a directory belongs to, finished, unfinished or replaced."""
    return path.name.removesuffix(PARTIAL).removesuffix(REPLACED)


def open_stage(path: Path, *, kinds: tuple[str, ...] = ()) -> StageDirectory:
    """Open a finished stage and verify every file's digest.

    InputError when it is absent, unfinished, of another kind, from another format version, or damaged.
    """
    if not os.path.isfile(path / STAGE_FILE):  # false, and no error, for a name that no file can have
        if os.path.isdir(f"{path}{PARTIAL}"):
            raise InputError(
                f"{path} is not finished", hint=f"run `qat {path.name}` again: it continues where it stopped"
            )
        raise InputError(
            f"{path} is not a stage directory: it has no {STAGE_FILE}",
            hint="a stage stands in its run's directory, as runs/smollm2/w3g64/pack",
        )
    facts = read_json(file_inside(path, STAGE_FILE))
    if facts.get("format_version", FORMAT_VERSION) != FORMAT_VERSION:
        raise InputError(f"{path} has format version {facts['format_version']}; this qat reads {FORMAT_VERSION}")
    malformed = [key for key, kind in FACTS.items() if not isinstance(facts.get(key), kind)]
    if malformed:
        raise InputError(f"{path / STAGE_FILE} is malformed: {', '.join(malformed)}", hint=REMAKE)
    if facts.pop("digest", None) != _digest(facts):
        raise InputError(f"{path / STAGE_FILE} is damaged: its content is not what was written", hint=REMAKE)
    if kinds and facts["kind"] not in kinds:
        raise InputError(
            f"{path} holds a {facts['kind']}; expected {' or '.join(kinds)}", hint="give another directory with --from"
        )
    for name, expected in facts["files"].items():
        if sha256(file_inside(path, name)) != expected:
            raise InputError(f"{path / name} is damaged: its sha256 is not the one in {STAGE_FILE}", hint=REMAKE)
    return StageDirectory(path, facts)


def foreign_checkpoint(path: Path) -> StageDirectory:
    """A checkpoint directory of another tool as a stage's input. InputError when it is not a directory."""
    if not path.is_dir():
        raise InputError(f"{path} is not a directory")
    files = {str(file.relative_to(path)): sha256(file) for file in sorted(path.rglob("*")) if file.is_file()}
    return StageDirectory(path, {"kind": "checkpoint", "identity": {}, "files": files})


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold `<path>.lock` for as long as the stage works. UsageError when another process holds it.

    The operating system releases the lock when its holder dies, however it dies.
    """
    file = path.with_name(path.name + ".lock")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UsageError(f"{error.filename} is not a directory", hint="choose another --run") from None
    except FileNotFoundError as error:  # although its parents were made: a file system such as /proc has no other files
        raise UsageError(f"{error.filename} cannot be made", hint="choose another --run") from None
    while True:
        with _open_lock(file) as handle:
            if not _take(handle):
                handle.seek(0)
                holder = handle.read().strip() or "another process"
                raise UsageError(
                    f"{path} is being written by {holder}", hint="wait for it, stop it, or choose another --run"
                )
            if not _is_at(file, handle):
                continue  # the holder before us removed the file between our opening and locking it
            handle.truncate(0)
            handle.write(f"process {os.getpid()} on {socket.gethostname()}")
            handle.flush()
            try:
                yield
            finally:
                if _is_at(file, handle):  # else somebody removed it, and it may be another's now
                    file.unlink()
            return


def _is_at(file: Path, handle: IO[str]) -> bool:
    return file.exists() and os.path.samestat(os.fstat(handle.fileno()), file.stat())


def _take(handle: IO[str]) -> bool:
    """Lock the file, unless a stage holds it; `at_work` of another process does so for a moment only."""
    for pause in (0.0, 0.01, 0.1):
        time.sleep(pause)
        with suppress(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    return False


def at_work(path: Path) -> bool:
    """Whether a process works on the stage `path`: its lock cannot be shared then.

    On another machine, too, where the file system tells other machines of locks, as `locked` needs as well.
    """
    try:
        with open(path.with_name(path.name + ".lock"), encoding="utf-8") as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _open_lock(file: Path) -> IO[str]:
    """Open or create a lock file. InputError when something else stands there, such as a link to a file of the user."""
    try:
        return open(
            file, "a+", encoding="utf-8", opener=lambda path, flags: os.open(path, flags | os.O_NOFOLLOW, 0o666)
        )
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR):
            raise
        raise InputError(f"{file} is a link or a directory, not a lock file", hint="remove it") from error


def recover(path: Path) -> None:
    """Finish a commit that was killed between its renames: the new result is whole by then."""
    old, partial = path.with_name(path.name + REPLACED), partial_of(path)
    if not path.exists() and old.is_dir():
        os.rename(partial if (partial / STAGE_FILE).is_file() else old, path)
    _discard(old)
    _forget(path)


def _forget(path: Path) -> None:
    """Remove what only an unfinished stage needs."""
    for file in path.glob(RESUME_FILES):
        file.unlink()


def begin(path: Path, identity: dict[str, Any], *, restart: bool) -> Path:
    """The partial directory to work in: a new one, or that of an interrupted run with the same `identity`.

    InputError names what differs when an interrupted run had another identity and has made something.
    """
    raise_if_interrupted()
    partial = partial_of(path)
    if not restart and (partial / RESUME_FILE).is_file():
        for file in (partial, *partial.rglob("*")):
            if file.is_symlink():
                raise InputError(f"{file} is a link; an unfinished stage has none", hint="remove it, or use --restart")
        if is_begun(path, identity) or _holds_work(partial):
            refuse_changes(read_json(partial / RESUME_FILE), identity, partial)
            for file in partial.rglob("*" + WRITING):
                file.unlink()  # half of a file that the resumed stage writes again
            _cut_torn_line(partial / LOG_FILE)
            return partial
    _discard(partial)  # killed before it began, failed before it made anything, or not wanted: nothing to keep
    partial.mkdir(parents=True)
    write_json(partial / RESUME_FILE, identity)
    return partial


def _holds_work(partial: Path) -> bool:
    """Whether an unfinished stage made anything that another one would have to make again."""
    own = (RESUME_FILE, LOG_FILE)
    return any(file.is_file() and file.name not in own and file.suffix != WRITING for file in partial.rglob("*"))


def _cut_torn_line(log: Path) -> None:
    """Drop what follows the last line end: a killed process, or a full disk, can leave half an event."""
    if log.is_file():
        with open(log, "rb+") as handle:
            handle.truncate(handle.read().rfind(b"\n") + 1)


def is_begun(path: Path, identity: dict[str, Any]) -> bool:
    """Whether an unfinished run with this `identity` can be continued."""
    file = partial_of(path) / RESUME_FILE
    return file.is_file() and read_json(file) == identity


def recorded_digest(path: Path) -> str | None:
    """The digest that the finished stage `path` says it has, unverified; None if there is none that can be read."""
    try:
        return read_json(path / STAGE_FILE).get("digest")
    except InputError:
        return None


def result_digest(path: Path) -> str | None:
    """`StageDirectory.digest` of the finished stage `path`, unverified; None if there is none that can be read."""
    try:
        return StageDirectory(path, read_json(path / STAGE_FILE)).digest
    except (InputError, KeyError):
        return None


def refuse_changes(old: dict[str, Any], new: dict[str, Any], path: Path) -> None:
    """InputError that names every difference between what `path` was made from and what is asked now."""
    changes = [f"  {key}: was {before}, is {after}" for key, before, after in _differences(old, new)]
    if changes:
        raise InputError(
            f"{path} was made from something else:\n" + "\n".join(changes),
            hint=f"`qat {_command(path, new)} --restart` makes this stage again (that of `qat run` makes every stage); "
            "or use --run for another run directory, or put the recipe back",
        )


def _command(path: Path, identity: dict[str, Any]) -> str:
    """The command that makes the stage directory `path`."""
    name = stage_of(path)
    if "variant" in identity:
        return f"export --format {name}"
    run_dir = path.parent.parent
    is_baseline = path == run_dir / BASELINE and not (path.parent / "calibrate").exists()  # no run of that name
    return "eval" if is_baseline else name


def commit(path: Path, partial: Path, facts: dict[str, Any]) -> StageDirectory:
    """Write stage.json, fsync everything and rename the partial directory to its final name."""
    raise_if_interrupted()
    not_digested = {partial / LOG_FILE, partial / STAGE_FILE, *partial.glob(RESUME_FILES)}
    files = sorted(file for file in partial.rglob("*") if file.is_file() and file not in not_digested)
    digests = {str(file.relative_to(partial)): sha256(file) for file in files}
    facts = json.loads(json.dumps({"format_version": FORMAT_VERSION, **facts, "files": digests}))
    write_json(partial / STAGE_FILE, {**facts, "digest": _digest(facts)})
    for file in [*files, partial / STAGE_FILE]:
        sync(file)
    sync(partial)
    with write_in_hand():
        _rename(partial, path)
        _forget(path)  # not before: hashing and syncing take long, and a kill meanwhile must lose nothing
        sync(path.parent)
    return StageDirectory(path, facts)


def _rename(partial: Path, path: Path) -> None:
    """Put the new result in the place of what is there, which stays until the new one is whole."""
    if not path.exists():
        os.rename(partial, path)
        return
    old = path.with_name(path.name + REPLACED)
    os.rename(path, old)
    try:
        os.rename(partial, path)
    except OSError:
        os.rename(old, path)
        raise
    _discard(old)


def _discard(path: Path) -> None:
    """Remove a directory, or a link to one, if it is there."""
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def write_json(file: Path, value: Any) -> None:
    """Write JSON so that the file appears complete or not at all. What is not finite becomes null."""
    with whole_file(file) as temporary, open(temporary, "w", encoding="utf-8") as handle:
        json.dump(finite(value), handle, indent=2, allow_nan=False)
        handle.write("\n")


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


def _digest(value: Any) -> str:
    """sha256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
