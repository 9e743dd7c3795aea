"""Token streams for perplexity."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qatcli.data import begin_windows, c4_windows, evaluation_windows, text_tokens
from qatcli.errors import InputError


def serve(monkeypatch: pytest.MonkeyPatch, texts: list[str]) -> list[Any]:
    """The hub answers with `texts`; returns the list of what it is asked."""
    asked: list[Any] = []

    def load_dataset(*arguments: Any, **options: Any) -> Any:
        asked.append((arguments, options))
        return datasets.Dataset.from_dict({"text": texts})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_a_local_text_is_one_stream(tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "text.raw"
    path.write_bytes(b"a\r\n\n\n<|im_end|>\nb ")
    tokens = text_tokens(str(path), chat_tokenizer)
    assert (tokens.dtype, tokens.dim()) == (torch.int64, 1)
    assert chat_tokenizer.decode(tokens) == "<s>a\r\n\n\n<|im_end|>\nb "


def test_wikitext2_lines_are_joined(monkeypatch: pytest.MonkeyPatch, number_tokenizer: PreTrainedTokenizerFast) -> None:
    asked = serve(monkeypatch, ["", " 1 2\n", "3"])
    assert text_tokens("wikitext2", number_tokenizer).tolist() == [3, 4, 5]
    assert asked == [(("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "test"})]


def test_a_copy_of_wikitext2_gives_the_rows_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    raw = " \n = Title = \n \n One line \x85 of two \u2028 halves . \n"
    (tmp_path / "unix.raw").write_bytes(raw.encode())
    (tmp_path / "dos.raw").write_bytes(raw.replace("\n", "\r\n").encode())
    serve(monkeypatch, ["", " = Title = \n", "", " One line \x85 of two \u2028 halves . \n"])
    hub = text_tokens("wikitext2", chat_tokenizer)
    assert len(hub) > 30
    for name in ("unix.raw", "dos.raw"):
        assert torch.equal(text_tokens("wikitext2", chat_tokenizer, file=str(tmp_path / name)), hub)


def test_wikitext2_has_as_many_tokens_as_others_count(qat_data: Path) -> None:
    """341,469 tokens of Llama-2's tokenizer: what GPTQ's code and its descendants say in their warnings."""
    folder = qat_data.parent / "models" / "stories15M"
    if not folder.is_dir():
        pytest.skip(f"no model with Llama-2's tokenizer at {folder}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(text_tokens("wikitext2", tokenizer, file=str(qat_data / "ppl" / "wiki.test.raw"))) == 341_469


@pytest.mark.parametrize(
    ("source", "what"), [("c4", "no such text"), ("nowhere.txt", "no such text"), (".", "is a folder, not a text")]
)
def test_unknown_text(source: str, what: str, number_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match=f"{source}: {what}") as caught:
        text_tokens(source, number_tokenizer)
    assert "wikitext2" in str(caught.value.hint)


def test_windows_do_not_overlap() -> None:
    tokens = torch.arange(103)
    assert torch.equal(evaluation_windows(tokens, 10, 4, name="it"), torch.arange(40).reshape(4, 10))
    assert torch.equal(evaluation_windows(tokens, 10, name="it"), torch.arange(100).reshape(10, 10))


@pytest.mark.parametrize(("length", "windows"), [(39, 4), (9, None), (0, None)])
def test_a_text_too_short(length: int, windows: int | None) -> None:
    with pytest.raises(InputError, match=f"the text wiki has {length} tokens") as caught:
        evaluation_windows(torch.arange(length), 10, windows, name="the text wiki")
    assert "seq_len" in str(caught.value.hint)


def test_c4_repeats_the_published_draws(
    monkeypatch: pytest.MonkeyPatch, number_tokenizer: PreTrainedTokenizerFast
) -> None:
    lengths = [5, 30, 12, 10, 80]
    texts = [" ".join(str(100 * row + position) for position in range(n)) for row, n in enumerate(lengths)]
    asked = serve(monkeypatch, texts)
    windows = c4_windows(number_tokenizer, 11)
    assert asked[0][1]["data_files"] == {"validation": "en/c4-validation.00000-of-00008.json.gz"}

    random.seed(0)  # the reference's loop, on lengths alone
    expected = []
    for _ in range(256):
        while True:
            row = random.randint(0, len(texts) - 1)
            if lengths[row] >= 11:
                break
        expected.append(100 * row + random.randint(0, lengths[row] - 11 - 1) + 2)
    assert windows.shape == (256, 11)
    assert windows.dtype == torch.int64
    assert windows[:, 0].tolist() == expected
    assert (windows.diff(dim=1) == 1).all()


def test_c4_without_a_long_document(monkeypatch: pytest.MonkeyPatch, number_tokenizer: PreTrainedTokenizerFast) -> None:
    serve(monkeypatch, ["1 2 3"])
    with pytest.raises(InputError, match="no C4 validation document has 11 tokens"):
        c4_windows(number_tokenizer, 11)


def test_windows_begin_with_the_first_token_once(
    chat_tokenizer: PreTrainedTokenizerFast, number_tokenizer: PreTrainedTokenizerFast
) -> None:
    bos = chat_tokenizer.bos_token_id
    windows = torch.tensor([[bos, 7, 8, 9], [10, 11, 12, 13]])
    assert begin_windows(windows, chat_tokenizer).tolist() == [[bos, 7, 8, 9], [bos, 10, 11, 12]]
    with pytest.raises(InputError, match="no beginning-of-text token"):
        begin_windows(windows, number_tokenizer)


def test_a_real_file(qat_data: Path, chat_tokenizer: PreTrainedTokenizerFast) -> None:
    path = qat_data / "ppl" / "tinystories.txt"
    assert len(text_tokens(str(path), chat_tokenizer)) == path.stat().st_size + 1


def test_a_copy_of_c4_gives_the_windows_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number_tokenizer: PreTrainedTokenizerFast
) -> None:
    texts = [" ".join(map(str, range(start, start + 20))) for start in (0, 50, 100)]
    copy = tmp_path / "c4-validation.00000-of-00008.json.gz"
    copy.write_bytes(gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in texts).encode()))
    serve(monkeypatch, texts)
    hub = c4_windows(number_tokenizer, 11)
    assert torch.equal(c4_windows(number_tokenizer, 11, file=str(copy)), hub)
    copy.write_bytes(gzip.compress(b'{"text": "1 2"}\n{"txt": "3"}\n'))
    with pytest.raises(InputError, match="line 2: has no `text`"):
        c4_windows(number_tokenizer, 11, file=str(copy))
