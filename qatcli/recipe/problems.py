"""One line per thing that is wrong with a recipe: key, value, problem, choices, nearest match."""

from __future__ import annotations

import json
import types
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from qatcli.recipe.schema import Recipe

Key = tuple[int | str, ...]

_LONGEST_VALUE = 60


@dataclass(frozen=True)
class Problem:
    """What is wrong (`text`) with the value at `key`; `value` is shown unless it is None."""

    key: Key
    text: str
    value: Any = None

    def line(self, where: str) -> str:
        """`where: key = value: text`."""
        shown = "" if self.value is None else f" = {_shown(self.value)}"
        return f"{where}: {dotted(self.key)}{shown}: {self.text}" if self.key else f"{where}: {self.text}"


def dotted(key: Iterable[int | str]) -> str:
    """The key as `--set` writes it."""
    return ".".join(str(part) for part in key)


def from_pydantic(error: ErrorDetails) -> Problem:
    """The problem that a validation error stands for."""
    key, kind, value = tuple(error["loc"]), error["type"], error["input"]
    if kind == "extra_forbidden":
        return Problem(key, _unknown_key(key), None if isinstance(value, dict | list) else value)
    if kind == "missing":
        return Problem(key, "is required")
    if kind == "literal_error":
        return Problem(key, _not_a_choice(key, value), value)
    if kind in ("model_type", "dict_type"):
        return Problem(key, "must be a mapping of keys", value)
    if kind == "string_type":
        return Problem(key, "must be text; quote it if it is", value)
    if kind == "tuple_type":
        return Problem(key, f"must be a list{_example(key, value)}", value)
    if kind == "too_short":
        return Problem(key, "must not be an empty list", value)
    if kind == "string_too_short":
        return Problem(key, "must not be empty", value)
    text = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return Problem(key, text, None if isinstance(value, dict) else value)


def nearest(word: Any, choices: Iterable[str]) -> str:
    """`; did you mean X?`, or nothing when no choice resembles `word`."""
    close = get_close_matches(str(word), list(choices), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _shown(value: Any) -> str:
    text = json.dumps(value, default=repr)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 3] + "..."


def _unknown_key(key: Key) -> str:
    section = _annotation_at(key[:-1])
    if not (isinstance(section, type) and issubclass(section, BaseModel)):
        return "unknown key"
    names = list(section.model_fields)
    suggestion = nearest(key[-1], names)
    if not suggestion:  # a key that exists, in the wrong section
        elsewhere = [place for place in _sections_with(str(key[-1])) if place != dotted(key)]
        suggestion = f"; did you mean {' or '.join(elsewhere)}?" if elsewhere else ""
    return f"unknown key; one of {', '.join(names)}{suggestion}"


def _not_a_choice(key: Key, value: Any) -> str:
    choices = [str(choice) for choice in get_args(_annotation_at(key))]
    return f"must be one of {', '.join(choices)}{nearest(value, choices)}"


def _example(key: Key, value: Any) -> str:
    """`, such as [X]` for the list that belongs at `key`; what its items have if these are mappings."""
    item = plain_type(get_args(_annotation_at(key))[0])
    if isinstance(item, type) and issubclass(item, BaseModel):
        return f" of mappings with {' and '.join(n for n, field in item.model_fields.items() if field.is_required())}"
    choices = get_args(item)
    example = value if isinstance(value, str) and (value in choices or not choices) else next(iter(choices), None)
    return f", such as [{example}]" if example else ""


def _sections_with(name: str) -> list[str]:
    found = [name] if name in Recipe.model_fields else []
    for section, field in Recipe.model_fields.items():
        model = plain_type(field.annotation)
        if isinstance(model, type) and issubclass(model, BaseModel) and name in model.model_fields:
            found.append(f"{section}.{name}")
    return found


def _annotation_at(key: Key) -> Any:
    """The type that the schema gives the value at `key`, or None where the schema has nothing."""
    annotation: Any = Recipe
    for part in key:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            field = annotation.model_fields.get(str(part))
            annotation = plain_type(field.annotation) if field else None
        elif get_origin(annotation) is tuple:
            annotation = plain_type(get_args(annotation)[0])
        elif get_origin(annotation) is dict:
            annotation = plain_type(get_args(annotation)[1])
        else:
            return None
    return annotation


def plain_type(annotation: Any) -> Any:
    """The type `annotation` without Annotated and without `| None`."""
    while True:
        if hasattr(annotation, "__metadata__"):
            annotation = annotation.__origin__
        elif get_origin(annotation) in (Union, types.UnionType):
            annotation = next(member for member in get_args(annotation) if member is not type(None))
        else:
            return annotation
