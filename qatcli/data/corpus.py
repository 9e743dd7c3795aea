"""The documents of one source, split into training and validation, tokenized only when drawn.

The first 90 % of the documents train and the last 10 % validate (EfficientQAT's split). The split is made within every
file that has at least ten documents, so that validation follows the mixture of a glob; smaller files are split
together. Fewer than ten texts in all, such as a few books, are split at 90 % of their tokens.

At most `limit` rows of a source are read, spread evenly over its files and taken from the start of each; long rows
lower that further, to about 1 GiB of text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING

from qatcli.data.examples import encoder
from qatcli.data.files import TEXT_FIELD
from qatcli.data.rows import Record, detect_format, parse_row
from qatcli.data.sources import Part, open_source
from qatcli.data.tokens import Example
from qatcli.errors import InputError
from qatcli.recipe import DataSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BYTE_LIMIT = 2**30
_SPLITTABLE = 10  # the fewest documents of which a tenth is one
_SPECIAL_TOKENS = 8  # more than any tokenizer puts around a document


@dataclass
class Document:
    """One document; `size_bound` is an upper bound of its number of tokens that needs no tokenizer."""

    size_bound: int
    encode: Callable[[], Example]

    @cached_property
    def example(self) -> Example:
        return self.encode()

    @property
    def is_tokenized(self) -> bool:
        return "example" in self.__dict__


@dataclass(frozen=True)
class Corpus:
    """What was read of one source.

    format: text, alpaca or chat. digest: sha256 of the content that was kept. skipped: rows without text or answer.
    """

    name: str
    format: str
    train: list[Document]
    validation: list[Document]
    digest: str
    skipped: int


def read_corpus(source: DataSource, tokenizer: PreTrainedTokenizerBase, *, limit: int) -> Corpus:
    """Read at most `limit` rows of `source` and split them.

    Raises InputError for data that are missing, empty, malformed or cannot be split, RecipeError for a format.
    """
    format_: str = source.format
    parts = open_source(source)
    records: list[list[Record]] = []
    skipped = 0
    for part in parts:
        format_, part_records, empty = _read_part(part, format_, source.field, share=len(parts), limit=limit)
        records.append(part_records)
        skipped += empty
    digest = _digest(record for part_records in records for record in part_records)
    encode = encoder(tokenizer, format_, source.template)
    train: list[Document] = []
    validation: list[Document] = []
    for group in _groups(records):
        documents = [_document(record, encode) for record in group]
        split = _split_tokens if format_ == "text" and len(group) < _SPLITTABLE else _split_documents
        first, last = split(documents)
        train += first
        validation += last
    if not train:
        raise InputError(f"{source.source}: too little to split into training and validation", hint="add documents")
    return Corpus(source.source, format_, train, validation, digest, skipped)


def check_source(source: DataSource, tokenizer: PreTrainedTokenizerBase) -> None:
    """Read the first row of every part of `source`, to say what is wrong with it before hours of other work.

    Raises what `read_corpus` and the first of its documents would.
    """
    for part in open_source(source):
        for format_, record in _parsed(part, source.format, source.field):
            if not record.is_empty:
                if format_ != "text":
                    encoder(tokenizer, format_, source.template)(record)
                break


def _read_part(part: Part, format_: str, field: str, *, share: int, limit: int) -> tuple[str, list[Record], int]:
    """(format, records that are not empty, how many are). Raises InputError when there is none to keep."""
    budget = BYTE_LIMIT // share
    records: list[Record] = []
    skipped = 0
    for found, record in islice(_parsed(part, format_, field), max(1, limit // share)):
        format_ = found
        if record.is_empty:
            skipped += 1
            continue
        records.append(record)
        budget -= len(record.content())
        if budget <= 0:
            break
    if not records:
        raise InputError(
            f"{part.name}: no document in it", hint="the file is empty, or all of its rows lack text or an answer"
        )
    return format_, records, skipped


def _parsed(part: Part, format_: str, field: str) -> Iterator[tuple[str, Record]]:
    """(format, record) of every row; the first row decides the format."""
    field = TEXT_FIELD if part.plain_text else field
    for located in part.rows():
        format_ = detect_format(format_, located[1], field)
        yield format_, parse_row(located, format_=format_, field=field)


def _digest(records: Iterable[Record]) -> str:
    digest = hashlib.sha256()
    for record in records:
        content = record.content()
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


def _groups(parts: list[list[Record]]) -> list[list[Record]]:
    """What is split by itself: every large part, and the small ones together."""
    small = [record for part in parts if len(part) < _SPLITTABLE for record in part]
    return [*(part for part in parts if len(part) >= _SPLITTABLE), *([small] if small else [])]


def _split_documents(documents: list[Document]) -> tuple[list[Document], list[Document]]:
    cut = len(documents) * 9 // 10
    return documents[:cut], documents[cut:]


def _split_tokens(documents: list[Document]) -> tuple[list[Document], list[Document]]:
    """Cut the documents, laid end to end, at 90 % of their tokens."""
    train: list[Document] = []
    validation: list[Document] = []
    left = sum(len(document.example) for document in documents) * 9 // 10
    for document in documents:
        for side, piece in ((train, document.example[:left]), (validation, document.example[left:])):
            if len(piece):
                side.append(_tokenized(piece))
        left = max(0, left - len(document.example))
    return train, validation


def _document(record: Record, encode: Callable[[Record], Example]) -> Document:
    # No tokenizer in use makes more tokens than bytes of UTF-8 out of a text.
    return Document(len(record.content()) + _SPECIAL_TOKENS, lambda: encode(record))


def _tokenized(example: Example) -> Document:
    return Document(len(example), lambda: example)
