"""A directory that appears complete under its name or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qatcli.errors import InputError, ResourceError
from qatcli.writing import sync


@contextmanager
def atomic_directory(out: Path, *, resume: bool = False) -> Iterator[Path]:
    """Yield a sibling working directory; on success sync its files and rename it to `out`, else remove it.

    With `resume` the working directory of an interrupted run stays and is yielded again; the caller knows that it is of
    the same content. InputError when `out` exists and is not an empty directory, ResourceError when the disk is full.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists already", hint="remove it, or export to another directory")
    work = out.with_name(f".{out.name}.partial")
    if not resume:
        shutil.rmtree(work, ignore_errors=True)  # left by a run that was killed
    work.mkdir(parents=True, exist_ok=resume)
    try:
        yield work
        for file in sorted(work.rglob("*")):
            sync(file)
        sync(work)
        os.replace(work, out)
        sync(out.parent)
    except BaseException as error:
        if not resume:
            shutil.rmtree(work, ignore_errors=True)
        if isinstance(error, OSError) and _disk_is_full(error):
            raise ResourceError(f"no space left while writing {out}", hint="free space and export again") from error
        raise


def _disk_is_full(error: OSError) -> bool:
    """numpy's `tofile`, through which GGUF files are written, says so without an error number."""
    if error.errno is None:
        return str(error).startswith("Not enough free space") or "requested and" in str(error)
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
