"""Rows of a data source of a recipe: local files, globs, or a Hugging Face dataset.

A source is a list of parts: one per local file, or a single one for a hub dataset. Parts are read lazily, and only as
many rows as the caller takes. `split` and `name` choose within a hub dataset and are ignored for local files.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from qatcli.data.files import SUFFIXES, LocatedRow, file_kind, is_text_file, read_rows
from qatcli.errors import InputError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_LOCAL_HINT = "give a local file or a glob, or the id of a Hugging Face dataset such as `allenai/c4`"


class DataSource(Protocol):
    """What a recipe says about one source; the recipe's own model has these fields."""

    @property
    def source(self) -> str: ...
    @property
    def name(self) -> str | None: ...
    @property
    def split(self) -> str: ...
    @property
    def field(self) -> str: ...
    @property
    def weight(self) -> float: ...
    @property
    def streaming(self) -> bool: ...
    @property
    def format(self) -> str: ...


@dataclass(frozen=True)
class Part:
    """Rows that belong together: one file, or one hub split."""

    name: str
    rows: Callable[[], Iterator[LocatedRow]]
    plain_text: bool = False


def open_source(source: DataSource) -> list[Part]:
    """The parts of `source`, in a fixed order (files by path). Nothing is read yet, the hub is not contacted.

    Raises InputError when no file matches, or when the name is neither a path nor a possible dataset id.
    """
    paths = local_paths(source.source)
    if paths is None:
        return [Part(source.source, lambda: _hub_rows(source))]
    return [Part(str(path), _file_reader(path), is_text_file(path)) for path in paths]


def local_paths(source: str) -> list[Path] | None:
    """The files `source` stands for, sorted; None if it is a hub id.

    A folder stands for the data files directly in it. Raises InputError when nothing is there.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file() and file_kind(file) in SUFFIXES)
        if not files:
            raise InputError(f"{source}: no data file in this folder", hint=f"it needs one of {', '.join(SUFFIXES)}")
        return files
    if glob.has_magic(source):
        files = sorted(Path(match) for match in glob.glob(str(path), recursive=True) if Path(match).is_file())
        if not files:
            raise InputError(f"{source}: no file matches", hint="check the folder; a relative glob is easily misplaced")
        return files
    if _HUB_ID.fullmatch(source) and file_kind(path) not in SUFFIXES:
        return None
    raise InputError(f"{source}: no such file", hint=_LOCAL_HINT)


def _file_reader(path: Path) -> Callable[[], Iterator[LocatedRow]]:
    return lambda: read_rows(path)


def _hub_rows(source: DataSource) -> Iterator[LocatedRow]:
    dataset = load_hub(source.source, source.name, split=source.split, streaming=source.streaming)
    rows = enumerate(dataset)
    while True:
        try:
            index, row = next(rows)
        except StopIteration:
            return
        except Exception as error:  # a stream can fail at any row, with whatever its HTTP client raises
            raise _hub_error(source.source, error) from error
        yield f"{source.source} row {index + 1}", row


def load_hub(dataset: str, name: str | None, **options: Any) -> Any:
    """`datasets.load_dataset`, with every failure turned into an InputError that says what can be done."""
    from datasets import load_dataset

    try:
        return load_dataset(dataset, name, **options)
    except Exception as error:  # configs, splits, scripts, credentials and the network each raise their own type
        raise _hub_error(dataset, error) from error


def _hub_error(dataset: str, error: Exception) -> InputError:
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return InputError(
        f"{dataset}: not a local file, and the Hugging Face dataset cannot be read: {reason}",
        hint="check the id, `name` and `split`; without network point `source` at a local copy, or set HF_HOME to a "
        "cache that has the dataset and HF_HUB_OFFLINE=1",
    )
