"""What a stage is made from: its predecessor's directory, finished and of the same recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qatcli.directory import StageDirectory, begin, commit
from qatcli.errors import InputError
from qatcli.packed import PackedCheckpoint
from qatcli.recipe import Recipe
from qatcli.stages import STAGES, _identity, _open_input, _refuse_another_recipe
from qatcli.stages.export import export_options


def build(**sections: Any) -> Recipe:
    required = {"model": {"source": "m"}, "quant": {"bits": 2, "group_size": 32}}
    return Recipe.model_validate({**required, "calibrate": {"data": [{"source": "./not-read.txt"}]}, **sections})


def test_an_unfinished_stage_is_not_passed_over(tmp_path: Path) -> None:
    """Packing Block-AP's result because E2E-QP has not finished would lose what it trained, without a word."""
    recipe = build()
    partial = begin(tmp_path / "block-ap", {}, restart=False)
    (partial / "x").touch()
    facts = {"stage": "block-ap", "kind": "quantized", "identity": {}, "metrics": {}}
    commit(tmp_path / "block-ap", partial, facts | {"recipe": recipe.model_dump(mode="json")})
    found = _open_input(STAGES["pack"], recipe, tmp_path, None)
    assert found is not None
    assert found.path == tmp_path / "block-ap", "a chain without e2e-qp"
    (tmp_path / "e2e-qp.partial").mkdir()
    with pytest.raises(InputError, match="e2e-qp does not exist or is not finished"):
        _open_input(STAGES["pack"], recipe, tmp_path, None)


def test_a_recipe_that_was_edited_two_stages_before_is_refused(tmp_path: Path) -> None:
    found = StageDirectory(tmp_path / "e2e-qp", {"recipe": build().model_dump(mode="json")})
    _refuse_another_recipe("e2e-qp", found, build(eval={"kl": False}))
    with pytest.raises(InputError, match=r"block_ap\.epochs: was \d+, is 7"):
        _refuse_another_recipe("e2e-qp", found, build(block_ap={"epochs": 7}))


@pytest.mark.parametrize(
    ("stage", "section", "free", "binding"),
    [
        ("block-ap", "block_ap", {"cache": {"host_gb": 0}}, {"epochs": 7}),
        ("export", "export", {"formats": ["gptq", "awq"]}, {"dtype": "bfloat16"}),
        ("eval", "eval", {"cache": False}, {"kl": False}),
    ],
)
def test_a_result_stays_where_only_what_leaves_it_equal_was_edited(
    stage: str, section: str, free: dict[str, Any], binding: dict[str, Any]
) -> None:
    """A format more must not write again what is there, nor the room for activations train again."""
    made = _identity(STAGES[stage], build(), None)
    assert _identity(STAGES[stage], build(**{section: free}), None) == made
    assert _identity(STAGES[stage], build(**{section: binding}), None) != made


@pytest.mark.parametrize(
    ("stored", "given", "written"),
    [
        ({"dtype": "bfloat16"}, "auto", "bfloat16"),
        ({"torch_dtype": "bfloat16"}, "auto", "bfloat16"),
        ({"dtype": "float32"}, "auto", "float16"),
        ({}, "auto", "float16"),
        ({"dtype": "float32", "model_type": "gemma3_text"}, "auto", "bfloat16"),
        ({"dtype": "bfloat16"}, "float16", "float16"),
    ],
)
def test_exports_are_stored_as_the_model_is(stored: dict[str, str], given: str, written: str) -> None:
    """What is beyond float16 in a bfloat16 model stays finite."""
    checkpoint = PackedCheckpoint(Path("p"), stored, {}, {})
    section = build(export={"dtype": given}).export
    assert export_options(section, checkpoint).dtype == written
