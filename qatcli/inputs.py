"""Files that this process did not write: read as data, within limits, and never followed out of their directory."""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qatcli.errors import InputError

PIECES, PIECE = 1024, 2**16
FEWEST_PIECES = 16
READ = (".safetensors", ".gguf", ".jsonl", ".ndjson", ".parquet", ".arrow", ".txt", ".text", ".raw", ".utf8", ".gz")
JSON_LIMIT = 2**28  # bytes; the index of a model with 100,000 tensors has 10 MB


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`. InputError when it is absent, no regular file, too large or anything but an object."""
    try:
        if not file.is_file():
            raise _malformed(file, "does not exist" if not file.exists() else "is not a regular file")
        if file.stat().st_size > JSON_LIMIT:
            raise _malformed(file, f"has {file.stat().st_size} bytes, more than any such file needs")
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, not JSON, or a number of thousands of digits
        raise _malformed(file, f"is malformed or cannot be read: {error}") from error
    except RecursionError:
        raise _malformed(file, "is malformed: nested too deeply") from None
    if not isinstance(value, dict):
        raise _malformed(file, "is malformed: it is not a JSON object")
    return value


def sha256(file: Path) -> str:
    """Of what is in the file."""
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def content_digest(source: str) -> str | None:
    """sha256, shortened, over names and contents of the local files that a path or pattern names; None without any.

    Of files that have more than 64 MiB together the sizes, and pieces that lie evenly apart: what training changes, it
    changes everywhere. All have 64 MiB of pieces together, or 1 MiB each if that is more.
    """
    path = Path(source)
    found = _read_of(path) if path.is_dir() else map(Path, [source, *glob.iglob(source, recursive=True)])
    files = sorted({file for file in found if file.is_file()})
    digest = hashlib.sha256()
    sizes = [file.stat().st_size for file in files]
    all_whole = sum(sizes) <= PIECES * PIECE
    most = max(FEWEST_PIECES, PIECES // max(1, len(files)))
    for file, size in zip(files, sizes, strict=True):
        digest.update(os.fsencode(file.name) + f" {size} ".encode())
        whole = all_whole or size <= most * PIECE
        with open(file, "rb") as handle:
            for number in range(-(-size // PIECE) if whole else most):
                handle.seek(number * PIECE if whole else number * (size - PIECE) // (most - 1))
                digest.update(handle.read(PIECE))
    return digest.hexdigest()[:16] if files else None


def _read_of(folder: Path) -> Iterator[Path]:
    """What is read of a folder with a model or data: the files in it if weights or text are among them, else those in
    its folders, too. None is hidden: what git and the hub's client note beside them changes by itself."""
    here = [file for file in folder.iterdir() if file.is_file() and not file.name.startswith(".")]
    below = (file for file in folder.rglob("*") if not any(p.startswith(".") for p in file.relative_to(folder).parts))
    return iter(here) if any(file.suffix in READ for file in here) else below


def _malformed(file: Path, what: str) -> InputError:
    return InputError(f"{file} {what}", hint="restore the file, or make the directory it is in again")


def file_inside(directory: Path, name: object) -> Path:
    """The file `name` of `directory`.

    InputError when it is not a relative path of a regular file in there, or a link that leads out. A hub snapshot is
    the exception: its files are links into the same repository's cache.
    """
    if not isinstance(name, str) or "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts or not name:
        raise InputError(f"{directory} names a file outside of itself: {name!r}", hint="do not use this directory")
    file = directory / name
    if not file.is_file():
        raise InputError(
            f"{directory} is incomplete: {name} is missing", hint="restore the file, or make the directory again"
        )
    if not os.access(file, os.R_OK):
        raise InputError(f"{file} cannot be read", hint="check its permissions")
    hub_snapshot = directory.absolute().parent.name == "snapshots"
    root = directory.absolute().parents[1] if hub_snapshot else directory
    if not file.resolve().is_relative_to(root.resolve()):
        raise InputError(
            f"{file} is a link that leads out of its directory, to {file.resolve()}",
            hint="put the file itself there; only regular files are read",
        )
    return file
