"""Loss masks of conversations, under the kinds of chat templates there are."""

from __future__ import annotations

import copy
import os

import pytest
from transformers import PreTrainedTokenizerFast

from qatcli.data.chat import encode_chat
from qatcli.data.rows import Record
from qatcli.errors import InputError
from qatcli.models.source import open_source

TURNS = Record("talk.jsonl line 1", ("Hi", "Hello!", "Bye?", "Bye."), ("user", "assistant", "user", "assistant"))
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
)
# as Qwen3: the reasoning of past turns is dropped, a generation prompt may open a reasoning block
REASONING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_2 = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '<s>[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' </s>' }}{% endif %}{% endfor %}"
)


def trained(tokenizer: PreTrainedTokenizerFast, record: Record, template: str | None = None) -> list[str]:
    """The runs of tokens with a loss, as text."""
    if template is not None:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = template
    example = encode_chat(tokenizer, record)
    runs: list[list[int]] = []
    previous = False
    for token, loss in zip(example.tokens.tolist(), example.loss.tolist(), strict=True):
        if loss and not previous:
            runs.append([])
        if loss:
            runs[-1].append(token)
        previous = loss
    return [tokenizer.decode(run) for run in runs]


def test_every_assistant_turn_with_its_end(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    assert trained(chat_tokenizer, TURNS) == ["Hello!<|im_end|>", "Bye.<|im_end|>"]


def test_tokens_are_those_of_the_template(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": role, "content": text} for role, text in zip(TURNS.roles, TURNS.texts, strict=True)]
    expected = chat_tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    assert encode_chat(chat_tokenizer, TURNS).tokens.tolist() == expected


def test_generation_markers(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    assert trained(chat_tokenizer, TURNS, MARKED) == ["Hello!", "Bye."]


def test_a_template_that_rewrites_past_turns(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    assert trained(chat_tokenizer, TURNS, REASONING) == ["<think>\n\n</think>\n\nBye.<|im_end|>"]


def test_a_template_without_generation_prompt(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    assert trained(chat_tokenizer, TURNS, LLAMA_2) == [" Hello! </s>", " Bye. </s>"]


def test_a_generation_prompt_that_is_not_in_the_conversation(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    template = chat_tokenizer.chat_template.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
    assert template != chat_tokenizer.chat_template
    runs = trained(chat_tokenizer, TURNS, template)
    assert runs == ["<|im_start|>assistant\nHello!<|im_end|>", "<|im_start|>assistant\nBye.<|im_end|>"]


@pytest.mark.parametrize(
    ("texts", "roles", "expected"),
    [
        (("Hello!", "Hi", "Yes?"), ("assistant", "user", "assistant"), ["Yes?<|im_end|>"]),
        (("Hi",), ("user",), []),
        (("Hi", ""), ("user", "assistant"), []),
        (("Hi", "Yes", "No"), ("user", "assistant", "user"), ["Yes<|im_end|>"]),
        (("Be brief", "Hi", "Yes"), ("system", "user", "assistant"), ["Yes<|im_end|>"]),
    ],
)
def test_other_orders(
    chat_tokenizer: PreTrainedTokenizerFast, texts: tuple[str, ...], roles: tuple[str, ...], expected: list[str]
) -> None:
    assert trained(chat_tokenizer, Record("", texts, roles)) == expected


def test_a_refused_conversation_names_its_row(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    record = Record("talk.jsonl line 1", ("a", "b"), ("user", "user"))
    with pytest.raises(InputError, match=r"talk.jsonl line 1.*roles must alternate"):
        trained(chat_tokenizer, record, LLAMA_2)


def test_no_template(number_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match=r"talk.jsonl line 1: .* no chat template") as caught:
        encode_chat(number_tokenizer, TURNS)
    assert "template: alpaca" in str(caught.value.hint)


def test_turns_that_cannot_be_found(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match="last turn cannot be found"):
        trained(chat_tokenizer, TURNS, "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}")


def test_a_turn_that_says_nothing_is_not_learnt(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    record = Record("", ("Hi", " ", "Well?", "Yes"), ("user", "assistant", "user", "assistant"))
    assert trained(chat_tokenizer, record) == ["Yes<|im_end|>"]


def test_the_first_word_after_a_template_that_ends_in_a_space(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    assert trained(chat_tokenizer, TURNS, template) == ["Hello!", "Bye."]


SMOLLM2_EXPECTED = [  # by hand: every token of the conversation below, * where the loss is
    *("<|im_start|>", "system", "\n", "Be", " brief", ".", "<|im_end|>", "\n"),
    *("<|im_start|>", "user", "\n", "2", "+", "2", "?", "<|im_end|>", "\n"),
    *("<|im_start|>", "ass", "istant", "\n", "*Four", "*.", "*<|im_end|>", "\n"),
    *("<|im_start|>", "user", "\n", "Sure", "?", "<|im_end|>", "\n"),
    *("<|im_start|>", "ass", "istant", "\n", "*Yes", "*.", "*<|im_end|>", "\n"),
]


def test_smollm2_token_by_token() -> None:
    """The real tokenizer and chat template, with a system prompt and two turns of the assistant."""
    source = os.environ.get("QAT_SMOLLM2")
    if not source:
        pytest.skip("set QAT_SMOLLM2 to the folder or GGUF file of SmolLM2-135M-Instruct")
    tokenizer = open_source(source=source, revision=None, gguf_file=None, trust_remote_code=False).tokenizer()
    roles = ("system", "user", "assistant", "user", "assistant")
    example = encode_chat(tokenizer, Record("", ("Be brief.", "2+2?", "Four.", "Sure?", "Yes."), roles))
    found = [
        ("*" if loss else "") + tokenizer.decode([token])
        for token, loss in zip(example.tokens.tolist(), example.loss.tolist(), strict=True)
    ]
    assert found == SMOLLM2_EXPECTED
