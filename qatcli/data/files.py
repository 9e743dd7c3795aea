"""Rows of one local file, read as a stream.

JSON lines are parsed here and not by `datasets`, whose columns must have one type for the whole file: the `meta`
column of RedPajama has a different shape in every subset. Parquet and arrow are read by pyarrow in batches, so
nothing is copied into a cache. Text is UTF-8; a row of a text file is one document.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

from qatcli.errors import InputError, RecipeError

Row = Mapping[str, Any]
LocatedRow = tuple[str, Row]  # ("corpus.jsonl line 7", {...})

TEXT_FIELD = "text"  # the one field of a row read from a plain text file
_BATCH_ROWS = 1024
_UNREADABLE = (OSError, EOFError, zlib.error)  # the last two: a gzip member that is cut off, or damaged
LONGEST = 2**22  # characters of a document in a text file: a tokenizer takes 150 bytes of memory for each
_DOCUMENT_END = "<|endoftext|>"  # a line of its own in TinyStories and other GPT-style dumps


def read_rows(path: Path) -> Iterator[LocatedRow]:
    """Yield (where, row) for every row of `path`, lazily.

    Raises RecipeError for a suffix that is not in `SUFFIXES`, InputError for a file that cannot be read, decoded or
    parsed; the message names the file and the line.
    """
    reader = _READERS.get(file_kind(path))
    if reader is None:
        raise RecipeError(
            f"{path}: no reader for `{path.suffix or path.name}` files",
            hint=f"use one of {', '.join(SUFFIXES)} (jsonl, json and text also as .gz)",
        )
    try:
        yield from reader(path)
    except _UNREADABLE as error:
        raise InputError(f"{path}: cannot be read: {error}", hint="check the file and its permissions") from error


def file_kind(path: Path) -> str:
    """The suffix that decides the reader, without `.gz`; empty when there is none."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
        if suffixes and suffixes[-1] in (".parquet", ".arrow"):
            return ""  # these compress inside the file; a gzip around them is a mistake
    return suffixes[-1] if suffixes else ""


def read_text(path: Path) -> str:
    """The whole file as one string, newlines untouched. Raises InputError if it is missing or not UTF-8."""
    try:
        with _open(path) as file:
            content = file.read()
    except _UNREADABLE as error:
        raise InputError(f"{path}: cannot be read: {error}", hint="check the path of the text file") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, content.count(b"\n", 0, error.start) + 1) from error


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if path.suffix.lower() == ".gz" else path.open("rb")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, text without its line end)."""
    with _open(path) as file:
        for number, raw in enumerate(file, start=1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise _not_utf8(path, number) from error
            yield number, line.rstrip("\r\n")


def _not_utf8(path: Path, line: int) -> InputError:
    return InputError(f"{path} line {line}: not valid UTF-8", hint="convert the file, e.g. with `iconv -t utf-8`")


def _json_lines(path: Path) -> Iterator[LocatedRow]:
    for number, line in _lines(path):
        if line.strip():
            where = f"{path} line {number}"
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{where}: not valid JSON: {error}", hint="every line must be one object") from error
            yield where, _object(where, value)


def _json_file(path: Path) -> Iterator[LocatedRow]:
    """A list of objects, or an object holding one in "data", or JSON lines under this suffix, as the shards of C4."""
    if _is_json_lines(path):
        yield from _json_lines(path)
        return
    content = read_text(path)
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        if content.lstrip().startswith("{"):
            yield from _json_lines(path)
            return
        raise InputError(f"{path}: not valid JSON: {error}", hint="a list of objects is expected") from error
    rows = value.get("data", [value]) if isinstance(value, dict) else value
    if not isinstance(rows, list):
        raise InputError(
            f"{path}: holds {_kind(value)}, not rows",
            hint='a list of objects, or an object whose "data" is one, is expected',
        )
    for index, row in enumerate(rows):
        where = f"{path} row {index + 1}"
        yield where, _object(where, row)


def _is_json_lines(path: Path) -> bool:
    """Whether a first line that is an object is followed by more: then the file need not fit into memory."""
    lines = (line for _, line in _lines(path) if line.strip())
    first = next(lines, "")
    try:
        return first.startswith("{") and isinstance(json.loads(first), dict) and next(lines, None) is not None
    except (ValueError, RecursionError):
        return False


def is_json_list(path: Path) -> bool:
    """Whether the file is read whole, being one list, and not line by line."""
    if path.suffix.lower() != ".json":
        return False
    with path.open("rb") as file:
        return file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"["


def _object(where: str, value: Any) -> Row:
    if not isinstance(value, dict):
        raise InputError(f"{where}: a row must be an object, found {_kind(value)}", hint='e.g. {"text": "..."}')
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _parquet(path: Path) -> Iterator[LocatedRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from _batches(path, file.iter_batches(batch_size=_BATCH_ROWS))
    except pyarrow.ArrowException as error:
        raise InputError(f"{path}: not a readable parquet file: {error}") from error


def _arrow(path: Path) -> Iterator[LocatedRow]:
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as source:
            try:
                batches = pyarrow.ipc.open_stream(source)  # what `datasets` writes
            except pyarrow.ArrowInvalid:
                source.seek(0)
                file = pyarrow.ipc.open_file(source)
                batches = (file.get_batch(index) for index in range(file.num_record_batches))
            yield from _batches(path, batches)
    except pyarrow.ArrowException as error:
        raise InputError(f"{path}: not a readable arrow file: {error}") from error


def _batches(path: Path, batches: Any) -> Iterator[LocatedRow]:
    row_number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, _BATCH_ROWS):
            for row in batch.slice(start, _BATCH_ROWS).to_pylist():
                row_number += 1
                yield f"{path} row {row_number}", row


def _text_documents(path: Path) -> Iterator[LocatedRow]:
    """Documents end at a line `<|endoftext|>`, at WikiExtractor's `<doc ...>` and `</doc>`, or at two empty lines.

    A file without any of these, such as a raw WikiText file or a book, is one document, up to LONGEST characters: it
    goes on in another one.
    """
    document: list[str] = []
    first_line, length = 1, 0
    for number, line in _lines(path):
        document.append(line)
        length += len(line)
        ends = _is_delimiter(line)
        if ends:
            document.pop()
        if ends or length >= LONGEST or document[-2:] == ["", ""]:
            yield from _text_row(path, first_line, document)
            document, first_line, length = [], number + 1, 0
    yield from _text_row(path, first_line, document)


def _is_delimiter(line: str) -> bool:
    line = line.strip()
    return line in (_DOCUMENT_END, "</doc>") or (line.startswith("<doc ") and line.endswith(">"))


def _text_row(path: Path, first_line: int, lines: list[str]) -> Iterator[LocatedRow]:
    text = "\n".join(lines).strip("\n")
    if text.strip():
        yield f"{path} line {first_line}", {TEXT_FIELD: text}


_TEXT_SUFFIXES = (".txt", ".text", ".raw", ".utf8", ".md")
_READERS: dict[str, Callable[[Path], Iterator[LocatedRow]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_file,
    ".parquet": _parquet,
    ".arrow": _arrow,
    **dict.fromkeys(_TEXT_SUFFIXES, _text_documents),
}
SUFFIXES = tuple(_READERS)


def is_text_file(path: Path) -> bool:
    """Whether rows of this file are whole documents of plain text, so that no field has to be named."""
    return file_kind(path) in _TEXT_SUFFIXES
