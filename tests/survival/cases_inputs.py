"""Bad inputs: tokenizers, rows of data, recipes."""

from __future__ import annotations

import gzip
import os
from typing import Any

from hostile import CANARY, DEEP, Place, case, edit, use

# Tokenizer files.


def tokenizer(name: str, file: str, content: bytes) -> None:
    """A case with other bytes in a tokenizer file."""

    @case(f"{file}: {name}", "calibrate", 3, "tokenizer")
    def _(p: Place) -> list[str]:
        (p.model / file).write_bytes(content)
        return use(p)


tokenizer("empty", "tokenizer.json", b"")
tokenizer("a list", "tokenizer.json", b"[]")
tokenizer("nested 100,000 deep", "tokenizer.json", DEEP.encode())
tokenizer("not UTF-8", "tokenizer.json", b"\xff\xfe\xfd")
tokenizer("an unknown model", "tokenizer.json", b'{"version": "1.0", "model": {"type": "Evil"}}')


@case("tokenizer.json: tokens beyond the embedding", "calibrate", 3, "token")
def _(p: Place) -> list[str]:
    def shift(value: dict[str, Any]) -> None:
        value["model"]["vocab"] = {token: number + 1000 for token, number in value["model"]["vocab"].items()}
        value["added_tokens"] = []
        value["post_processor"] = None

    edit(p.model / "tokenizer.json", shift)
    return use(p)


@case("tokenizer_config.json: Python code, not trusted", "calibrate", 3, "")
def _(p: Place) -> list[str]:
    (p.model / "evil.py").write_text(CANARY.format(str(p.outside / "canary")))
    edit(
        p.model / "tokenizer_config.json",
        lambda c: c.update(auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, tokenizer_class="Evil"),
    )
    for name in ("tokenizer.json",):
        (p.model / name).unlink()
    return use(p)


@case("tokenizer.json: a link to a private file", "calibrate", 3, "link that leads out")
def _(p: Place) -> list[str]:
    (p.model / "tokenizer.json").rename(p.outside / "t.json")
    (p.model / "tokenizer.json").symlink_to(p.outside / "t.json")
    return use(p)


# Rows of data.


def rows(name: str, said: str, content: bytes, suffix: str = ".jsonl") -> None:
    """A case with other bytes as the calibration data."""

    @case(f"data: {name}", "calibrate", 3, said)
    def _(p: Place) -> list[str]:
        file = p.text.with_suffix(suffix)
        file.write_bytes(content)
        return use(p, **{"calibrate.data": f"[{{source: {file}}}]"})


rows("an empty file", "no document", b"")
rows("rows without text", "no document", b'{"text": ""}\n' * 50)
rows("text is a number", "must be a string", b'{"text": 3}\n' * 50)
rows("text is null", "no document", b'{"text": null}\n' * 50)
rows("rows are lists", "must be an object", b"[1, 2]\n" * 50)
rows("no such field", "no field", b'{"body": "x"}\n' * 50)
rows("not UTF-8", "not valid UTF-8", b'{"text": "\xff\xfe"}\n' * 50)
rows("not JSON", "not valid JSON", b"{text\n" * 50)
rows("nested 100,000 deep", "not valid JSON", b'{"text": ' + DEEP.encode() + b"\n")
rows("a JSON file nested 100,000 deep", "not valid JSON", DEEP.encode(), ".json")
rows("half a surrogate pair", "surrogate", b'{"text": "\\ud800 the cat"}\n' * 3)
rows("too few tokens", "", b'{"text": "x"}\n' * 3)
rows("a truncated gzip file", "cannot be read", gzip.compress(b'{"text": "x"}\n' * 9999)[:-20], ".jsonl.gz")
rows("text under the name of a parquet file", "not a readable parquet file", b"PAR1 no", ".parquet")
rows("text under the name of an arrow file", "not a readable arrow file", b"ARROW1 no", ".arrow")
rows("a message without a role", "a message needs", b'{"messages": [{"content": 3}]}\n' * 20)


@case("data: a named pipe", "calibrate", 3, "no such file")
def _(p: Place) -> list[str]:
    p.text.unlink()
    os.mkfifo(p.text)
    return use(p)


# Recipes, as a command reads them; the fuzzing is in test_recipes.py.


def recipe(name: str, said: str, content: bytes) -> None:
    """A case with other bytes as the recipe."""

    @case(f"recipe: {name}", "calibrate", 2, said)
    def _(p: Place) -> None:
        p.recipe.write_bytes(content)


recipe("empty", "empty", b"")
recipe("not UTF-8", "not UTF-8", b"\xff\xfe")
recipe("not YAML", "line 1", b"a: [")
recipe("nested 100,000 deep", "nested too deeply", DEEP.encode())
recipe("a Python object", "could not determine a constructor", b"a: !!python/object/apply:os.system ['touch x']")
recipe("aliases that multiply", "aliases are not supported", b"a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]")
recipe("a key twice", "is already set", b"a: 1\na: 2")
recipe("a list", "must be a mapping", b"- 1")
recipe("unknown keys", "quant.colour", b"quant: {bits: 2, colour: red}")
recipe("wrong types everywhere", "calibrate", b"model: 3\nquant: [x]\ncalibrate: text\nblock_ap: {epochs: [1]}")
recipe("numbers out of range", "quant.bits", b"quant: {bits: 99999999999999999999999, group_size: .nan}")
recipe("trust_remote_code as text", "model.trust_remote_code", b"model: {source: ./x, trust_remote_code: please}")
