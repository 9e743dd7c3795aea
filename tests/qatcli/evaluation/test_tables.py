"""The names of models in tables."""

from __future__ import annotations

import pytest

from qatcli.evaluation.tables import _labels


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["runs/w2/pack", "runs/w3/pack"], ["w2/pack", "w3/pack"]),
        (["/models/full", "runs/w3/pack", "a.gguf"], ["full", "pack", "a.gguf"]),
        (["owner/model"], ["model"]),
        (["pack", "w2/pack/"], ["pack", "w2/pack"]),
        (["full_precision", "quantized"], ["full_precision", "quantized"]),
    ],
)
def test_models_go_by_the_end_of_their_path(names: list[str], labels: list[str]) -> None:
    assert list(_labels(names).values()) == labels
