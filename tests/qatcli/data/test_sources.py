"""Files, globs, folders and the hub behind one interface."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
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


@pytest.mark.parametrize("key", [{"split": "validation"}, {"name": "en"}, {"streaming": True}])
def test_a_folder_of_data_files_has_no_splits(
    write_jsonl: Callable[..., Path], tmp_path: Path, make_source: Callable[..., Any], key: dict[str, Any]
) -> None:
    (tmp_path / "data").mkdir()
    assert len(open_source(make_source(str(tmp_path), **key))) == 1  # left to `datasets`, which may find them
    write_jsonl([{"text": "a"}], "validation.jsonl")
    with pytest.raises(InputError, match=f"without effect on local files: {next(iter(key))}"):
        open_source(make_source(str(tmp_path), **key))


def test_recursive_glob(write_jsonl: Callable[..., Path], tmp_path: Path) -> None:
    deep = write_jsonl([{"text": "a"}], "one/two/a.jsonl")
    assert local_paths(str(tmp_path / "**/*.jsonl")) == [deep]


@pytest.mark.parametrize("source", ["allenai/c4", "wikitext", "togethercomputer/RedPajama-Data-1T-Sample"])
def test_hub_ids(source: str) -> None:
    assert local_paths(source) is None


@pytest.mark.parametrize(
    "source", ["missing.jsonl", "data/missing.parquet", "/nowhere/data", "./data", "a/b/c", "*.jsonl", "../x"]
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
    assert asked == [(("org/set", "en"), {"split": "test", "streaming": True, "revision": None})]


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


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def rows(source: Any) -> list[dict[str, Any]]:
    return [dict(row) for part in open_source(source) for _, row in part.rows()]


def test_a_folder_stands_for_its_data_alone(
    write_jsonl: Callable[..., Path], tmp_path: Path, make_source: type[Any]
) -> None:
    data = write_jsonl([{"text": "a"}], "arxiv_sample.jsonl")
    (tmp_path / "README.md").write_text("# a data card")
    (tmp_path / "RedPajama-Data-1T-Sample.py").write_text("raise SystemExit")
    assert local_paths(str(tmp_path)) == [data]


def test_what_datasets_saved(tmp_path: Path, make_source: type[Any]) -> None:
    datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}]).save_to_disk(tmp_path / "saved")
    assert rows(make_source(str(tmp_path / "saved"))) == [{"text": "a"}, {"text": "b"}]


@pytest.fixture
def c4(tmp_path: Path) -> Path:
    """A folder laid out as allenai/c4 is today: a card with configurations, gzipped JSON lines called .json."""
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n"
        + "".join(f"  - {{split: {split}, path: {name}/c4-{split}.*.json.gz}}\n" for split in ("train", "validation"))
        for name in ("en", "realnewslike")
    )
    folder = tmp_path / "c4"
    for name in ("en", "realnewslike"):
        (folder / name).mkdir(parents=True)
        for split, shards in (("train", 2), ("validation", 1)):
            for shard in range(shards):
                texts = [f"{name} {split} {shard} {row}" for row in range(2)]
                lines = [json.dumps({"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "u"}) for text in texts]
                file = folder / name / f"c4-{split}.{shard:05d}-of-{shards:05d}.json.gz"
                file.write_bytes(gzip.compress("\n".join(lines).encode()))
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    return folder


@pytest.mark.parametrize("streaming", [False, True])
def test_configuration_split_and_streaming(c4: Path, make_source: type[Any], streaming: bool) -> None:
    source = make_source(str(c4), name="realnewslike", split="validation", streaming=streaming)
    assert [row["text"] for row in rows(source)] == [f"realnewslike validation 0 {row}" for row in range(2)]
    english = make_source(str(c4), name="en", streaming=streaming)
    assert [row["text"] for row in rows(english)] == [f"en train {s} {row}" for s in range(2) for row in range(2)]
    (part,) = open_source(make_source(str(c4), name="french", streaming=streaming))
    with pytest.raises(InputError, match=r"c4: .*french") as caught:
        list(part.rows())
    assert "`name`" in str(caught.value.hint)


def test_shards_of_a_local_copy(c4: Path, make_source: type[Any]) -> None:
    parts = open_source(make_source(str(c4 / "en" / "c4-train.*.json.gz")))
    assert [row["text"] for _, row in parts[1].rows()] == ["en train 1 0", "en train 1 1"]
    assert next(parts[1].rows())[0].endswith("00001-of-00002.json.gz line 1")


@pytest.fixture
def redpajama() -> Iterator[str]:
    """The id of a repository in the hub's cache: a loading script beside JSON lines whose columns differ by file."""
    folder = Path(huggingface_hub.constants.HF_HUB_CACHE) / "datasets--org--RedPajama-Sample"
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    (snapshot / "RedPajama-Sample.py").write_text("raise SystemExit('executed')")
    for name, meta in (("arxiv", {"arxiv_id": "1"}), ("book", {"isbn": [1]}), ("github", "a string")):
        rows = [{"text": f"{name} {row}", "meta": meta if row else None} for row in range(2)]
        (snapshot / f"{name}_sample.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    yield "org/RedPajama-Sample"
    shutil.rmtree(folder)


def test_data_files_beside_a_loading_script(redpajama: str, make_source: type[Any]) -> None:
    source = make_source(redpajama, files="*_sample.jsonl")
    assert [Path(part.name).name for part in open_source(source)] == [
        f"{name}_sample.jsonl" for name in ("arxiv", "book", "github")
    ]
    assert [row["text"] for row in rows(source)] == [
        f"{name} {n}" for name in ("arxiv", "book", "github") for n in "01"
    ]
    assert len(rows(make_source(redpajama, files="book*", revision=COMMIT))) == 2
    with pytest.raises(InputError, match=r"no file of this Hugging Face dataset matches `\*.parquet`"):
        open_source(make_source(redpajama, files="*.parquet"))


def test_files_that_cannot_be_had(make_source: type[Any]) -> None:
    with pytest.raises(InputError, match="org/absent") as caught:
        open_source(make_source("org/absent", files="*"))
    assert "HF_HUB_OFFLINE" in str(caught.value.hint)


def test_a_loading_script_says_what_to_do(tmp_path: Path, make_source: type[Any]) -> None:
    (tmp_path / "old" / "data").mkdir(parents=True)
    (tmp_path / "old" / "old.py").write_text("raise SystemExit('executed')")
    (part,) = open_source(make_source(str(tmp_path / "old")))
    with pytest.raises(InputError, match="loading script") as caught:
        list(part.rows())
    assert '`files`, such as `"*.jsonl"`' in str(caught.value.hint)


def test_an_empty_folder(tmp_path: Path, make_source: type[Any]) -> None:
    (part,) = open_source(make_source(str(tmp_path)))
    with pytest.raises(InputError, match="no data file directly in this folder"):
        list(part.rows())
