"""Files, globs, folders and the hub behind one interface."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pytest

from qatcli.data.sources import local_paths, open_source
from qatcli.errors import InputError


def test_a_file_a_glob_and_a_folder(write_jsonl: Callable[..., Path], tmp_path: Path, make_source) -> None:  # type: ignore[no-untyped-def]
    b, a = (write_jsonl([{"text": name}], f"{name}.jsonl") for name in ("b", "a"))
    (tmp_path / "README").write_text("not data")
    for source, expected in ((str(a), [a]), (str(tmp_path / "*.jsonl"), [a, b]), (str(tmp_path), [a, b])):
        parts = open_source(make_source(source))
        assert [part.name for part in parts] == [str(path) for path in expected]
        assert [dict(row) for part in parts for _, row in part.rows()] == [{"text": path.stem} for path in expected]


def test_recursive_glob(write_jsonl: Callable[..., Path], tmp_path: Path) -> None:
    deep = write_jsonl([{"text": "a"}], "one/two/a.jsonl")
    assert local_paths(str(tmp_path / "**/*.jsonl")) == [deep]


@pytest.mark.parametrize("source", ["allenai/c4", "wikitext", "togethercomputer/RedPajama-Data-1T-Sample"])
def test_hub_ids(source: str) -> None:
    assert local_paths(source) is None


@pytest.mark.parametrize(
    "source", ["missing.jsonl", "data/missing.parquet", "/nowhere/data", "./data", "a/b/c", "*.jsonl", "", "../x"]
)
def test_missing_files(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(InputError) as caught:
        local_paths(source)
    assert caught.value.exit_code == 3
    assert caught.value.hint


def test_hub_rows_are_streamed(monkeypatch: pytest.MonkeyPatch, make_source) -> None:  # type: ignore[no-untyped-def]
    asked: list[Any] = []

    def load_dataset(*arguments: Any, **options: Any) -> Any:
        asked.append((arguments, options))
        return ({"text": str(number)} for number in iter(int, 1))  # no end

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (part,) = open_source(make_source("org/set", name="en", split="test", streaming=True))
    assert asked == []
    assert list(islice(part.rows(), 2)) == [("org/set row 1", {"text": "0"}), ("org/set row 2", {"text": "0"})]
    assert asked == [(("org/set", "en"), {"split": "test", "streaming": True})]


@pytest.mark.parametrize("error", [ConnectionError("no route"), ValueError("bad split\nmore"), RuntimeError()])
@pytest.mark.parametrize("while_streaming", [False, True])
def test_hub_failures(monkeypatch: pytest.MonkeyPatch, make_source, error: Exception, while_streaming: bool) -> None:  # type: ignore[no-untyped-def]
    def stream() -> Any:
        yield {"text": "first"}
        raise error

    def load_dataset(*arguments: Any, **options: Any) -> Any:
        if while_streaming:
            return stream()
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (part,) = open_source(make_source("org/set"))
    with pytest.raises(InputError, match="org/set") as caught:
        list(part.rows())
    assert (str(error).split("\n")[0] or "RuntimeError") in caught.value.message
    assert "more" not in caught.value.message
    assert "HF_HOME" in str(caught.value.hint)
    assert "local copy" in str(caught.value.hint)
