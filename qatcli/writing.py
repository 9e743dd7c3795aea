"""Files that appear complete under their names, on the disk and not only in its cache, or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qatcli.interrupts import write_in_hand

WRITING = ".writing"  # suffix of a file until it is whole


@contextmanager
def whole_file(file: Path) -> Iterator[Path]:
    """Where to write what becomes `file` at the end, if no error comes. An interrupt waits until then."""
    temporary = file.with_name(file.name + WRITING)
    with write_in_hand():
        yield temporary
        sync(temporary)
        os.replace(temporary, file)


def sync(path: Path) -> None:
    """Have a file or directory written to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
