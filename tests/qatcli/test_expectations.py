"""Expected figures: which name is which figure, which direction is better, and what a miss says."""

from __future__ import annotations

import math
from typing import Any

import pytest

from qatcli.errors import VerificationError
from qatcli.expectations import check, is_accuracy, require

METRICS: dict[str, Any] = {
    "models": {
        "full_precision": {"perplexity": {"wiki": 5.0}},
        "quantized": {
            "perplexity": {"wiki": 6.9, "c4": math.inf},
            "divergence": {"wiki": {"mean_kl": 0.3, "kl_99": 2.0, "top1_agreement": 0.7}},
            "zero_shot": {
                "tasks": {
                    "piqa": {"metric": "acc", "value": 0.62, "stderr": 0.01},
                    "lambada": {"metric": "word_perplexity", "value": 12.0, "stderr": None},
                },
                "average": {"value": 0.6, "stderr": 0.01},
            },
        },
    },
    "size": {"bits_per_weight": 2.28, "bits_per_parameter": 4.9},
}


def outcome(name: str, value: float, tolerance: float = 0.0) -> Any:
    (one,) = check({name: {"value": value, "tolerance": tolerance}}, METRICS)
    return one


@pytest.mark.parametrize(
    ("name", "reached", "missed"),
    [
        ("wiki", 6.9, 6.8),
        ("wiki.kl", 0.3, 0.2),
        ("wiki.kl_99", 2.1, 1.9),
        ("wiki.top1_agreement", 0.7, 0.8),
        ("piqa", 0.62, 0.63),
        ("lambada", 12.0, 11.0),
        ("zero_shot", 0.5, 0.61),
        ("bits_per_weight", 2.3, 2.2),
        ("bits_per_parameter", 5.0, 4.0),
    ],
)
def test_every_figure_and_its_direction(name: str, reached: float, missed: float) -> None:
    assert outcome(name, reached).passed
    assert not outcome(name, missed).passed


def test_the_tolerance_belongs_to_the_figure() -> None:
    assert outcome("wiki", 6.85, 0.05).passed  # 6.9 - 6.85 is a little more than 0.05 in binary
    assert not outcome("wiki", 6.85, 0.04).passed
    assert outcome("piqa", 0.63, 0.01).passed
    assert outcome("wiki", 6.85, 0.05).limit == pytest.approx(6.9)
    assert outcome("piqa", 0.63, 0.01).limit == pytest.approx(0.62)


def test_metrics_that_are_accuracies() -> None:
    """Names of lm-eval: shares of right answers, and neither other scores nor what is not in [0, 1]."""
    names = ("acc", "acc_norm", "prompt_level_strict_acc", "exact_match", "em")
    assert all(is_accuracy(name) for name in names)
    assert not any(is_accuracy(name) for name in ("", None, "word_perplexity", "bits_per_byte", "bleu", "mcc", "f1"))


@pytest.mark.parametrize("name", ["c4", "unknown"])
def test_what_is_not_finite_or_not_measured_is_missed(name: str) -> None:
    assert not outcome(name, 1e9, 1e9).passed


def test_nothing_measured_at_all() -> None:
    (one,) = check({"wiki": {"value": 1.0, "tolerance": 0.0}}, {"models": {"quantized": {"zero_shot": None}}})
    assert not one.passed
    assert "was not measured" in one.sentence()


def test_a_miss_names_every_figure() -> None:
    outcomes = [outcome(name, value).to_json() for name, value in (("wiki", 6.8), ("piqa", 0.7), ("wiki.kl", 1.0))]
    with pytest.raises(VerificationError) as caught:
        require(outcomes)
    assert caught.value.exit_code == 4
    assert "wiki is 6.9, expected at most 6.8; piqa is 0.62, expected at least 0.7" in caught.value.message
    assert "wiki.kl" not in caught.value.message
    require([one for one in outcomes if one["passed"]])
