"""Text and Alpaca rows to tokens and loss masks."""

from __future__ import annotations

import tokenizers
from transformers import PreTrainedTokenizerFast

from qatcli.data.examples import encoder
from qatcli.data.rows import Record


def test_text_gets_the_tokenizers_own_special_tokens(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    example = encoder(chat_tokenizer, "text", "alpaca")(Record("", ("h\u00e9",)))
    assert example.tokens.tolist() == chat_tokenizer("h\u00e9")["input_ids"]
    assert example.tokens[0] == chat_tokenizer.bos_token_id
    assert example.loss.all()


def test_alpaca_loss_is_exactly_the_answer(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    example = encoder(chat_tokenizer, "alpaca", "alpaca")(Record("", ("Add {these}.", "1 and 2", " three\n")))
    assert chat_tokenizer.decode(example.tokens[example.loss]) == " three\n</s>"
    prompt = chat_tokenizer.decode(example.tokens[~example.loss])
    assert prompt.startswith("<s>Below is an instruction that describes a task, paired with an input")
    assert prompt.endswith("### Instruction:\nAdd {these}.\n\n### Input:\n1 and 2\n\n### Response:\n")
    assert example.loss.tolist() == sorted(example.loss.tolist())  # one run, at the end


def test_alpaca_without_input(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    example = encoder(chat_tokenizer, "alpaca", "alpaca")(Record("", ("Count.", "", "1 2")))
    text = chat_tokenizer.decode(example.tokens)
    assert "describes a task. Write" in text
    assert "Input" not in text


def test_alpaca_prompt_is_not_ended_by_the_tokenizer(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    fast = tokenizers.Tokenizer.from_str(chat_tokenizer.backend_tokenizer.to_str())
    fast.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    ending = PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="</s>")
    example = encoder(ending, "alpaca", "alpaca")(Record("", ("a", "", "b")))
    assert example.tokens.tolist().count(1) == 1
    assert example.tokens[-1] == 1


def test_instructions_through_the_chat_template(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    example = encoder(chat_tokenizer, "alpaca", "chat")(Record("", ("Add.", "1 and 2", "3")))
    assert chat_tokenizer.decode(example.tokens) == (
        "<|im_start|>user\nAdd.\n\n1 and 2<|im_end|>\n<|im_start|>assistant\n3<|im_end|>\n"
    )
    assert chat_tokenizer.decode(example.tokens[example.loss]) == "3<|im_end|>"
    example = encoder(chat_tokenizer, "alpaca", "chat")(Record("", ("Count.", "", "1")))
    assert "user\nCount.<|im_end|>" in chat_tokenizer.decode(example.tokens)


def test_one_beginning_however_often_it_is_written(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    encode = encoder(chat_tokenizer, "text", "alpaca")
    assert encode(Record("", ("<s>a",))).tokens.tolist() == encode(Record("", ("a",))).tokens.tolist()
    assert chat_tokenizer.decode(encode(Record("", ("a",))).tokens) == "<s>a"
    prompt = encoder(chat_tokenizer, "alpaca", "alpaca")(Record("", ("a", "", "b")))
    assert prompt.tokens.tolist().count(chat_tokenizer.bos_token_id) == 1
