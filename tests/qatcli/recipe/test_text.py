"""YAML is read strictly, and every refusal has a place."""

from __future__ import annotations

import pytest

from qatcli.recipe.text import YamlProblem, parse


def test_values() -> None:
    assert parse("a: 1\nb: [x, 2.5, null, true]\nc: {d: 'e'}") == {"a": 1, "b": ["x", 2.5, None, True], "c": {"d": "e"}}
    assert parse("") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: [1, 2", r"line 2, column \d+: .*expected ',' or '\]'"),
        ("a: 1\n b: 2", r"line 2, column 3: "),
        ("a: 1\nb:\n  c: 1\n  c: 2", r"line 4, column 3: the key 'c' is already set on line 3"),
        ("a: 1\na: 1", r"line 2, column 1: the key 'a' is already set on line 1"),
        ("1: 2", r"line 1, column 1: a key must be text, not 1"),
        ("on: 2", r"a key must be text, not True"),
        ("? [a]\n: 2", r"a key must be text"),
        ("a: &x 1\nb: *x", r"line 2, column 4: aliases are not supported"),
        ("a: &x [*x]", r"aliases are not supported"),
        ("a: !!python/object/apply:os.system [ls]", r"could not determine a constructor"),
        ("a: 2024-13-45", r"line 1, column 4: cannot read this value: month"),
        ("a: !!int abc", r"cannot read this value"),
        ("a: " + "9" * 5000, r"cannot read this value"),
        (r'a: "\ud800"', r"line 1, column 4: cannot read this value: half of a surrogate pair"),
        (r'"\udfff": 1', r"line 1, column 1: cannot read this value: half of a surrogate pair"),
        ("a: 1\n---\nb: 2", r"expected a single document"),
        ("a: \x07", r"character 3: special characters are not allowed"),
        ("[" * 3000, r"nested too deeply"),
        ("\t- a", r"cannot start any token"),
    ],
)
def test_refusals(text: str, message: str) -> None:
    with pytest.raises(YamlProblem, match=message):
        parse(text)
