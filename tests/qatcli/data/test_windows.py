"""Windows of whole recipes: reproducible, disjoint, mixed by weight; real data where it is available."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from qatcli.data import WindowSet, sample_windows
from qatcli.data.tokens import plain
from qatcli.data.windows import _begin, allocate, generator
from qatcli.errors import InputError, RecipeError


@pytest.fixture
def sample(number_tokenizer: PreTrainedTokenizerFast, make_source) -> Callable[..., WindowSet]:  # type: ignore[no-untyped-def]
    def sample(
        *paths: object, tokenizer: object = number_tokenizer, weights: object = None, **options: object
    ) -> WindowSet:
        weights = weights or [1.0] * len(paths)
        fields = {key: options.pop(key) for key in ("packing", "template", "bos") if key in options}
        sources = [make_source(str(path), weight=weight, **fields) for path, weight in zip(paths, weights, strict=True)]  # type: ignore[call-overload]
        settings = {"samples": 8, "validation_samples": 4, "seq_len": 16, "seed": 2, **options}
        return sample_windows(sources, tokenizer, **settings)  # type: ignore[arg-type]

    return sample


def same(one: WindowSet, other: WindowSet) -> bool:
    return torch.equal(one.train, other.train) and torch.equal(one.validation, other.validation)


def test_shapes_and_types(sample: Callable[..., WindowSet], write_documents: Callable[..., Path]) -> None:
    windows = sample(write_documents([40] * 100))
    assert (windows.train.shape, windows.train.dtype) == ((8, 16), torch.int32)
    assert (windows.validation.shape, windows.validation.dtype) == ((4, 16), torch.int32)
    assert windows.loss_mask_train is None
    assert windows.loss_mask_validation is None
    assert len(windows.digest) == 64
    stats = json.loads(json.dumps(windows.stats))
    assert (stats["documents"], stats["packed"]) == (100, False)
    (source,) = stats["sources"]
    assert (source["train"]["windows"], source["validation"]["windows"]) == (8, 4)
    assert source["train"]["documents"] == 90
    assert source["train"]["tokens_tokenized"] == 40 * source["train"]["documents_tokenized"] > 0
    assert source["train"]["documents_tokenized"] < 90  # only what was drawn


def test_reproducible(sample: Callable[..., WindowSet], write_documents: Callable[..., Path]) -> None:
    path = write_documents([30, 5] * 100)
    first = sample(path)
    torch.manual_seed(1)
    assert same(first, sample(path))
    assert first.digest == sample(path, seed=3).digest
    assert not same(first, sample(path, seed=3))
    assert not same(first, sample(path, purpose="e2e_qp"))


def test_the_generator_is_the_same_everywhere() -> None:
    assert generator(2, "calibrate", "train", 0).integers(2**31, size=3).tolist() == [1014527320, 995038538, 517648279]


@pytest.mark.parametrize("lengths", [[40] * 100, [3] * 200, [3000], [3, 500], [600, 2, 700]])
@pytest.mark.parametrize("seed", range(4))
def test_validation_never_sees_the_first_nine_tenths(
    sample: Callable[..., WindowSet], write_documents: Callable[..., Path], lengths: list[int], seed: int
) -> None:
    windows = sample(write_documents(lengths), seed=seed)
    cut = sum(lengths[: len(lengths) * 9 // 10]) if len(lengths) >= 10 else sum(lengths) * 9 // 10
    train, validation = (set((tensor[tensor > 1] - 2).tolist()) for tensor in (windows.train, windows.validation))
    assert (len(train) > 0, len(validation) > 0) == (True, True)
    assert max(train) < cut <= min(validation)


@given(
    count=st.integers(0, 5000),
    weights=st.lists(st.floats(0, 100), min_size=1, max_size=8).filter(lambda weights: sum(weights) > 1e-6),
)
def test_allocation(count: int, weights: list[float]) -> None:
    shares = allocate(count, weights)
    assert sum(shares) == count
    for share, weight in zip(shares, weights, strict=True):
        assert abs(share - count * weight / sum(weights)) < 1


def test_allocation_by_largest_remainder() -> None:
    assert allocate(10, [1, 1, 1]) == [4, 3, 3]
    assert allocate(7, [0.7, 0.3]) == [5, 2]
    assert allocate(4, [3, 0, 1]) == [3, 0, 1]


@pytest.mark.parametrize("weights", [[], [0.0], [-1.0, 2.0], [float("nan")], [float("inf")]])
def test_bad_weights(weights: list[float]) -> None:
    with pytest.raises(RecipeError, match="weights"):
        allocate(4, weights)


def test_sources_are_mixed_by_weight(sample: Callable[..., WindowSet], write_documents: Callable[..., Path]) -> None:
    paths = [write_documents([40] * 50, f"{first}.jsonl", first=first) for first in (0, 10_000)]
    windows = sample(*paths, weights=[3, 1], samples=40)
    second = (windows.train[:, 0] > 10_000).tolist()
    assert sum(second) == 10
    assert second != sorted(second)  # mixed, not one after the other
    assert (windows.validation[:, 0] > 10_000).sum() == 1
    assert [stats["train"]["windows"] for stats in windows.stats["sources"]] == [30, 10]


def test_a_source_samples_alike_whatever_its_neighbours_weigh(
    sample: Callable[..., WindowSet], write_documents: Callable[..., Path]
) -> None:
    paths = [write_documents([40] * 50, f"{first}.jsonl", first=first) for first in (0, 10_000)]
    alone = {tuple(row) for row in sample(paths[0], samples=6).train.tolist()}
    beside = {tuple(row) for row in sample(*paths, samples=12).train.tolist()}
    assert alone <= beside


def test_paragraphs_are_packed(sample: Callable[..., WindowSet], write_documents: Callable[..., Path]) -> None:
    windows = sample(write_documents([6] * 400))
    assert windows.stats["packed"]
    for row in windows.train.tolist():
        assert 1 in row  # the end-of-text token between documents
        assert all(after == here + 1 or 1 in (here, after) for here, after in itertools.pairwise(row))


def test_few_long_documents_are_not_used_alone(
    sample: Callable[..., WindowSet], write_documents: Callable[..., Path]
) -> None:
    few, enough = ([6] * 85 + [40] * long + [6] * 10 + [40] * 10 for long in (5, 10))
    packed = sample(write_documents(few))
    assert packed.stats["sources"][0]["train"]["packed"]
    assert not packed.stats["sources"][0]["validation"]["packed"]
    assert not sample(write_documents(enough)).stats["packed"]


def test_long_documents_that_would_repeat_are_not_used_alone(
    sample: Callable[..., WindowSet], write_documents: Callable[..., Path]
) -> None:
    path = write_documents([40] * 20 + [6] * 300)
    drawn, packed = (sample(path, samples=samples, validation_samples=0).stats["packed"] for samples in (16, 64))
    assert (drawn, packed) == (False, True)


def test_newline_between_documents_without_an_end_token(
    sample: Callable[..., WindowSet], write_jsonl: Callable[..., Path], chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.eos_token = None
    windows = sample(write_jsonl([{"text": "abc"}] * 100), tokenizer=tokenizer, samples=1)
    assert "<s>abc\n<s>abc\n<s>" in tokenizer.decode(windows.train[0])


def test_too_little_text(sample: Callable[..., WindowSet], write_documents: Callable[..., Path]) -> None:
    path = write_documents([3] * 18 + [5] * 2)
    with pytest.raises(InputError) as caught:
        sample(path, seq_len=20)
    message = caught.value.message
    for fact in (str(path), "validation split", "2 documents", "20 tokens", "longest has 5", "only 10"):
        assert fact in message
    assert "seq_len" in str(caught.value.hint)
    assert sample(path, seq_len=20, validation_samples=0).validation.shape == (0, 20)


def test_no_source(sample: Callable[..., WindowSet]) -> None:
    with pytest.raises(RecipeError, match="weights"):
        sample()


def test_alpaca_windows(
    sample: Callable[..., WindowSet], write_jsonl: Callable[..., Path], chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = [{"instruction": f"Say {n}.", "input": "", "output": f"[{n}]"} for n in range(100, 200)]
    windows = sample(write_jsonl(rows), tokenizer=chat_tokenizer, seq_len=512)
    assert windows.loss_mask_train is not None
    assert windows.loss_mask_validation is not None
    assert windows.loss_mask_train.shape == windows.train.shape
    assert windows.loss_mask_train.dtype == torch.bool
    for row, mask in zip(windows.train, windows.loss_mask_train, strict=True):
        text, answer = chat_tokenizer.decode(row), chat_tokenizer.decode(row[mask])
        assert text.startswith("<s>Below is an instruction")
        assert answer[:9] == f"[{text[text.index('Say ') + 4 :][:3]}]</s>"
        assert answer.replace("</s>", "").translate(str.maketrans("", "", "0123456789[]")) == ""


def test_text_beside_instructions_trains_everywhere(
    sample: Callable[..., WindowSet], write_jsonl: Callable[..., Path], chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    talk = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]}] * 20
    paths = [write_jsonl(talk, "talk.jsonl"), write_jsonl([{"text": "x" * 99}] * 100, "text.jsonl")]
    windows = sample(*paths, tokenizer=chat_tokenizer, seq_len=40)
    assert windows.loss_mask_train is not None
    is_text = torch.tensor(["Hi" not in chat_tokenizer.decode(row) for row in windows.train])
    assert is_text.sum() == 4
    assert windows.loss_mask_train[is_text].all()
    assert not windows.loss_mask_train[~is_text].all()
    assert windows.loss_mask_train[~is_text].any(dim=1).all()
    assert [stats["format"] for stats in windows.stats["sources"]] == ["chat", "text"]


def test_redpajama(sample: Callable[..., WindowSet], qat_data: Path, chat_tokenizer: PreTrainedTokenizerFast) -> None:
    pattern = qat_data / "calib" / "rp1t_*.jsonl"
    windows = sample(pattern, tokenizer=chat_tokenizer, samples=16, seq_len=128)
    assert windows.train.shape == (16, 128)
    assert not windows.stats["packed"]
    assert windows.stats["documents"] > 4000
    assert len({tuple(row) for row in windows.train.tolist()}) == 16
    assert windows.stats["sources"][0]["train"]["documents_tokenized"] < 200


def test_real_paragraphs_and_instructions(
    sample: Callable[..., WindowSet], qat_data: Path, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    paths = [qat_data / "calib" / name for name in ("enwiki_hotpot_17mb.jsonl", "alpaca_5000.json")]
    windows = sample(*paths, tokenizer=chat_tokenizer, samples=16, seq_len=4096)
    assert [stats["format"] for stats in windows.stats["sources"]] == ["text", "alpaca"]
    assert all(stats["train"]["packed"] for stats in windows.stats["sources"])
    assert windows.loss_mask_train is not None
    assert windows.loss_mask_train.all(dim=1).sum() == 8


def instructions(count: int = 60) -> list[dict[str, str]]:
    return [{"instruction": f"Say {n}.", "output": f"[{n}]"} for n in range(100, 100 + count)]


def test_one_instruction_per_window(
    sample: Callable[..., WindowSet], write_jsonl: Callable[..., Path], chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    options = {"tokenizer": chat_tokenizer, "seq_len": 200, "packing": False, "template": "chat", "padding": True}
    windows = sample(write_jsonl(instructions()), **options)
    assert windows.loss_mask_train is not None
    for row, mask in zip(windows.train, windows.loss_mask_train, strict=True):
        text = chat_tokenizer.decode(row).rstrip("</s>")
        number = text.split("Say ")[1][:3]
        assert text == f"<|im_start|>user\nSay {number}.<|im_end|>\n<|im_start|>assistant\n[{number}]<|im_end|>\n"
        assert chat_tokenizer.decode(row[mask]) == f"[{number}]<|im_end|>"
    assert windows.stats["targets"] == {"train": 8 * 6, "validation": 4 * 6}
    assert not windows.stats["packed"]
    assert len({tuple(row) for row in windows.train.tolist()}) == 8


def test_padding_is_refused_where_every_token_counts(
    sample: Callable[..., WindowSet], write_jsonl: Callable[..., Path], chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(RecipeError, match="packing: false"):
        sample(write_jsonl(instructions()), tokenizer=chat_tokenizer, packing=False)


@pytest.mark.parametrize("packing", [None, False])
def test_no_answer_within_a_window(
    sample: Callable[..., WindowSet],
    write_jsonl: Callable[..., Path],
    chat_tokenizer: PreTrainedTokenizerFast,
    packing: bool | None,
) -> None:
    with pytest.raises(InputError, match="54 documents, none with an answer in its first 16 tokens"):
        sample(write_jsonl(instructions()), tokenizer=chat_tokenizer, packing=packing, padding=True)


def test_an_answer_longer_than_the_window_is_cut(
    sample: Callable[..., WindowSet], write_jsonl: Callable[..., Path], chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write_jsonl([{"instruction": "a", "output": "b" * 500}] * 20)
    windows = sample(path, tokenizer=chat_tokenizer, seq_len=256, template="chat")
    assert windows.loss_mask_train is not None
    for row, mask in zip(windows.train, windows.loss_mask_train, strict=True):
        assert set(chat_tokenizer.decode(row[mask])) == {"b"}
        assert mask[-1]


def test_packing_of_text_can_be_chosen(sample: Callable[..., WindowSet], write_documents: Callable[..., Path]) -> None:
    long, few = write_documents([40] * 100), write_documents([6] * 85 + [40] * 15, "few.jsonl")
    packed = sample(long, packing=True)
    assert packed.stats["packed"]
    assert (packed.train == 1).any()  # the end-of-text token between documents
    alone = sample(few, packing=False, validation_samples=0)
    assert not alone.stats["packed"]
    assert (alone.train.diff(dim=1) == 1).all()
    with pytest.raises(InputError, match="none longer than a window") as caught:
        sample(write_documents([6] * 400, "short.jsonl"), packing=False)
    assert "packing" in str(caught.value.hint)


def test_every_window_begins(
    sample: Callable[..., WindowSet],
    write_jsonl: Callable[..., Path],
    chat_tokenizer: PreTrainedTokenizerFast,
    number_tokenizer: PreTrainedTokenizerFast,
) -> None:
    path = write_jsonl([{"text": "x" * 99}] * 100)
    first = {bos: sample(path, tokenizer=chat_tokenizer, bos=bos).train for bos in ("document", "window")}
    assert not (first["document"][:, 0] == chat_tokenizer.bos_token_id).all()
    assert (first["window"][:, 0] == chat_tokenizer.bos_token_id).all()
    assert first["window"].shape == (8, 16)
    assert ((first["window"] == chat_tokenizer.bos_token_id).sum(dim=1) == 1).all()
    with pytest.raises(InputError, match="no beginning-of-text token"):
        sample(path, tokenizer=number_tokenizer, bos="window")


def test_another_purpose_has_windows_of_its_own(
    sample: Callable[..., WindowSet], write_documents: Callable[..., Path]
) -> None:
    path = write_documents([400] * 100)
    one, other = ({tuple(row) for row in sample(path, purpose=p).train.tolist()} for p in ("calibrate", "e2e-qp"))
    assert not one & other


def test_a_source_that_is_named_twice_gives_other_windows(
    sample: Callable[..., WindowSet], write_documents: Callable[..., Path]
) -> None:
    path = write_documents([400] * 100)
    assert len({tuple(row) for row in sample(path, path, samples=16).train.tolist()}) == 16


def test_a_window_that_begins_stays_as_it_is(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    bos = chat_tokenizer.bos_token_id
    for tokens in ([bos, 7, 8], [7, 8, 9]):
        assert _begin(chat_tokenizer, plain(np.array(tokens, dtype=np.int32))).tokens.tolist() == [bos, 7, 8]
