"""Rows of a dataset, checked and reduced to the text that is trained on. No tokenizer is needed here.

text    one document: a named string field
alpaca  instruction, input (optional), output
chat    a list of messages, {role, content} or ShareGPT's {from, value}
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from qatcli.data.files import LocatedRow, Row
from qatcli.errors import InputError, RecipeError

FORMATS = ("auto", "text", "chat", "alpaca")

_CONVERSATION_FIELDS = ("messages", "conversations")
_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can escape half of a pair; no tokenizer takes it
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class Record:
    """One row. texts: the document; or instruction, input, output; or what each of `roles` says in turn."""

    where: str
    texts: tuple[str, ...]
    roles: tuple[str, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to learn in it: no text, or no answer."""
        answers = self.texts[-1:]
        if self.roles:
            answers = tuple(text for role, text in zip(self.roles, self.texts, strict=True) if role == "assistant")
        return not any(text.strip() for text in answers)

    def content(self) -> bytes:
        """Everything that was kept of the row, for digests and for bounds on the number of tokens."""
        return "\0".join((*self.roles, *self.texts)).encode("utf-8", errors="surrogatepass")


def detect_format(format_: str, row: Row, field: str) -> str:
    """The format of a source whose first row is `row`: `format_`, unless that is auto.

    Raises RecipeError for a format that does not exist.
    """
    if format_ not in FORMATS:
        raise RecipeError(f"data format `{format_}` does not exist", hint=f"choose one of {', '.join(FORMATS)}")
    if format_ != "auto":
        return format_
    if field != "text" and isinstance(row.get(field), str):
        return "text"  # the user named a column: that column it is
    if "instruction" in row and "output" in row:
        return "alpaca"  # Alpaca's own rows also have a `text` column, which holds the rendered prompt
    return "chat" if isinstance(row.get(_conversation_field(row, field)), list) else "text"


def parse_row(located: LocatedRow, *, format_: str, field: str) -> Record:
    """Check one row against its format. Raises InputError that names the row and the fields it has."""
    record = _parse(located, format_=format_, field=field)
    if any(_SURROGATE.search(text) for text in (*record.texts, *record.roles)):
        raise InputError(f"{record.where}: half of a surrogate pair is not text", hint="remove the row, or repair it")
    return record


def _parse(located: LocatedRow, *, format_: str, field: str) -> Record:
    where, row = located
    if format_ == "text":
        return Record(where, (_string(where, row, field),))
    if format_ == "alpaca":
        context = _string(where, row, "input") if "input" in row else ""
        return Record(where, (_string(where, row, "instruction"), context, _string(where, row, "output")))
    return _conversation(where, row, _conversation_field(row, field))


def _string(where: str, row: Row, field: str) -> str:
    if field not in row:
        raise InputError(f"{where}: no field `{field}`", hint=_fields_hint(row))
    value = row[field]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(
            f"{where}: field `{field}` must be a string, found {type(value).__name__}", hint=_fields_hint(row)
        )
    return value


def _fields_hint(row: Row) -> str:
    return f"set `field` or `format` of this data source; the row has {', '.join(map(str, row)) or 'no fields'}"


def _conversation_field(row: Row, field: str) -> str:
    """The named field if the row has it as a list, else the first usual one it has."""
    if isinstance(row.get(field), list):
        return field
    return next((name for name in _CONVERSATION_FIELDS if name in row), field)


def _conversation(where: str, row: Row, field: str) -> Record:
    messages = row.get(field)
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{where}: field `{field}` must be a list of messages", hint=_fields_hint(row))
    roles, texts = [], []
    for message in messages:
        if not isinstance(message, Mapping):
            raise InputError(f"{where}: a message must be an object, found {type(message).__name__}")
        role = message.get("role", message.get("from"))
        text = message.get("content", message.get("value"))
        if not isinstance(role, str) or not isinstance(text, str):
            raise InputError(
                f"{where}: a message needs `role` and `content` as strings",
                hint=f"this one has {', '.join(f'{key} ({type(value).__name__})' for key, value in message.items())}",
            )
        roles.append(_SHAREGPT_ROLES.get(role, role))
        texts.append(text)
    return Record(where, tuple(texts), tuple(roles))
