"""The models that are measured beside the result are what they are called."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qatcli.evaluation.candidates import round_to_nearest
from qatcli.models.source import open_source
from qatcli.recipe import QuantSection

CPU = torch.device("cpu")


@pytest.mark.parametrize("skip", [(), ("*.down_proj",)])
def test_rounded_to_nearest_is_what_the_stages_quantize(tiny_llama_tied: Path, skip: tuple[str, ...]) -> None:
    """With tied weights a rounded output layer would be rounded embeddings, too."""
    source = open_source(str(tiny_llama_tied))
    full = source.load_model(torch.float32, CPU).state_dict()
    rounded = round_to_nearest(source, QuantSection(bits=2, group_size=16, skip=skip), CPU).load().state_dict()
    changed = {name for name in full if not torch.equal(full[name], rounded[name])}
    linears = {name for name in full if name.endswith("_proj.weight")}
    assert changed == {name for name in linears if not (skip and "down_proj" in name)}
    groups = rounded["model.layers.0.mlp.up_proj.weight"].reshape(-1, 16)
    assert all(len(group.unique()) <= 4 for group in groups)
