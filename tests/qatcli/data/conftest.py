"""Tokenizers whose tokens say where they come from, and data sources."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from qatcli.recipe import DataSource

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def make_source() -> Callable[..., DataSource]:
    """A function that makes a recipe's data source of its keys, as they are."""
    return lambda source, **keys: DataSource.model_construct(source=source, **keys)


@pytest.fixture(scope="session")
def number_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word "0" to "99999": word n is token n + 2. No special token is added."""
    vocabulary = {"<unk>": 0, "<eos>": 1, **{str(number): number + 2 for number in range(100_000)}}
    fast = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<eos>", unk_token="<unk>")


@pytest.fixture(scope="session")
def chat_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, ChatML with no generation markers; `<s>` in front of plain text."""
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*special, *alphabet])}
    fast = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = tokenizers.decoders.ByteLevel()
    fast.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=fast, bos_token="<s>", eos_token="</s>", extra_special_tokens=special[2:]
    )
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    """(rows, file name) -> the file."""

    def write(rows: Sequence[Any], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture
def write_documents(write_jsonl: Callable[..., Path]) -> Callable[..., Path]:
    """(lengths, file name, first number) -> a file whose documents count on: no number is in two documents."""

    def write(lengths: Sequence[int], name: str = "documents.jsonl", first: int = 0) -> Path:
        rows = []
        for length in lengths:
            rows.append({"text": " ".join(str(number) for number in range(first, first + length))})
            first += length
        return write_jsonl(rows, name)

    return write
