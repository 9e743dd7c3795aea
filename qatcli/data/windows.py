"""The token windows of a stage: a seeded sample of its data sources.

Reads:  the sources of a recipe (qatcli.data.sources), a tokenizer.
Method: one random window of a random document longer than the window; training windows from the first 90 % of the
        documents, validation windows from the last 10 % (EfficientQAT, arXiv 2407.11062, section 4.1 and its code).
        Sources whose documents are too short or too few for that, and instruction data, are packed. `packing` of a
        source says otherwise; instructions in windows of their own are followed by padding, which has no loss.
Left out: attention masks. Packed documents see what stands before them in the window.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qatcli.data.corpus import Corpus, Document, read_corpus
from qatcli.data.packing import draw_windows, find_long, has_tokens, pack_windows, pad_windows
from qatcli.data.tokens import Example, encode_text, first_token, join, plain
from qatcli.errors import InputError, RecipeError
from qatcli.recipe import DataSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROW_FLOOR = 32_768  # rows read of a source at least, if it has them
_ROWS_PER_WINDOW = 32
_FEW_LONG_DOCUMENTS = 8  # with fewer, or one for 32 windows, or less text than the windows hold, a source is packed


@dataclass(frozen=True)
class WindowSet:
    """train int32 [S, T], validation int32 [V, T]; loss masks bool of the same shapes, None if all tokens count.

    digest: sha256 of the content that was read, independent of file names and formats.
    stats: what was read and used, ready for JSON.
    """

    train: torch.Tensor
    validation: torch.Tensor
    loss_mask_train: torch.Tensor | None
    loss_mask_validation: torch.Tensor | None
    digest: str
    stats: dict[str, Any]


def sample_windows(
    sources: Sequence[DataSource],
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    validation_samples: int,
    seq_len: int,
    seed: int,
    purpose: str = "calibrate",
    padding: bool = False,
) -> WindowSet:
    """Sample `samples` training and `validation_samples` validation windows of `seq_len` tokens.

    Sources are mixed in proportion to their weights. The result depends on the arguments and the data alone; another
    `purpose` gives independent windows. `padding` allows windows that are not full, for stages that heed the loss mask.
    Raises InputError for data that are missing, malformed or too short, RecipeError for a format or weights that make
    no sense.
    """
    weights = [source.weight for source in sources]
    wanted = {"train": allocate(samples, weights), "validation": allocate(validation_samples, weights)}
    limit = max(_ROW_FLOOR, _ROWS_PER_WINDOW * (samples + validation_samples))
    windows: dict[str, list[Example]] = {"train": [], "validation": []}
    source_stats: list[dict[str, Any]] = []
    digest = hashlib.sha256()
    for index, source in enumerate(sources):
        corpus = read_corpus(source, tokenizer, limit=limit)
        digest.update(bytes.fromhex(corpus.digest))
        if source.packing is False and corpus.format != "text" and not padding:
            raise RecipeError(
                f"{corpus.name}: `packing: false` fills windows up with padding, and {purpose} learns from every token",
                hint="leave `packing` out, or use these data in e2e_qp.data",
            )
        stats: dict[str, Any] = {"source": corpus.name, "format": corpus.format, "digest": corpus.digest}
        stats["skipped"] = corpus.skipped
        for split, documents in (("train", corpus.train), ("validation", corpus.validation)):
            count = wanted[split][index]
            rng = generator(seed, purpose, split, index)
            drawn, packed = _sample_split(
                corpus, split, documents, tokenizer, rng, packing=source.packing, count=count, seq_len=seq_len
            )
            windows[split] += [_begin(tokenizer, window) for window in drawn] if source.bos == "window" else drawn
            stats[split] = _split_stats(documents, count=count, packed=packed)
        source_stats.append(stats)
    masked = any(stats["format"] != "text" for stats in source_stats)
    stacked = {
        split: _stack(examples, generator(seed, purpose, split, "mix"), seq_len) for split, examples in windows.items()
    }
    targets = {split: int(loss[:, 1:].sum()) for split, (_, loss) in stacked.items()}
    return WindowSet(
        train=stacked["train"][0],
        validation=stacked["validation"][0],
        loss_mask_train=stacked["train"][1] if masked else None,
        loss_mask_validation=stacked["validation"][1] if masked else None,
        digest=digest.hexdigest(),
        stats={"targets": targets, **_total_stats(source_stats)},
    )


def allocate(count: int, weights: Sequence[float]) -> list[int]:
    """Share `count` among `weights` by largest remainder. Raises RecipeError for no weights or a bad one."""
    if not weights or any(not math.isfinite(weight) or weight < 0 for weight in weights) or sum(weights) == 0:
        raise RecipeError(
            f"data source weights {list(weights)} cannot share {count} windows",
            hint="give at least one source, and weights that are not negative and not all zero",
        )
    shares = [count * weight / sum(weights) for weight in weights]
    allocated = [math.floor(share) for share in shares]
    by_remainder = sorted(
        range(len(shares)), key=lambda index: allocated[index] - shares[index]
    )  # stable: ties by order
    for index in by_remainder[: count - sum(allocated)]:
        allocated[index] += 1
    return allocated


def generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """A numpy generator of its own for every (seed, purpose), the same on every machine and Python."""
    key = "/".join(map(str, (seed, *purpose)))
    return np.random.default_rng(int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "little"))


def _sample_split(
    corpus: Corpus,
    split: str,
    documents: list[Document],
    tokenizer: PreTrainedTokenizerBase,
    rng: np.random.Generator,
    *,
    packing: bool | None,
    count: int,
    seq_len: int,
) -> tuple[list[Example], bool]:
    """(windows, whether they are packed) of one split of one source."""
    if count == 0:
        return [], False
    separator = None
    if corpus.format == "text":
        if packing is not True:
            order = rng.permutation(len(documents)).tolist()
            found = find_long(documents, order, seq_len=seq_len, wanted=max(count, _FEW_LONG_DOCUMENTS))
            long = [documents[index].example for index in found]
            enough = len(long) >= max(_FEW_LONG_DOCUMENTS, math.ceil(count / 32))
            enough &= sum(len(example) // seq_len for example in long) >= count
            if long and (packing is False or enough or len(documents) == 1):
                return draw_windows(long, rng, count=count, seq_len=seq_len), False
        separator = _separator(tokenizer)
    elif packing is False:
        filler = tokenizer.eos_token_id or 0
        windows = pad_windows(documents, rng, count=count, seq_len=seq_len, padding=filler)
        if windows:
            return windows, False
    if packing is False or not has_tokens(documents, seq_len):
        raise _too_short(corpus, split, documents, seq_len, packing)
    return pack_windows(documents, rng, count=count, seq_len=seq_len, separator=separator), True


def _begin(tokenizer: PreTrainedTokenizerBase, window: Example) -> Example:
    """`window` behind a beginning-of-text token, if it does not start with one."""
    bos = first_token(tokenizer)
    if window.tokens[0] == bos:
        return window
    return join([plain(np.asarray([bos], dtype=np.int32)), window[:-1]])


def _separator(tokenizer: PreTrainedTokenizerBase) -> Example:
    """What stands between packed documents: the end-of-text token, or a newline where there is none."""
    if tokenizer.eos_token_id is None:
        return plain(encode_text(tokenizer, "\n", special_tokens=False))
    return plain(np.asarray([tokenizer.eos_token_id], dtype=np.int32))


def _too_short(corpus: Corpus, split: str, documents: list[Document], seq_len: int, packing: bool | None) -> InputError:
    lengths = [len(document.example) for document in documents]
    late = sum(not document.example.loss[:seq_len].any() for document in documents)
    what = f"{corpus.name}: the {split} split has {len(documents)} documents"
    if late == len(documents):
        return InputError(f"{what}, none with an answer in its first {seq_len} tokens", hint="raise seq_len")
    what += f", none longer than a window of {seq_len} tokens (the longest has {max(lengths)})"
    if packing is False:
        return InputError(what, hint="lower seq_len, or leave `packing` out, so that documents share a window")
    note = f"; {late} have no answer within a window" if late else ""
    return InputError(
        f"{what}, and even packed together they hold only {sum(lengths)}{note}",
        hint=f"lower seq_len, or add data: {split} uses the {'first 90' if split == 'train' else 'last 10'} % of it",
    )


def _stack(examples: list[Example], rng: np.random.Generator, seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens int32 [n, T], loss bool [n, T]) in random order, so that the sources are mixed."""
    tokens = np.zeros((len(examples), seq_len), dtype=np.int32)
    loss = np.zeros((len(examples), seq_len), dtype=np.bool_)
    for row, index in enumerate(rng.permutation(len(examples)).tolist()):
        tokens[row], loss[row] = examples[index].tokens, examples[index].loss
    return torch.from_numpy(tokens), torch.from_numpy(loss)


def _split_stats(documents: list[Document], *, count: int, packed: bool) -> dict[str, Any]:
    tokenized = [document for document in documents if document.is_tokenized]
    return {
        "windows": count,
        "documents": len(documents),
        "documents_tokenized": len(tokenized),
        "tokens_tokenized": sum(len(document.example) for document in tokenized),
        "packed": packed,
    }


def _total_stats(sources: list[dict[str, Any]]) -> dict[str, Any]:
    splits = [stats[split] for stats in sources for split in ("train", "validation")]
    return {
        "documents": sum(split["documents"] for split in splits),
        "documents_tokenized": sum(split["documents_tokenized"] for split in splits),
        "tokens_tokenized": sum(split["tokens_tokenized"] for split in splits),
        "packed": any(split["packed"] for split in splits),
        "sources": sources,
    }
