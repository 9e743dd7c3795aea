"""Records to tokens with a loss mask.

text    the document, with the special tokens the tokenizer adds by default; loss everywhere
alpaca  the Stanford Alpaca prompt, or a conversation of two turns; loss on the output and the end-of-text token
chat    the tokenizer's chat template; loss on what the assistant says (qatcli.data.chat)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from qatcli.data.chat import encode_chat
from qatcli.data.rows import Record
from qatcli.data.tokens import Example, encode_answers, encode_text, join, plain

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


def encoder(tokenizer: PreTrainedTokenizerBase, format_: str, template: str) -> Callable[[Record], Example]:
    """The function that tokenizes the records of one format: text, alpaca or chat.

    template: how instructions are put, "alpaca" in Stanford's prompt or "chat" in the tokenizer's chat template.
    """
    if format_ == "alpaca" and template == "chat":
        return lambda record: encode_chat(tokenizer, _as_conversation(record))
    encode = {"text": _encode_document, "alpaca": _encode_alpaca, "chat": encode_chat}[format_]
    return lambda record: encode(tokenizer, record)


def _encode_document(tokenizer: PreTrainedTokenizerBase, record: Record) -> Example:
    tokens = encode_text(tokenizer, record.texts[0])
    if len(tokens) > 1 and tokens[0] == tokens[1] == tokenizer.bos_token_id:
        tokens = tokens[1:]  # the text has a beginning of its own
    return plain(tokens)


def _encode_alpaca(tokenizer: PreTrainedTokenizerBase, record: Record) -> Example:
    instruction, context, answer = record.texts
    template = _INSTRUCTION_AND_INPUT if context else _INSTRUCTION
    prompt = template.format(instruction=instruction, input=context)
    span = (len(prompt), len(prompt) + len(answer))
    example = encode_answers(tokenizer, prompt + answer, [span], special_tokens=True)
    eos = tokenizer.eos_token_id
    if eos is None:
        return example
    if example.tokens[-1] == eos:  # of a tokenizer that ends every text
        example = example[:-1]
    return join([example, plain(np.asarray([eos], dtype=np.int32))])


def _as_conversation(record: Record) -> Record:
    instruction, context, answer = record.texts
    question = f"{instruction}\n\n{context}" if context else instruction
    return Record(record.where, (question, answer), ("user", "assistant"))
