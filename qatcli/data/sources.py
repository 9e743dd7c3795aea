"""Rows of a data source of a recipe: local files, globs, or a Hugging Face dataset.

A source is a list of parts: one per file, or a single one for what `datasets` loads. Parts are read lazily, and only as
many rows as the caller takes. `datasets` reads the hub, where `name` and `split` choose, and local folders laid out as
on the hub. Repositories with a loading script, which nothing runs any more, are read by naming their data `files`.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from qatcli.data.files import SUFFIXES, LocatedRow, file_kind, is_text_file, read_rows
from qatcli.errors import InputError
from qatcli.failures import own_error
from qatcli.recipe import DataSource

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_NOT_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # beside saved data sets
_LOCAL_HINT = "give a local file or a glob, or the id of a Hugging Face dataset such as `allenai/c4`"


@dataclass(frozen=True)
class Part:
    """Rows that belong together: one file, or one hub split."""

    name: str
    rows: Callable[[], Iterator[LocatedRow]]
    plain_text: bool = False


def open_source(source: DataSource) -> list[Part]:
    """The parts of `source`, in a fixed order (files by path). Nothing is read yet, but `files` are downloaded.

    Raises InputError when no file matches, or when the name is neither a path nor a possible dataset id.
    """
    paths = local_paths(source.source) if source.files is None else _download(source)
    if paths is None:
        return [Part(source.source, lambda: _hub_rows(source))]
    ignored = [key for key, given in _of_datasets(source).items() if given and source.files is None]
    if ignored:
        raise InputError(
            f"{source.source}: without effect on local files: {', '.join(ignored)}",
            hint="give a glob of the files that are meant; only a folder without data files directly in it has splits",
        )
    return [Part(str(path), partial(read_rows, path), is_text_file(path)) for path in paths]


def local_paths(source: str) -> list[Path] | None:
    """The files `source` stands for, sorted; None if `datasets` has to find them.

    That is so for a hub id and for a folder with folders. Any other folder stands for the data files in it. Raises
    InputError when nothing is there.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        return sorted(file for file in path.iterdir() if _is_data(file)) or None
    if glob.has_magic(source):
        files = sorted(Path(match) for match in glob.glob(str(path), recursive=True) if Path(match).is_file())
        if not files:
            raise InputError(f"{source}: no file matches", hint="check the folder; a relative glob is easily misplaced")
        return files
    if _HUB_ID.fullmatch(source) and file_kind(path) not in SUFFIXES:
        return None
    raise InputError(f"{source}: no such file", hint=_LOCAL_HINT)


def _of_datasets(source: DataSource) -> dict[str, bool]:
    """The keys that mean something to `datasets` alone, and whether `source` sets them."""
    return {"name": source.name is not None, "split": source.split != "train", "streaming": source.streaming}


def _is_data(file: Path) -> bool:
    kind = file_kind(file)
    return file.is_file() and kind in SUFFIXES and kind != ".md" and file.name not in _NOT_DATA


def _download(source: DataSource) -> list[Path]:
    """The data files of a hub repository that match `files`, in the hub's cache, which also serves them offline."""
    from huggingface_hub import snapshot_download

    pattern = source.files or "*"
    try:
        folder = Path(
            snapshot_download(source.source, repo_type="dataset", revision=source.revision, allow_patterns=pattern)
        )
    except Exception as error:  # credentials, names and the network each raise their own type
        raise _hub_error(source.source, error) from error
    files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
    found = sorted(file for name, file in files.items() if fnmatchcase(name, pattern))
    if not found:
        raise InputError(
            f"{source.source}: no file of this Hugging Face dataset matches `{pattern}`",
            hint="see the tab `Files` of its page; a pattern is on the whole path, such as `en/*.json.gz`",
        )
    return found


def _hub_rows(source: DataSource) -> Iterator[LocatedRow]:
    options = {"split": source.split, "streaming": source.streaming, "revision": source.revision}
    dataset = load_hub(str(Path(source.source).expanduser()), source.name, **options)
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
    if own := own_error(error):
        raise own
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if "scripts are no longer supported" in reason:
        return InputError(
            f"{dataset}: this data set is a loading script, which nothing runs any more",
            hint='name its data files: on the hub by `files`, such as `"*.jsonl"`, in a local copy by a glob',
        )
    if Path(dataset).is_dir():
        return InputError(
            f"{dataset}: no data file directly in this folder, and `datasets` cannot load it: {reason}",
            hint=f"give a glob of files, or check `name` and `split`; data files are {', '.join(SUFFIXES)}",
        )
    return InputError(
        f"{dataset}: not a local file, and the Hugging Face dataset cannot be read: {reason}",
        hint="check the id, `name` and `split`; without network point `source` at a local copy, or set HF_HOME to a "
        "cache that has the dataset and HF_HUB_OFFLINE=1",
    )
