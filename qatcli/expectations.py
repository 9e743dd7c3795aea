"""The figures a recipe expects (`expect`) against those an evaluation measured.

Names: a text of `eval.perplexity` is its perplexity; `<text>.kl`, `<text>.kl_99` and `<text>.top1_agreement` are its
divergence from full precision; a zero-shot task is its accuracy in [0, 1] and `zero_shot` the mean of all;
`bits_per_weight` and `bits_per_parameter` are sizes. Accuracies and agreement must not be lower, everything else must
not be higher.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from qatcli.errors import VerificationError

RESULT = "quantized"  # the evaluated model that expectations are about
ROUNDING = 1e-12  # 6.91 - 6.86 is a little more than 0.05
HIGHER = "higher"
LOWER = "lower"


@dataclass(frozen=True)
class Outcome:
    """One expected figure: `value` with `tolerance`, what was measured (None: nothing), and whether that suffices."""

    metric: str
    value: float
    tolerance: float
    better: str
    measured: float | None
    passed: bool

    @property
    def limit(self) -> float:
        """The worst figure that still passes."""
        return self.value - self.tolerance if self.better == HIGHER else self.value + self.tolerance

    def sentence(self) -> str:
        """What was measured against what was asked."""
        bound = f"at {'least' if self.better == HIGHER else 'most'} {self.limit:g}"
        measured = "was not measured" if self.measured is None else f"is {self.measured:.6g}"
        return f"{self.metric} {measured}, expected {bound}"

    def to_json(self) -> dict[str, Any]:
        """The outcome as plain data, with its limit."""
        return asdict(self) | {"limit": self.limit}


def figures(metrics: Mapping[str, Any]) -> dict[str, tuple[float, str]]:
    """Every figure of the result in an evaluation's metrics by name, with the direction that is better."""
    model = metrics.get("models", {}).get(RESULT, {})
    found = {name: (value, LOWER) for name, value in model.get("perplexity", {}).items()}
    for text, apart in model.get("divergence", {}).items():
        found[f"{text}.kl"] = (apart.get("mean_kl"), LOWER)
        found[f"{text}.kl_99"] = (apart.get("kl_99"), LOWER)
        found[f"{text}.top1_agreement"] = (apart.get("top1_agreement"), HIGHER)
    zero_shot = model.get("zero_shot") or {}
    for task, score in zero_shot.get("tasks", {}).items():
        is_a_loss = any(word in str(score.get("metric")) for word in ("perplexity", "bits_per"))
        found[task] = (score.get("value"), LOWER if is_a_loss else HIGHER)
    found["zero_shot"] = ((zero_shot.get("average") or {}).get("value"), HIGHER)
    size = metrics.get("size", {})
    found |= {name: (size.get(name), LOWER) for name in ("bits_per_weight", "bits_per_parameter")}
    return {name: figure for name, figure in found.items() if figure[0] is not None}


def is_accuracy(metric: object) -> bool:
    """Whether lm-eval's metric of this name is a share of right answers, told in percent and fit for a mean."""
    words = str(metric).split("_")
    return metric in ("exact_match", "em") or "acc" in words or "accuracy" in words


def check(expect: Mapping[str, Mapping[str, float]], metrics: Mapping[str, Any]) -> list[Outcome]:
    """Every expectation of a recipe (as `model_dump` gives it) against an evaluation's metrics."""
    measured = figures(metrics)
    outcomes = []
    for name, wanted in expect.items():
        value, better = measured.get(name, (None, LOWER))
        passed = value is not None and math.isfinite(value)
        if value is not None and passed:
            worse = wanted["value"] - value if better == HIGHER else value - wanted["value"]
            passed = worse <= wanted["tolerance"] + ROUNDING
        outcomes.append(Outcome(name, wanted["value"], wanted["tolerance"], better, value, passed))
    return outcomes


def require(outcomes: Iterable[Mapping[str, Any]]) -> None:
    """VerificationError that names every expectation that was not reached; takes what `Outcome.to_json` gives."""
    missed = [
        Outcome(**{key: value for key, value in one.items() if key != "limit"}).sentence()
        for one in outcomes
        if not one["passed"]
    ]
    if missed:
        raise VerificationError(
            "the recipe expects more: " + "; ".join(missed),
            hint="`qat report RUN` shows where the run lost it; train longer, or change `expect` in the recipe",
        )
