"""Records to tokens with a loss mask.

text    the document, with the special tokens the tokenizer adds by default; loss everywhere
alpaca  the Stanford Alpaca prompt; loss on the output and the end-of-text token
chat    the tokenizer's chat template; loss on what the assistant says (qatcli.data.chat)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from qatcli.data.chat import encode_chat
from qatcli.data.rows import Record
from qatcli.data.tokens import Example, encode_text, plain

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Taori et al., Stanford Alpaca, 2023
_INSTRUCTION = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
_INSTRUCTION_AND_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


def encoder(tokenizer: PreTrainedTokenizerBase, format_: str) -> Callable[[Record], Example]:
    """The function that tokenizes the records of one format: text, alpaca or chat."""
    encode = {"text": _encode_document, "alpaca": _encode_alpaca, "chat": encode_chat}[format_]
    return lambda record: encode(tokenizer, record)


def _encode_document(tokenizer: PreTrainedTokenizerBase, record: Record) -> Example:
    return plain(encode_text(tokenizer, record.texts[0]))


def _encode_alpaca(tokenizer: PreTrainedTokenizerBase, record: Record) -> Example:
    """Prompt and answer are tokenized apart, as they are when a model answers, so the mask is exact."""
    instruction, context, answer = record.texts
    template = _INSTRUCTION_AND_INPUT if context else _INSTRUCTION
    prompt = encode_text(tokenizer, template.format(instruction=instruction, input=context))
    eos = tokenizer.eos_token_id
    if len(prompt) and prompt[-1] == eos:
        prompt = prompt[:-1]  # of a tokenizer that ends every text
    end = np.asarray([] if eos is None else [eos], dtype=np.int32)
    tokens = np.concatenate([prompt, encode_text(tokenizer, answer, special_tokens=False), end])
    return Example(tokens, np.arange(len(tokens)) >= len(prompt))
