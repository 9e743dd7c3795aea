"""Loss masks from spans of characters."""

from __future__ import annotations

import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from qatcli.data.tokens import encode_answers
from qatcli.errors import InputError


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    """Tokens are words with the space before them, and a byte-level newline; `<s>` in front, `</s>` behind."""
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", "<unk>", "A:", "B:", "yes", "no"])}
    spaced = ["\u0120yes", "\u0120no", "\u0120", "\u0120\u0120", "\u010a"]
    vocabulary |= {token: len(vocabulary) + number for number, token in enumerate(spaced)}
    fast = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"\n| ?\w+:?| +"), "isolated")
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, byte_level])
    fast.post_processor = tokenizers.processors.Sequence(
        [
            tokenizers.processors.ByteLevel(trim_offsets=True),
            tokenizers.processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def learnt(tokenizer: PreTrainedTokenizerFast, text: str, *answers: tuple[int, int]) -> list[str]:
    example = encode_answers(tokenizer, text, answers, special_tokens=True)
    tokens = tokenizer.convert_ids_to_tokens(example.tokens.tolist())
    return [token for token, loss in zip(tokens, example.loss, strict=True) if loss]


def test_a_token_that_begins_in_the_prompt_belongs_to_the_answer(words: PreTrainedTokenizerFast) -> None:
    assert words.tokenize("B: yes") == ["B:", "\u0120yes"]
    assert learnt(words, "B: yes", (3, 6)) == ["\u0120yes"]  # the template ends in the space
    assert learnt(words, "B: yes", (2, 6)) == ["\u0120yes"]


def test_spaces_without_width_are_not_lost(words: PreTrainedTokenizerFast) -> None:
    text = "A: no\nB: yes\n  \nno"
    assert learnt(words, text, (8, len(text))) == ["\u0120yes", "\u010a", "\u0120\u0120", "\u010a", "no"]


def test_special_tokens_and_other_turns_are_not_learnt(words: PreTrainedTokenizerFast) -> None:
    assert learnt(words, "A: no\nB: yes\nA: no", (8, 12)) == ["\u0120yes"]
    assert learnt(words, "A: no\nB: yes\nA: no", (2, 5), (15, 18)) == ["\u0120no", "\u0120no"]
    assert learnt(words, "A: no", (3, 3)) == []


def test_a_tokenizer_without_offsets(words: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(words), "is_fast", False)
    with pytest.raises(InputError, match="does not tell which characters") as caught:
        encode_answers(words, "B: yes", [(2, 6)], special_tokens=False)
    assert "tokenizer.json" in str(caught.value.hint)
