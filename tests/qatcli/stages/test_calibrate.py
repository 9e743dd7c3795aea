"""calibrate: what an interrupted run is continued with, and what its result says of itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qatcli.errors import InputError
from qatcli.recipe import Recipe
from qatcli.runlog import RunLog
from qatcli.stages import Job, calibrate


def _job(model: Path, text: Path, out: Path) -> Job:
    recipe = Recipe.model_validate(
        {
            "model": {"source": str(model)},
            "quant": {"bits": 2, "group_size": 16},
            "calibrate": {"data": [{"source": str(text)}], "samples": 4, "validation_samples": 2, "seq_len": 12},
        }
    )
    out.mkdir(exist_ok=True)
    return Job(recipe, None, out, out.parent, RunLog(out / "log.jsonl", verbosity=-1), torch.device("cpu"))


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def _scale_weights(model: Path, factor: float) -> None:
    tensors = load_file(model / "model.safetensors")
    save_file({name: tensor * factor for name, tensor in tensors.items()}, model / "model.safetensors")


def test_an_interrupted_run_is_not_continued_with_another_model(
    model: Path, tiny_llama: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, saved = calibrate.save_block, []

    def interrupted(*arguments: Any, **options: Any) -> None:
        if saved:
            raise KeyboardInterrupt
        saved.append(save(*arguments, **options))

    monkeypatch.setattr(calibrate, "save_block", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibrate.run(_job(model, tiny_text, tmp_path / "out"))
    monkeypatch.undo()
    _scale_weights(model, 3.0)
    with pytest.raises(InputError, match="is not the one that the unfinished run") as caught:
        calibrate.run(_job(model, tiny_text, tmp_path / "out"))
    assert "--restart" in str(caught.value.hint)
    shutil.copytree(tiny_llama, model, dirs_exist_ok=True)
    kept = tmp_path / "out" / "model-block-0000.safetensors"
    before = kept.stat().st_mtime_ns
    calibrate.run(_job(model, tiny_text, tmp_path / "out"))
    assert kept.stat().st_mtime_ns == before, "not made again"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_model_that_does_not_name_its_dtype_keeps_it(
    model: Path, tiny_text: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    tensors = load_file(model / "model.safetensors")
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, model / "model.safetensors")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({k: v for k, v in config.items() if "dtype" not in k}))
    calibrate.run(_job(model, tiny_text, tmp_path / "out"))
    made = json.loads((tmp_path / "out" / "config.json").read_text())
    assert made["dtype"] == str(dtype).removeprefix("torch.")


def test_data_of_a_later_stage_are_looked_at_first(
    tiny_llama: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections = {"model": {"source": str(tiny_llama)}, "quant": {"bits": 2, "group_size": 32}}
    sections |= {"calibrate": {"data": [{"source": str(tiny_text)}]}}
    sections |= {"e2e_qp": {"data": [{"source": str(tmp_path / "gone.jsonl")}]}}
    job = Job(Recipe.model_validate(sections), None, tmp_path, tmp_path, RunLog(verbosity=-1), torch.device("cpu"))
    monkeypatch.setattr(calibrate, "sample_windows", lambda *_, **__: pytest.fail("sampled"))
    with pytest.raises(InputError, match=r"gone\.jsonl"):
        calibrate.run(job)
