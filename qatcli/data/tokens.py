"""Tokenized text: the ids, and which of them a loss may be taken on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

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
