"""Invariants of the windows that are cut and packed."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qatcli.data.corpus import Document
from qatcli.data.packing import draw_windows, find_long, has_tokens, pack_windows, pad_windows
from qatcli.data.tokens import Example, plain

SEPARATOR = plain(np.array([-1], dtype=np.int32))


def documents(lengths: list[int]) -> list[Document]:
    """Documents of consecutive numbers, no number in two of them."""
    ends = np.cumsum(lengths).tolist()
    examples = [plain(np.arange(end - n, end, dtype=np.int32)) for n, end in zip(lengths, ends, strict=True)]
    return [Document(len(example), lambda example=example: example) for example in examples]


def answers(lengths: list[tuple[int, int]]) -> list[Document]:
    """Instructions of (prompt length, answer length)."""
    made = documents([prompt + answer for prompt, answer in lengths])
    return [
        Document(
            0, lambda tokens=document.example.tokens, prompt=prompt: Example(tokens, np.arange(len(tokens)) >= prompt)
        )
        for document, (prompt, _) in zip(made, lengths, strict=True)
    ]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def tokens(windows: list[Example]) -> list[list[int]]:
    return [window.tokens.tolist() for window in windows]


def test_find_long_stops_early_and_does_not_tokenize_short_documents() -> None:
    made = documents([3, 9, 8, 9, 9])
    assert find_long(made, [0, 3, 2, 1, 4], seq_len=8, wanted=2) == [3, 1]
    assert [document.is_tokenized for document in made] == [False, True, False, True, False]
    assert find_long(made, range(5), seq_len=100, wanted=1) == []


@given(
    lengths=st.lists(st.integers(9, 60), min_size=1, max_size=12),
    count=st.integers(0, 40),
    seq_len=st.integers(1, 8),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_drawn_windows(lengths: list[int], count: int, seq_len: int, seed: int) -> None:
    made = [document.example for document in documents(lengths)]
    windows = tokens(draw_windows(made, rng(seed), count=count, seq_len=seq_len))
    assert len(windows) == count
    ends = np.cumsum(lengths)
    for window in windows:
        assert window == list(range(window[0], window[0] + seq_len))  # consecutive tokens of
        assert np.searchsorted(ends, window[0], "right") == np.searchsorted(ends, window[-1], "right")  # one document
    if count <= len(lengths):
        used = np.searchsorted(ends, [window[0] for window in windows], "right").tolist()
        assert len(set(used)) == count  # every document once before any twice
    if count <= sum(length // seq_len for length in lengths):
        assert len({tuple(window) for window in windows}) == count


def test_more_windows_than_starts() -> None:
    made = [document.example for document in documents([5])]
    windows = tokens(draw_windows(made, rng(), count=5, seq_len=4))
    assert {window[0] for window in windows[:2]} == {0, 1}
    assert len(windows) == 5


@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=20),
    count=st.integers(0, 30),
    seq_len=st.integers(1, 40),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_packed_text(lengths: list[int], count: int, seq_len: int, seed: int) -> None:
    made = documents(lengths)
    assert has_tokens(made, seq_len) == (sum(lengths) >= seq_len)
    if sum(lengths) < seq_len:
        return
    ends = set(np.cumsum(lengths).tolist())
    windows = tokens(pack_windows(made, rng(seed), count=count, seq_len=seq_len, separator=SEPARATOR))
    assert [len(window) for window in windows] == [seq_len] * count
    for window in windows:
        for here, after in itertools.pairwise(window):
            if here == -1:
                assert after == 0 or after in ends  # a document begins
            elif after == -1:
                assert here + 1 in ends  # a document ends
            else:
                assert after == here + 1
        numbers = [token for token in window if token >= 0]
        assert len(set(numbers)) == len(numbers)


def test_packing_uses_new_documents_first() -> None:
    windows = tokens(pack_windows(documents([4] * 40), rng(), count=8, seq_len=8, separator=SEPARATOR))
    starts = [min(token // 4 for token in window if token >= 0) for window in windows]
    assert len(set(starts)) == 8


def test_no_separator_after_a_document_that_ends_itself() -> None:
    made = [Document(3, lambda n=n: plain(np.array([n, n, -1], dtype=np.int32))) for n in (5, 6)]
    window = tokens(pack_windows(made, rng(), count=1, seq_len=5, separator=SEPARATOR))[0]
    assert all((here, after) != (-1, -1) for here, after in itertools.pairwise(window))


def test_the_same_window_only_when_there_is_no_other() -> None:
    windows = [
        tuple(window)
        for window in tokens(pack_windows(documents([2, 2]), rng(), count=4, seq_len=3, separator=SEPARATOR))
    ]
    assert len(set(windows)) == 4
    more = tokens(pack_windows(documents([2, 2]), rng(), count=9, seq_len=3, separator=SEPARATOR))
    assert len(more) == 9


@pytest.mark.parametrize("seed", range(5))
def test_instructions_begin_a_window_and_always_train(seed: int) -> None:
    made = answers([(4, 3), (9, 2), (2, 0), (3, 6), (5, 1)])  # the second and third have no answer within 8 tokens
    starts = {0, 20, 29}
    windows = pack_windows(made, rng(seed), count=7, seq_len=8, separator=None)
    assert len(windows) == 7
    for window in windows:
        assert int(window.tokens[0]) in starts
        assert window.loss.any()
        assert not set(window.tokens.tolist()) & set(range(7, 20))
    assert {int(window.tokens[0]) for window in windows} == starts


def test_masks_stay_with_their_tokens() -> None:
    (window,) = pack_windows(answers([(2, 3), (1, 2)]), rng(3), count=1, seq_len=8, separator=None)
    targets = {2, 3, 4, 6, 7}
    assert [int(token) in targets for token in window.tokens] == window.loss.tolist()


def test_has_tokens_counts_what_can_be_trained_on() -> None:
    made = answers([(9, 2), (2, 0), (3, 2)])
    assert has_tokens(made, 5)
    assert not has_tokens(made, 6)


def test_padded_windows_hold_one_document_each() -> None:
    def document(length: int, prompt: int) -> Document:
        example = Example(np.arange(length, dtype=np.int32), np.arange(length) >= prompt)
        return Document(length, lambda: example)

    long, short, without_answer, late = document(20, 2), document(4, 2), document(5, 5), document(12, 9)
    rng = np.random.default_rng(0)
    windows = pad_windows([long, short, without_answer, late], rng, count=6, seq_len=8, padding=99)
    found = sorted((window.tokens.tolist(), window.loss.tolist()) for window in windows)
    padded = ([0, 1, 2, 3, 99, 99, 99, 99], [False, False, True, True, False, False, False, False])
    cut = ([*range(8)], [False, False, *[True] * 6])
    assert found == [cut] * 3 + [padded] * 3  # each once before any again
    assert pad_windows([without_answer, late], rng, count=2, seq_len=8, padding=99) == []


def test_no_document_gives_more_than_it_has_room_for_before_all_did() -> None:
    made = [document.example for document in documents([9, 49])]  # room for one window, and for six
    for seed in range(5):
        windows = draw_windows(made, rng(seed), count=7, seq_len=8)
        assert sum(int(window.tokens[0]) < 9 for window in windows) == 1


@pytest.mark.parametrize("separator", [None, SEPARATOR])
def test_a_document_that_stands_in_a_window_begins_none_while_there_are_others(separator: Example | None) -> None:
    seen: set[int] = set()
    for window in pack_windows(documents([4] * 40), rng(), count=10, seq_len=16, separator=separator):
        assert int(window.tokens[0]) // 4 not in seen
        seen |= {int(token) // 4 for token in window.tokens if token >= 0}
