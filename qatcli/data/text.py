"""Token streams and windows for perplexity, cut as the EfficientQAT paper and most others cut them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from qatcli.data.files import read_rows, read_text
from qatcli.data.sources import load_hub
from qatcli.data.tokens import Tokens, encode_text, first_token
from qatcli.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_C4_WINDOWS = 256
_C4_SHARD = "en/c4-validation.00000-of-00008.json.gz"


def text_tokens(source: str, tokenizer: PreTrainedTokenizerBase, *, file: str | None = None) -> torch.Tensor:
    """The evaluation text as one token stream, int64 [n], with the special tokens the tokenizer adds by default.

    source: "wikitext2" (the raw test split from the hub, lines joined by two newlines), or a local text file, whole.
    file: a local copy of wiki.test.raw, instead of the hub. Raises InputError when it cannot be read. C4 is not a
    stream: see `c4_windows`.
    """
    if source == "wikitext2":
        wikitext = ("Salesforce/wikitext", "wikitext-2-raw-v1")
        rows = _lines(Path(file)) if file else load_hub(*wikitext, split="test")["text"]
        text = "\n\n".join(rows)
    elif Path(source).expanduser().is_file():
        text = read_text(Path(source).expanduser())
    else:
        what = "is a folder, not a text" if Path(source).expanduser().is_dir() else "no such text"
        raise InputError(f"{source}: {what}", hint="give `wikitext2`, `c4`, or the path of a text file")
    return torch.from_numpy(encode_text(tokenizer, text).astype(np.int64))


def evaluation_windows(tokens: torch.Tensor, seq_len: int, windows: int | None = None, *, name: str) -> torch.Tensor:
    """The first `windows` non-overlapping windows of a stream [n], or all, as [W, seq_len]; the rest is dropped.

    Raises InputError, which calls the text by `name`, when the stream has fewer.
    """
    available = len(tokens) // seq_len
    if available < max(1, windows or 1):
        raise InputError(
            f"{name} has {len(tokens)} tokens: {available} windows of {seq_len}, not {windows or 1}",
            hint="lower `seq_len` or `windows`, or evaluate on a longer text",
        )
    count = windows or available
    return tokens[: count * seq_len].reshape(count, seq_len)


def begin_windows(windows: torch.Tensor, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Windows [W, T] whose first token is the beginning-of-text token; where it is not yet, the last one makes room.

    Models that were never trained without it (Gemma) predict much worse without. Raises InputError when the tokenizer
    has none.
    """
    bos = first_token(tokenizer)
    begun = torch.cat([torch.full_like(windows[:, :1], bos), windows[:, :-1]], dim=1)
    return torch.where(windows[:, :1] == bos, windows, begun)


def c4_windows(tokenizer: PreTrainedTokenizerBase, seq_len: int, *, file: str | None = None) -> torch.Tensor:
    """The paper's C4 windows, int64 [256, seq_len]: random ones of the first validation shard, seed 0.

    file: a local copy of that shard, instead of the hub. The draws repeat those of the GPTQ code that published C4
    perplexities use, which is why they are Python's `random` and not numpy's. Raises InputError when the shard cannot
    be read or no document is long enough.
    """
    if file:
        texts = _documents(Path(file))
    else:
        texts = load_hub("allenai/c4", None, data_files={"validation": _C4_SHARD}, split="validation")["text"]
    if not any(len(text.encode()) >= seq_len and len(encode_text(tokenizer, text)) >= seq_len for text in texts):
        raise InputError(f"no C4 validation document has {seq_len} tokens", hint="lower `seq_len`")
    draw = random.Random(0)
    cut: list[Tokens] = []
    while len(cut) < _C4_WINDOWS:
        tokens = encode_text(tokenizer, texts[draw.randint(0, len(texts) - 1)])
        if len(tokens) >= seq_len:
            start = draw.randint(0, max(0, len(tokens) - seq_len - 1))
            cut.append(tokens[start : start + seq_len])
    return torch.from_numpy(np.stack(cut).astype(np.int64))


def _lines(file: Path) -> list[str]:
    """The rows that the hub makes of WikiText's raw files: lines with their ends, and blank ones empty."""
    text = read_text(file.expanduser()).replace("\r\n", "\n")
    return [f"{line}\n" if line.strip() else "" for line in text.removesuffix("\n").split("\n")]


def _documents(file: Path) -> list[str]:
    """The documents of a file of rows."""
    texts = [(where, row.get("text")) for where, row in read_rows(file.expanduser())]
    for where, text in texts:
        if not isinstance(text, str):
            raise InputError(f"{where}: has no `text`", hint="give C4's shard as the hub has it")
    return [str(text) for _, text in texts]
