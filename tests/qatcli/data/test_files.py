"""Every file format, laziness, and what malformed files say."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from qatcli.data import files
from qatcli.data.files import is_json_list, read_rows, read_text
from qatcli.errors import InputError, RecipeError

ROWS = [{"text": f"document {number} \u00e9\u4e2d"} for number in range(5)]


def values(path: Path) -> list[object]:
    return [dict(row) for _, row in read_rows(path)]


def write(path: Path, content: str | bytes) -> Path:
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.jsonl.gz", "a.JSONL", "wrong_suffix.json"])
def test_json_lines(tmp_path: Path, name: str) -> None:
    assert values(write(tmp_path / name, "\n".join(map(json.dumps, ROWS)) + "\n\n")) == ROWS


@pytest.mark.parametrize("content", [ROWS, {"version": 1, "data": ROWS}])
@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_json(tmp_path: Path, name: str, content: object) -> None:
    assert values(write(tmp_path / name, json.dumps(content, indent=1))) == ROWS


def test_json_of_one_object_is_one_row(tmp_path: Path) -> None:
    assert values(write(tmp_path / "a.json", json.dumps(ROWS[0]))) == ROWS[:1]


def test_columns_may_differ_from_row_to_row(tmp_path: Path) -> None:
    rows = [
        {"text": "a", "meta": {"url": 1}},
        {"text": "b", "meta": "x"},
        {"text": "c", "meta": [1, None]},
        {"text": "d"},
    ]
    assert values(write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))) == rows


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=2)
    assert values(path) == ROWS


@pytest.mark.parametrize("new", [pyarrow.ipc.new_stream, pyarrow.ipc.new_file])
def test_arrow(tmp_path: Path, new) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "a.arrow"
    table = pyarrow.Table.from_pylist(ROWS)
    with new(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    assert values(path) == ROWS


def test_arrow_as_datasets_saves_it(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path)
    (path,) = tmp_path.glob("*.arrow")
    assert values(path) == ROWS


@pytest.mark.parametrize("name", ["a.txt", "a.raw", "a.utf8", "a.txt.gz"])
def test_a_text_without_delimiters_is_one_document(tmp_path: Path, name: str) -> None:
    text = " = Title = \n \n First \u4e2d . \n \n Second . \n\nThird"
    assert values(write(tmp_path / name, text)) == [{"text": text}]


@pytest.mark.parametrize(
    "text",
    [
        "one\ntwo\n<|endoftext|>\n\nthree\n<|endoftext|>\n",
        '<doc id="1" title="A">\none\ntwo\n\n</doc>\n<doc id="2" title="B">\nthree\n</doc>\n',
        "one\ntwo\n\n\n\nthree\n",
        "one\r\ntwo\r\n\r\n\r\nthree\r\n",
        "\ufeffone\ntwo\n\n\nthree",
    ],
)
def test_text_documents(tmp_path: Path, text: str) -> None:
    assert values(write(tmp_path / "a.txt", text)) == [{"text": "one\ntwo"}, {"text": "three"}]


def test_a_document_without_an_end_goes_on_in_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer takes 150 bytes of memory for each character."""
    monkeypatch.setattr(files, "LONGEST", 20)
    lines = [f"line {number}" for number in range(10)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    found = [row["text"] for _, row in read_rows(tmp_path / "a.txt")]
    assert [len(text.split("\n")) for text in found] == [4, 4, 2]
    assert "\n".join(found).split("\n") == lines


def test_only_a_list_is_read_whole(tmp_path: Path) -> None:
    assert is_json_list(write(tmp_path / "list.json", '\ufeff\n [{"text": "a"}]'))
    assert not is_json_list(write(tmp_path / "lines.json", '{"text": "a"}\n{"text": "b"}\n'))
    assert not is_json_list(write(tmp_path / "list.jsonl", "[]"))


def test_rows_know_their_place(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\n\n{"text": "b"}\n')
    assert [where for where, _ in read_rows(path)] == [f"{path} line 1", f"{path} line 3"]
    path = write(tmp_path / "a.txt", "one\ntwo\n\n\nthree")
    assert [where for where, _ in read_rows(path)] == [f"{path} line 1", f"{path} line 5"]


def test_reading_is_lazy(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\nbroken')
    rows = read_rows(path)
    assert next(rows)[1] == {"text": "a"}
    with pytest.raises(InputError, match="line 2: not valid JSON"):
        next(rows)


def test_json_lines_under_the_suffix_json_are_read_line_by_line(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path / "c4-train.json.gz", '{"text": "a"}\nbroken'))
    assert next(rows)[1] == {"text": "a"}
    with pytest.raises(InputError, match="line 2: not valid JSON"):
        next(rows)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "line 2: not valid UTF-8"),
        ("a.txt", b"fine\nfine\n\xc3\x28\n", "line 3: not valid UTF-8"),
        ("a.json", b'[\n{"text":\n"\xff"}]', "line 3: not valid UTF-8"),
        ("a.jsonl", b'["text"]\n', "line 1: a row must be an object, found a list"),
        ("a.jsonl", b'"text"\n', "found a string"),
        ("a.json", b"[1]", "row 1: a row must be an object, found a number"),
        ("a.json", b"3", "holds a number, not rows"),
        ("a.json", b'{"data": {"text": "a"}}', "not rows"),
        ("a.json", b"", "not valid JSON"),
        ("a.json", b'{"a":' * 100_000, "not valid JSON"),
        ("a.json", b'[{"text": "a"', "not valid JSON"),
        ("a.json", b'{"text": "a"\n', "line 1: not valid JSON"),
        ("a.parquet", b"no parquet", "not a readable parquet file"),
        ("a.parquet", b"", "not a readable parquet file"),
        ("a.arrow", b"no arrow at all", "not a readable arrow file"),
        ("a.arrow", b"", "not a readable arrow file"),
    ],
)
def test_malformed_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(InputError, match=message) as caught:
        list(read_rows(path))
    assert str(path) in caught.value.message


def test_damaged_gzip(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"text": "a"}\n' * 1000)
    for number, content in enumerate([whole[: len(whole) // 2], b"no gzip", whole[:12] + b"\xff" * 8 + whole[20:]]):
        path = tmp_path / f"{number}.jsonl.gz"
        path.write_bytes(content)
        with pytest.raises(InputError, match="cannot be read"):
            list(read_rows(path))


@pytest.mark.parametrize("name", ["a.csv", "a", "a.parquet.gz", "a.gz"])
def test_unknown_suffix(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, "text")
    with pytest.raises(RecipeError, match="no reader") as caught:
        list(read_rows(path))
    assert ".jsonl" in str(caught.value.hint)


def test_read_text_keeps_every_character(tmp_path: Path) -> None:
    text = "a\r\n\n\n<|endoftext|>\n\u00e9 "
    assert read_text(write(tmp_path / "a.txt", text.encode())) == text
    with pytest.raises(InputError, match="cannot be read"):
        read_text(tmp_path / "missing.txt")
    with pytest.raises(InputError, match="line 2: not valid UTF-8"):
        read_text(write(tmp_path / "b.txt", b"a\n\xff\n"))
