"""Rows of many questions give the log-likelihoods of one pass per choice."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from qatcli.evaluation.rows import Request, Shared, rows_of, score_alone, score_row, share_prefixes, takes_rows

SETTINGS: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32}


def questions(count: int, *, choices: int = 4, vocabulary: int = 61) -> list[Request]:
    """Multiple choice as lm-eval asks it: a shared context, continuations of several lengths."""
    draw = random.Random(0)
    requests = []
    for _ in range(count):
        context = [draw.randrange(vocabulary) for _ in range(draw.randint(9, 14))]
        for _ in range(choices):
            continuation = [draw.randrange(vocabulary) for _ in range(draw.randint(1, 5))]
            requests.append(Request(context + continuation, len(continuation)))
    return requests


@pytest.fixture(scope="module")
def model(random_llama: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(random_llama, dtype=torch.float32).eval()


def _expected(model: Any, request: Request) -> tuple[float, bool]:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([request.tokens])).logits[0, :-1].double()
    targets = torch.tensor(request.tokens[1:])
    each = logits.log_softmax(-1).gather(1, targets[:, None])[-request.scored :]
    return float(each.sum()), bool((logits.argmax(-1) == targets)[-request.scored :].all())


def _score(model: Any, requests: list[Request], most: int) -> list[tuple[float, bool]]:
    rows = rows_of(share_prefixes(requests, most), most)
    return [result for row in rows for result in score_row(model, row, **SETTINGS)]


@pytest.mark.parametrize("most", [1, 60, 10_000])  # a row per group, some, one row
def test_rows_score_as_single_passes_do(model: Any, most: int) -> None:
    requests = questions(6)
    found = _score(model, requests, most)
    expected = [_expected(model, request) for request in requests]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], rel=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_greedy_continuations_are_recognized(model: Any) -> None:
    prompt = list(range(10))
    with torch.no_grad():
        best = model.generate(torch.tensor([prompt]), max_new_tokens=3, do_sample=False)[0].tolist()
    worse = [*best[:-1], (best[-1] + 1) % 61]
    found = _score(model, [Request(best, 3), Request(worse, 3)], 100)
    assert [greedy for _, greedy in found] == [True, False]


def test_the_choices_of_a_question_are_read_with_one_context() -> None:
    requests = questions(5)
    groups = share_prefixes(requests, 1000)
    assert [len(group.requests) for group in groups] == [4] * 5
    assert all(group.prefix >= 9 for group in groups)
    assert sum(group.tokens for group in groups) < 0.6 * sum(len(request.inputs) for request in requests)


def test_the_shared_context_may_be_predicted_from(model: Any) -> None:
    """Winogrande puts the choice into the context and scores what follows; a first token may be all that is scored."""
    context = list(range(20, 32))
    requests = [Request([*context, 5, 6, 7], 8), Request([*context, 9, 6, 7], 8), Request([*context, 3], 1)]
    (group,) = share_prefixes(requests, 1000)
    assert group.prefix == 12
    found = [value for value, _ in _score(model, requests, 1000)]
    assert found == pytest.approx([_expected(model, request)[0] for request in requests], rel=1e-4)


def test_a_single_token_to_score_needs_no_tokens_of_its_own(model: Any) -> None:
    """Answers A, B, C, D: all four are read off the same logits."""
    context = list(range(40, 52))
    requests = [Request([*context, letter], 1) for letter in (1, 2, 3, 4)]
    (group,) = share_prefixes(requests, 1000)
    assert group.tokens == 12
    found = [value for value, _ in _score(model, requests, 1000)]
    assert found == pytest.approx([_expected(model, request)[0] for request in requests], rel=1e-4)


def test_groups_stay_within_a_row() -> None:
    requests = [Request([*range(10), number, number], 1) for number in range(40)]
    groups = share_prefixes(requests, 30)
    assert max(group.tokens for group in groups) <= 30
    assert sum(len(group.requests) for group in groups) == 40
    assert [len(row) for row in rows_of([Shared([Request([1] * 11, 1)], 10)] * 7, 30)] == [3, 3, 1]


def test_a_model_that_ignores_masks_or_positions_is_found_out(model: Any) -> None:
    row = share_prefixes(questions(3), 1000)
    assert takes_rows(model, [row], **SETTINGS)

    class Deaf(torch.nn.Module):
        config = model.config

        def forward(self, input_ids, position_ids=None, attention_mask=None, logits_to_keep=0, use_cache=False):  # type: ignore[no-untyped-def]
            return model(input_ids=input_ids, logits_to_keep=logits_to_keep)

    assert not takes_rows(Deaf(), [row], **SETTINGS)


@pytest.mark.parametrize(
    ("config_class", "overrides", "expected"),
    [
        ("Qwen2Config", {}, True),
        ("MistralConfig", {"sliding_window": None}, True),
        ("MistralConfig", {"sliding_window": 8}, False),  # contexts are longer than the window
        ("Gemma3TextConfig", {"sliding_window": 64}, True),
    ],
)
def test_families(
    save_random_model: Callable[..., Path], config_class: str, overrides: dict[str, Any], expected: bool
) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_random_model(config_class, **overrides), dtype=torch.float32)
    row = share_prefixes(questions(2), 1000)
    assert takes_rows(model.eval(), [row], **SETTINGS) is expected
    if expected:
        alone = [score_alone(model, request, **SETTINGS) for group in row for request in group.requests]
        assert [value for value, _ in score_row(model, row, **SETTINGS)] == pytest.approx(alone, rel=1e-4)


def test_a_later_row_beyond_the_window_is_found_out(model: Any, save_random_model: Callable[..., Path]) -> None:
    """lm-eval asks all tasks at once: those of short questions may come first."""
    path = save_random_model("Gemma3TextConfig", sliding_window=16, layer_types=["sliding_attention"] * 3)
    windowed = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    first = share_prefixes([Request([(7 * at + number) % 61 for at in range(10)], 2) for number in range(4)], 60)
    last = [Shared([Request([11 * at % 61 for at in range(60)], 2)], 59)]
    assert takes_rows(windowed, [first], **SETTINGS)
    assert not takes_rows(windowed, [first, last], **SETTINGS)

    class Silent(torch.nn.Module):
        config = model.config  # which has no window: only scoring shows it

        def forward(self, input_ids, position_ids=None, logits_to_keep=0, **others):  # type: ignore[no-untyped-def]
            return windowed(input_ids, position_ids=position_ids, logits_to_keep=logits_to_keep, **others)

    assert takes_rows(Silent(), [first], **SETTINGS)
    assert not takes_rows(Silent(), [first, last], **SETTINGS)
