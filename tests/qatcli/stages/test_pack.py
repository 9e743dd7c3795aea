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


def test_a_scale_that_fp16_cannot_hold_is_not_published(
    random_llama: Path, pack_model: Callable[..., Path], tmp_path: Path
) -> None:
    made, out = pack_model(random_llama, tmp_path / "block-ap"), tmp_path / "pack"
    tensors = load_file(made / "model.safetensors")
    name = next(name for name in tensors if name.endswith(".weight_scale"))
    tensors[name][0, 0] = 1e5
    save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
    out.mkdir()
    sections = {"model": {"source": "m"}, "quant": {"bits": 3, "group_size": 16}}
    recipe = Recipe.model_validate({**sections, "calibrate": {"data": [{"source": "./not-read.txt"}]}})
    source = StageDirectory(made, {"kind": "quantized"})
    with pytest.raises(VerificationError, match=f"{name} does not fit float16"):
        pack.run(Job(recipe, source, out, tmp_path, RunLog(verbosity=-1), torch.device("cpu")))
