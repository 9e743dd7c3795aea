"""Models of any kind and from anywhere, measured side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from qatcli.evaluation.measure import measure
from qatcli.evaluation.opening import open_candidate
from qatcli.recipe.schema import EvalSection
from qatcli.runlog import RunLog


def compare(
    targets: Sequence[str], config: EvalSection, *, against: str | None, device: torch.device, log: RunLog
) -> dict[str, Any]:
    """Measure every target once, `against` first: the full-precision model that divergence is from.

    Errors: InputError for a target that is no model, before any is measured.
    """
    reference = None if against is None else open_candidate(against, device, keep=True)
    others = [open_candidate(target, device) for target in dict.fromkeys(targets) if target != against]
    candidates = [*([reference] if reference else []), *others]
    return measure(candidates, config, reference=reference if config.kl else None, device=device, log=log)
