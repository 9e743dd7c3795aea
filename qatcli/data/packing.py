"""Windows of a fixed length out of tokenized documents.

`draw_windows` cuts a random window from a random long document. `pack_windows` lays consecutive documents end to end,
for paragraphs and for instructions, none of which fills a window. `pad_windows` gives every instruction a window of its
own. All spread the windows before they repeat: nothing is drawn from a document again while others have unseen text,
and no window twice while there are others.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from qatcli.data.corpus import Document
from qatcli.data.tokens import Example, join


def find_long(documents: Sequence[Document], order: Iterable[int], *, seq_len: int, wanted: int) -> list[int]:
    """Indices of up to `wanted` documents with more than `seq_len` tokens, looked for in `order`.

    Documents with fewer bytes than that are passed over without being tokenized.
    """
    found: list[int] = []
    for index in order:
        if len(found) == wanted:
            break
        if documents[index].size_bound > seq_len and len(documents[index].example) > seq_len:
            found.append(index)
    return found


def draw_windows(examples: Sequence[Example], rng: np.random.Generator, *, count: int, seq_len: int) -> list[Example]:
    """`count` windows from `examples`, all longer than `seq_len` (EfficientQAT's sampling).

    Every document gives one window before any gives a second, and none more than it has room for before all did.
    """
    windows: list[Example] = []
    used: set[tuple[int, int]] = set()
    turn = 0
    while len(windows) < count:
        turn += 1
        eligible = [index for index, example in enumerate(examples) if len(example) // seq_len >= turn]
        if not eligible:
            turn = 0
            continue
        for index in rng.permutation(eligible)[: count - len(windows)].tolist():
            start = _unused_start(rng, index, len(examples[index]) - seq_len, used)
            used.add((index, start))
            windows.append(examples[index][start : start + seq_len])
    return windows


def pack_windows(
    documents: Sequence[Document],
    rng: np.random.Generator,
    *,
    count: int,
    seq_len: int,
    separator: Example | None,
) -> list[Example]:
    """`count` windows of consecutive documents, joined by `separator`, going on with the first after the last.

    With a separator the documents are text, and a window starts anywhere in one; without, they are instructions, and
    a window starts where one starts. The documents must hold `seq_len` tokens together, as `has_tokens` counts them.
    """
    windows: list[Example] = []
    used: set[tuple[int, int]] = set()
    while len(windows) < count:
        covered: set[int] = set()
        before = len(windows)
        for first in rng.permutation(len(documents)).tolist():
            if len(windows) == count:
                break
            if first in covered or not _is_trainable(documents[first].example, seq_len):
                continue
            example = documents[first].example
            start = _unused_start(rng, first, len(example) - 1, used) if separator is not None else 0
            if (first, start) not in used:
                used.add((first, start))
                windows.append(_pack_one(documents, first, start, seq_len, separator, covered))
        if len(windows) == before:
            used.clear()  # every window has been taken: begin again
    return windows


def pad_windows(
    documents: Sequence[Document], rng: np.random.Generator, *, count: int, seq_len: int, padding: int
) -> list[Example]:
    """`count` windows of one instruction each, cut at its end or followed by the token `padding`, without a loss there.

    Attention is causal, so that what follows an instruction changes nothing in it and needs no mask. None when no
    answer begins within a window.
    """
    windows: list[Example] = []
    while len(windows) < count:
        before = len(windows)
        for index in rng.permutation(len(documents)).tolist():
            example = documents[index].example[:seq_len]
            if len(windows) < count and example.loss.any():
                rest = seq_len - len(example)
                filler = Example(np.full(rest, padding, dtype=np.int32), np.zeros(rest, dtype=np.bool_))
                windows.append(join([example, filler]))
        if len(windows) == before:
            break
    return windows


def has_tokens(documents: Iterable[Document], seq_len: int) -> bool:
    """Whether the trainable documents hold at least `seq_len` tokens together."""
    total = 0
    for document in documents:
        if _is_trainable(document.example, seq_len):
            total += len(document.example)
        if total >= seq_len:
            return True
    return False


def _pack_one(
    documents: Sequence[Document],
    first: int,
    start: int,
    seq_len: int,
    separator: Example | None,
    covered: set[int],
) -> Example:
    pieces: list[Example] = []
    length = 0
    index, offset = first, start
    while length < seq_len:
        example = documents[index].example
        if _is_trainable(example, seq_len):
            pieces.append(example[offset : offset + seq_len])
            length += len(pieces[-1])
            if separator is not None and not _ends_with(example, separator):
                pieces.append(separator)
                length += len(separator)
            covered.add(index)
        index, offset = (index + 1) % len(documents), 0
    return join(pieces)[:seq_len]


def _is_trainable(example: Example, seq_len: int) -> bool:
    """False for empty documents, and for instructions whose answer is absent or begins after a whole window."""
    return bool(example.loss[:seq_len].any())


def _ends_with(example: Example, separator: Example) -> bool:
    """A tokenizer that ends every text itself needs no second end."""
    return bool(np.array_equal(example.tokens[-len(separator) :], separator.tokens))


def _unused_start(rng: np.random.Generator, index: int, last: int, used: set[tuple[int, int]]) -> int:
    """A random start in 0..last that document `index` was not cut at before, or any if all were."""
    start = int(rng.integers(last + 1))
    if (index, start) in used:
        free = [candidate for candidate in range(last + 1) if (index, candidate) not in used]
        start = free[int(rng.integers(len(free)))] if free else start
    return start
