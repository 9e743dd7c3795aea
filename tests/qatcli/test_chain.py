"""The chain of `qat run`, before it begins; what it does is in tests/test_pipeline.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qatcli import chain
from qatcli.errors import ResourceError
from qatcli.recipe import Recipe


def test_a_chain_whose_last_stages_have_no_room_is_not_begun(
    tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def require(_recipe: Recipe, stage: str, _variant: str, **_: Any) -> None:
        if stage == "e2e-qp":
            raise ResourceError("too little memory")

    recipe = tmp_path / "recipe.yaml"
    sections = {"model": {"source": "m"}, "quant": {"bits": 2, "group_size": 32}}
    recipe.write_text(json.dumps({**sections, "calibrate": {"data": [{"source": str(tiny_text)}]}}))
    monkeypatch.setattr("qatcli.plan.require", require)
    monkeypatch.setattr(chain, "run_stage", lambda *_, **__: pytest.fail("begun"))
    with pytest.raises(ResourceError, match="too little"):
        chain.run_all(recipe, [], run_dir=tmp_path / "run", restart=False, device="cpu", verbosity=-1)
