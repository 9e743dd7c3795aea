"""pack: in which types the published checkpoint stores what is not quantized, and what its config.json says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qatcli.directory import StageDirectory
from qatcli.errors import VerificationError
from qatcli.packed import PackedCheckpoint
from qatcli.recipe import Recipe
from qatcli.runlog import RunLog
from qatcli.stages import Job, pack

NORM = "model.norm.weight"
SCALE = "model.layers.0.mlp.down_proj.weight_scale"


@pytest.mark.parametrize(
    ("source", "asked", "stored", "stated"),
    [
        ("bfloat16", "auto", torch.bfloat16, "bfloat16"),
        ("float16", "auto", torch.float16, "float16"),
        ("float32", "auto", torch.float16, "float32"),
        ("float32", "bfloat16", torch.bfloat16, "bfloat16"),
        ("bfloat16", "float32", torch.float32, "float32"),
    ],
)
def test_what_is_not_quantized_has_the_type_that_was_asked_for(
    random_llama: Path,
    pack_model: Callable[..., Path],
    tmp_path: Path,
    source: str,
    asked: str,
    stored: torch.dtype,
    stated: str,
) -> None:
    """Before it all of it is fp32, whatever the source was: training left it so."""
    made, out = pack_model(random_llama, tmp_path / "block-ap"), tmp_path / "pack"
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps({**config, "dtype": source}))
    out.mkdir()
    sections = {"model": {"source": "m"}, "quant": {"bits": 3, "group_size": 16}, "pack": {"dtype": asked}}
    recipe = Recipe.model_validate({**sections, "calibrate": {"data": [{"source": "./not-read.txt"}]}})
    directory = StageDirectory(made, {"kind": "quantized"})
    pack.run(Job(recipe, directory, out, tmp_path, RunLog(verbosity=-1), torch.device("cpu")))
    checkpoint = PackedCheckpoint.open(out)
    tensors = {name: tensor for file in out.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert {tensors[name].dtype for name in checkpoint.dense_names()} == {stored}
    assert checkpoint.config["dtype"] == stated
    assert torch.equal(tensors[NORM], load_file(made / "model.safetensors")[NORM].to(stored))


@pytest.fixture
def packing(random_llama: Path, pack_model: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A function that packs a checkpoint some of whose tensors were edited: (edits, **pack) -> the result."""

    def pack_edited(edits: dict[str, float], **section: str) -> Path:
        made, out = pack_model(random_llama, tmp_path / "block-ap"), tmp_path / "pack"
        tensors = load_file(made / "model.safetensors")
        for name, value in edits.items():
            tensors[name][0, 0] = value
        save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
        out.mkdir()
        sections = {"model": {"source": "m"}, "quant": {"bits": 3, "group_size": 16}, "pack": section}
        recipe = Recipe.model_validate({**sections, "calibrate": {"data": [{"source": "./not-read.txt"}]}})
        source = StageDirectory(made, {"kind": "quantized"})
        pack.run(Job(recipe, source, out, tmp_path, RunLog(verbosity=-1), torch.device("cpu")))
        return out

    return pack_edited


@pytest.mark.parametrize(
    ("name", "value"),
    [(SCALE, 1e5), (SCALE, 1e-9), ("model.embed_tokens.weight", 1e6)],
    ids=["scale overflows", "scale becomes 0", "embedding overflows"],
)
def test_a_value_that_fp16_cannot_hold_is_not_published(packing: Callable[..., Path], name: str, value: float) -> None:
    with pytest.raises(VerificationError, match=f"{name} does not fit float16"):
        packing({name: value}, dtype="float16")


def test_scales_are_published_as_the_recipe_says(packing: Callable[..., Path], tmp_path: Path) -> None:
    """In fp32 they stay what they were, those that fp16 has not among them."""
    out = packing({SCALE: 1e-9}, scale_dtype="float32")
    before, after = (load_file(path / "model.safetensors") for path in (tmp_path / "block-ap", out))
    scales = [name for name in before if name.endswith(".weight_scale")]
    assert scales
    assert all(torch.equal(before[name], after[name]) for name in scales)
    assert json.loads((out / "config.json").read_text())["quantization_config"]["scale_dtype"] == "float32"
