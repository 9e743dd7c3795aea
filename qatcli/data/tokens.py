"""Tokenized text: the ids, and which of them a loss may be taken on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qatcli.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokens = NDArray[np.int32]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Example:
    """tokens int32 [n]; loss bool [n], true where the token is a training target."""

    tokens: Tokens
    loss: Mask

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, span: slice) -> Example:
        return Example(self.tokens[span], self.loss[span])


def plain(tokens: Tokens) -> Example:
    """Text of which every token is a target."""
    return Example(tokens, np.ones(len(tokens), dtype=np.bool_))


def join(examples: Sequence[Example]) -> Example:
    """The examples one after the other."""
    return Example(
        np.concatenate([example.tokens for example in examples]),
        np.concatenate([example.loss for example in examples]),
    )


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, *, special_tokens: bool = True) -> Tokens:
    """Tokens of `text`, int32 [n], with the special tokens the tokenizer adds by default, or none of them."""
    # verbose=False: documents are longer than the model's context on purpose
    ids = tokenizer(text, add_special_tokens=special_tokens, return_attention_mask=False, verbose=False)["input_ids"]
    return np.asarray(ids, dtype=np.int32)


def first_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The beginning-of-text token, which `bos: window` asks for. InputError for a tokenizer that has none."""
    if tokenizer.bos_token_id is None:
        raise InputError("the tokenizer has no beginning-of-text token", hint="leave `bos: window` out")
    return int(tokenizer.bos_token_id)


def encode_answers(
    tokenizer: PreTrainedTokenizerBase, text: str, answers: Sequence[tuple[int, int]], *, special_tokens: bool
) -> Example:
    """Tokens of `text` as one piece, with a loss on those that hold characters of the spans `answers`.

    A token that begins before an answer and ends in it counts: without it the first word of the answer would be lost
    where a template ends in a space. Raises InputError for a tokenizer that does not tell where its tokens are.
    """
    if not tokenizer.is_fast:
        raise InputError(
            f"{type(tokenizer).__name__} does not tell which characters a token stands for, so that the loss cannot be "
            "taken on answers only",
            hint="use a checkpoint with a tokenizer.json, or data in the text format",
        )
    encoded = tokenizer(
        text,
        add_special_tokens=special_tokens,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    tokens = np.asarray(encoded["input_ids"], dtype=np.int32)
    offsets = np.asarray(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    loss = np.zeros(len(tokens), dtype=np.bool_)
    for start, stop in answers:
        inside = np.flatnonzero((offsets[:, 1] > start) & (offsets[:, 0] < stop))
        if start < stop and len(inside):
            # One run: some tokenizers give tokens of spaces no width.
            loss[inside[0] : inside[-1] + 1] = True
    return Example(tokens, loss)
