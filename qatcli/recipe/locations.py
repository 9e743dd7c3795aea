"""Where things are: environment variables, hub ids against local paths, paths relative to the recipe file."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Mapping
from pathlib import Path

BUILT_IN_TEXTS = ("wikitext2", "c4")
RELATIVE = " (paths are relative to the recipe file)"  # ends what is said of a path that is not there

_VARIABLE = re.compile(r"\$?\$\{([^{}]*)\}")
_NAME = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(?::-(.*))?", re.DOTALL)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_FILE_SUFFIXES = (
    *(".jsonl", ".ndjson", ".json", ".parquet", ".arrow"),
    *(".txt", ".text", ".raw", ".utf8", ".md", ".gz", ".gguf"),
)


def expand_variables(text: str, environment: Mapping[str, str]) -> str:
    """`text` with `${NAME}` and `${NAME:-default}` replaced; `$${` stands for a literal `${`.

    Raises ValueError naming the variable that is not set, or the expression that is not one of the two forms.
    """

    def value(match: re.Match[str]) -> str:
        if match[0].startswith("$$"):
            return match[0][1:]
        parts = _NAME.fullmatch(match[1])
        if parts is None:
            raise ValueError(f"{match[0]} is neither ${{NAME}} nor ${{NAME:-default}}")
        name, default = parts[1], parts[2]
        found = environment.get(name) or default
        if found is None:
            raise ValueError(f"the environment variable {name} is not set")
        return found

    return _VARIABLE.sub(value, text)


def is_local(source: str) -> bool:
    """Whether `source` names files of this machine rather than a hub repository."""
    return (
        source.startswith((".", "/", "~"))
        or os.path.isabs(source)
        or source.lower().endswith(_FILE_SUFFIXES)
        or glob.has_magic(source)
    )


def absolute(path: str, folder: Path) -> str:
    """`path` as an absolute path, read relative to `folder`."""
    return os.path.normpath(folder / os.path.expanduser(path))


def resolve_source(source: str, folder: Path) -> str:
    """A model's or data set's source: hub ids unchanged, paths and globs absolute.

    Raises ValueError if the path does not exist, the glob matches nothing, it is neither a path nor a hub id, or a hub
    id that is also a folder here: which of the two is read would depend on where the command runs.
    """
    if is_local(source):
        return _existing(source, folder)
    if not _HUB_ID.fullmatch(source):
        raise ValueError("is not a hub id (owner/name); write a local path as ./path or /path")
    for here in (folder, Path()):
        if (here / source).exists():
            place = here.resolve() / source
            raise ValueError(f"is a hub id, and there is {place}; write a local path as ./path or /path")
    return source


def resolve_text(source: str, folder: Path) -> str:
    """A perplexity text: a built-in name unchanged, anything else the absolute path of an existing file."""
    if source in BUILT_IN_TEXTS:
        return source
    path = absolute(source, folder)
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"is not a file: {path}{RELATIVE}")
    if not os.path.exists(path):
        raise ValueError(f"no such file: {path}{RELATIVE}")
    return path


def resolve_folder(source: str, folder: Path) -> str:
    """The absolute path of an existing folder. Raises ValueError if there is none."""
    path = absolute(source, folder)
    if not os.path.isdir(path):
        raise ValueError(f"no such folder: {path}{RELATIVE}")
    return path


def _existing(source: str, folder: Path) -> str:
    path = absolute(source, folder)
    pattern = absolute(source, Path(glob.escape(str(folder))))
    if os.path.lexists(path) and os.path.exists(path):
        return path
    if glob.has_magic(source) and "\0" not in path and any(glob.iglob(pattern, recursive=True)):
        return pattern
    what = "no file matches" if glob.has_magic(source) else "no such file or folder:"
    raise ValueError(f"{what} {path}{RELATIVE}")
