"""Format detection, and what wrong rows say."""

from __future__ import annotations

from typing import Any

import pytest

from qatcli.data.rows import Record, detect_format, parse_row
from qatcli.errors import InputError, RecipeError

TEXT = {"text": "a", "meta": None}
ALPACA = {"instruction": "a", "input": "b", "output": "c"}
CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
SHAREGPT = {"id": 1, "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}


@pytest.mark.parametrize(
    ("row", "field", "expected"),
    [
        (TEXT, "text", "text"),
        (ALPACA, "text", "alpaca"),
        ({**ALPACA, "text": "rendered"}, "text", "alpaca"),
        (ALPACA, "output", "text"),
        (CHAT, "text", "chat"),
        (SHAREGPT, "text", "chat"),
        ({"dialogue": CHAT["messages"]}, "dialogue", "chat"),
        ({"unknown": 1}, "text", "text"),
    ],
)
def test_auto_looks_at_the_fields(row: dict[str, Any], field: str, expected: str) -> None:
    assert detect_format("auto", row, field) == expected
    assert detect_format("text", row, field) == "text"


def test_unknown_format() -> None:
    with pytest.raises(RecipeError, match="format `csv`") as caught:
        detect_format("csv", TEXT, "text")
    assert "alpaca" in str(caught.value.hint)


def test_records() -> None:
    assert parse_row(("here", TEXT), format_="text", field="text") == Record("here", ("a",))
    assert parse_row(("here", ALPACA), format_="alpaca", field="text") == Record("here", ("a", "b", "c"))
    assert parse_row(("", {**ALPACA, "input": None}), format_="alpaca", field="text").texts == ("a", "", "c")
    assert parse_row(("", {"text": None}), format_="text", field="text").is_empty, "left out and counted"
    expected = Record("here", ("a", "b"), ("user", "assistant"))
    assert parse_row(("here", CHAT), format_="chat", field="text") == expected
    assert parse_row(("here", SHAREGPT), format_="chat", field="text") == expected
    assert parse_row(("here", {"talk": CHAT["messages"]}), format_="chat", field="talk") == expected


def test_content_tells_fields_apart() -> None:
    rows = [Record("", ("a b",)), Record("", ("a", "b")), Record("", ("b",), ("a",)), Record("", ("a", "", "b"))]
    contents = {row.content() for row in rows}
    assert len(contents) >= 3
    assert Record("x", ("a",)).content() == Record("y", ("a",)).content()  # the place is no content
    assert Record("", ("\ud800",)).content()  # half a surrogate pair, as JSON escapes can hold
    assert Record("", (" ",)).is_empty


def test_rows_without_an_answer_are_empty() -> None:
    assert Record("", ("Add.", "", "")).is_empty
    assert not Record("", ("Add.", "", "3")).is_empty
    assert Record("", ("Hi",), ("user",)).is_empty
    assert Record("", ("Hi", " "), ("user", "assistant")).is_empty
    assert not Record("", ("Hi", "Yes", "No"), ("user", "assistant", "user")).is_empty


@pytest.mark.parametrize(
    ("row", "format_", "message"),
    [
        ({"body": "a", "id": 1}, "text", "no field `text`"),
        ({}, "text", "no field `text`"),
        ({"text": 3}, "text", "`text` must be a string, found int"),
        ({"instruction": "a"}, "alpaca", "no field `output`"),
        ({"instruction": "a", "input": 1, "output": "b"}, "alpaca", "`input` must be a string"),
        ({"text": "a"}, "chat", "must be a list of messages"),
        ({"messages": []}, "chat", "must be a list of messages"),
        ({"messages": "a"}, "chat", "`messages` must be a list"),
        ({"messages": ["a"]}, "chat", "a message must be an object, found str"),
        ({"messages": [{"role": "user"}]}, "chat", "needs `role` and `content`"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "chat", "as strings"),
    ],
)
def test_wrong_rows(row: dict[str, Any], format_: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parse_row(("file.jsonl line 7", row), format_=format_, field="text")
    assert "file.jsonl line 7" in caught.value.message


def test_a_missing_field_lists_those_that_are_there() -> None:
    with pytest.raises(InputError) as caught:
        parse_row(("", {"body": "a", "id": 1}), format_="text", field="text")
    assert "body, id" in str(caught.value.hint)
