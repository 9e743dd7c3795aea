"""Conversations to tokens through the tokenizer's chat template, with the loss on the assistant's turns.

Templates with {% generation %} markers say themselves what the assistant writes. For the others a turn is found by
rendering the conversation up to it and after it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from qatcli.data.rows import Record
from qatcli.data.tokens import Example, encode_answers
from qatcli.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GENERATION_MARKER = re.compile(r"\{%-?\s*generation\b")


def encode_chat(tokenizer: PreTrainedTokenizerBase, record: Record) -> Example:
    """The conversation as the template renders it; no further special tokens.

    Raises InputError if there is no template, if it refuses the conversation, or if the assistant's last turn cannot
    be told apart in what it renders.
    """
    if not tokenizer.chat_template:
        raise InputError(
            f"{record.where}: a conversation, and the tokenizer has no chat template",
            hint="use the model's instruct variant; data in the alpaca format also go without, with `template: alpaca`",
        )
    if _GENERATION_MARKER.search(tokenizer.get_chat_template()):
        options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        encoded = _apply_template(tokenizer, record, len(record.texts), **options)
        tokens = np.asarray(encoded["input_ids"], dtype=np.int32)
        return Example(tokens, np.asarray(encoded["assistant_masks"], dtype=np.bool_))
    rendered = _render(tokenizer, record, len(record.texts))
    spans = _assistant_spans(tokenizer, record, rendered)
    return encode_answers(tokenizer, rendered, spans, special_tokens=False)


def _assistant_spans(tokenizer: PreTrainedTokenizerBase, record: Record, rendered: str) -> list[tuple[int, int]]:
    """Character spans of `rendered` that the assistant writes, its end-of-turn token included.

    Some templates render a past turn differently from the last one (they drop its reasoning), so that what a model
    would have generated is not in `rendered`. Such turns are context only, as is a turn that opens the conversation or
    that says nothing; the last turn is always there.
    """
    turns = [
        turn
        for turn, (role, text) in enumerate(zip(record.roles, record.texts, strict=True))
        if role == "assistant" and turn > 0 and text.strip()
    ]
    spans = []
    for turn in turns:
        prompt = _render(tokenizer, record, turn, add_generation_prompt=True)
        if not rendered.startswith(prompt):  # a generation prompt of its own, e.g. one that opens a reasoning block
            prompt = _render(tokenizer, record, turn)
        answered = _render(tokenizer, record, turn + 1).rstrip()
        if rendered.startswith(prompt) and rendered.startswith(answered):
            spans.append((len(prompt), max(len(prompt), len(answered))))
        elif turn == turns[-1]:
            raise InputError(
                f"{record.where}: the assistant's last turn cannot be found in what the chat template renders",
                hint="use a tokenizer whose chat template has {% generation %} markers, or another data format",
            )
    return spans


def _render(tokenizer: PreTrainedTokenizerBase, record: Record, count: int, **options: Any) -> str:
    return str(_apply_template(tokenizer, record, count, tokenize=False, **options))


def _apply_template(tokenizer: PreTrainedTokenizerBase, record: Record, count: int, **options: Any) -> Any:
    messages = [{"role": role, "content": text} for role, text in zip(record.roles, record.texts, strict=True)]
    try:
        return tokenizer.apply_chat_template(messages[:count], **options)
    except Exception as error:  # templates raise errors of their own making, e.g. that roles must alternate
        raise InputError(
            f"{record.where}: the tokenizer's chat template refuses this conversation: {error}",
            hint="remove the row, or order its roles as the template expects",
        ) from error
