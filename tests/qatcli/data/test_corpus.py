"""The split into training and validation, the digest, and the limits of reading."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from qatcli.data.corpus import Corpus, Document, check_source, read_corpus
from qatcli.errors import InputError


def numbers(documents: list[Document]) -> list[int]:
    return [token - 2 for document in documents for token in document.example.tokens.tolist()]


@pytest.fixture
def read(number_tokenizer: PreTrainedTokenizerFast, make_source) -> Callable[..., Corpus]:  # type: ignore[no-untyped-def]
    return lambda source, limit=1000, **fields: read_corpus(
        make_source(str(source), **fields), number_tokenizer, limit=limit
    )


def test_the_last_tenth_validates(read: Callable[..., Corpus], write_documents: Callable[..., Path]) -> None:
    corpus = read(write_documents([5] * 30))
    assert numbers(corpus.train) == list(range(135))
    assert numbers(corpus.validation) == list(range(135, 150))
    assert corpus.format == "text"


@pytest.mark.parametrize(("count", "train"), [(2, 1), (9, 8), (10, 9), (11, 9), (20, 18)])
def test_both_splits_have_rows(
    read: Callable[..., Corpus], write_jsonl: Callable[..., Path], count: int, train: int
) -> None:
    corpus = read(write_jsonl([{"instruction": "1", "output": "2"}] * count))
    assert (len(corpus.train), len(corpus.validation)) == (train, count - train)


@pytest.mark.parametrize(
    ("lengths", "train", "validation"),
    [
        ([100], [90], [10]),
        ([3, 97], [3, 87], [10]),
        ([97, 3], [90], [7, 3]),
        ([90, 10], [90], [10]),
        ([10] * 9, [10] * 8 + [1], [9]),
    ],
)
def test_a_few_texts_are_split_by_position(
    read: Callable[..., Corpus],
    write_documents: Callable[..., Path],
    lengths: list[int],
    train: list[int],
    validation: list[int],
) -> None:
    corpus = read(write_documents(lengths))
    assert [len(document.example) for document in corpus.train] == train
    assert [len(document.example) for document in corpus.validation] == validation
    assert numbers(corpus.train) + numbers(corpus.validation) == list(range(sum(lengths)))


def test_every_file_of_a_glob_validates(
    read: Callable[..., Corpus], write_documents: Callable[..., Path], tmp_path: Path
) -> None:
    write_documents([1] * 20, "a.jsonl")
    write_documents([1] * 10, "b.jsonl", first=100)
    write_documents([1] * 3, "c.jsonl", first=200)
    write_documents([1] * 3, "d.jsonl", first=300)
    corpus = read(tmp_path / "*.jsonl")
    assert numbers(corpus.validation) == [18, 19, 109, 302]
    assert len(corpus.train) == 18 + 9 + 5


def test_one_text_is_split_by_position(read: Callable[..., Corpus], tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("\n".join(map(str, range(100))))
    corpus = read(path, field="ignored")
    assert numbers(corpus.train) == list(range(90))
    assert numbers(corpus.validation) == list(range(90, 100))


def test_the_digest_is_of_the_content(
    read: Callable[..., Corpus], write_jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    rows = [{"text": "1 2"}, {"text": "3"}]
    digest = read(write_jsonl(rows, "a.jsonl")).digest
    assert len(digest) == 64
    assert read(write_jsonl([{**row, "meta": 1} for row in rows], "b.jsonl")).digest == digest
    (tmp_path / "c.txt").write_text("1 2\n\n\n3\n")
    assert read(tmp_path / "c.txt").digest == digest
    assert read(write_jsonl(rows[::-1], "d.jsonl")).digest != digest
    assert read(write_jsonl([{"text": "1"}, {"text": "23"}], "e.jsonl")).digest != digest


def test_documents_are_tokenized_when_asked_for(
    read: Callable[..., Corpus], write_documents: Callable[..., Path]
) -> None:
    document, other = read(write_documents([3] * 20)).train[:2]
    assert not document.is_tokenized
    assert len(document.example) <= document.size_bound
    assert document.is_tokenized
    assert document.example is document.example
    assert not other.is_tokenized


def test_the_limit_is_shared_by_the_files(
    read: Callable[..., Corpus], write_documents: Callable[..., Path], write_jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    write_documents([1] * 50, "a.jsonl")
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write("broken, but never reached\n")
    write_documents([1] * 50, "b.jsonl", first=100)
    corpus = read(tmp_path / "*.jsonl", limit=40)
    assert numbers(corpus.train) == [*range(18), *range(100, 118)]


def test_empty_rows_are_passed_over(read: Callable[..., Corpus], write_jsonl: Callable[..., Path]) -> None:
    corpus = read(write_jsonl([{"text": text} for text in ("", "1", " \n", "2")]))
    assert (numbers(corpus.train), numbers(corpus.validation)) == ([1], [2])


@pytest.mark.parametrize(("name", "content"), [("a.jsonl", ""), ("a.txt", "\n\n"), ("a.json", "[]")])
def test_empty_files(read: Callable[..., Corpus], tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match="no document in it"):
        read(tmp_path / name)


@pytest.mark.parametrize("row", [{"instruction": "a", "output": "b"}, {"text": "1"}])
def test_what_cannot_be_split(read: Callable[..., Corpus], write_jsonl: Callable[..., Path], row: object) -> None:
    with pytest.raises(InputError, match="too little to split"):
        read(write_jsonl([row]))


def test_the_first_row_decides_the_format(read: Callable[..., Corpus], write_jsonl: Callable[..., Path]) -> None:
    path = write_jsonl([{"instruction": "a", "output": "b"}, {"text": "c"}])
    with pytest.raises(InputError, match="line 2: no field `instruction`"):
        read(path)


def test_rows_without_an_answer_are_counted(read: Callable[..., Corpus], write_jsonl: Callable[..., Path]) -> None:
    answers = ["2", "", " ", *["3"] * 10]
    corpus = read(write_jsonl([{"instruction": "1", "output": answer} for answer in answers]))
    assert (len(corpus.train) + len(corpus.validation), corpus.skipped) == (11, 2)


def test_a_source_is_checked_by_its_first_rows(
    write_jsonl: Callable[..., Path],
    number_tokenizer: PreTrainedTokenizerFast,
    make_source: type,
    tmp_path: Path,
) -> None:
    talk = {"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]}
    good = {"instruction": "1", "output": "2"}
    write_jsonl([{**good, "output": ""}, good, "never reached"], "a/a.jsonl")
    check_source(make_source(str(tmp_path / "a" / "*.jsonl")), number_tokenizer)
    bad = write_jsonl([{"instruction": "1"}], "a/b.jsonl")
    for source, message in (
        (make_source(str(tmp_path / "a" / "*.jsonl"), format="alpaca"), f"{bad} line 1: no field `output`"),
        (make_source(str(write_jsonl([talk]))), "no chat template"),
        (make_source(str(tmp_path / "a" / "a.jsonl"), template="chat"), "no chat template"),
        (make_source("org/absent"), "org/absent"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            check_source(source, number_tokenizer)
