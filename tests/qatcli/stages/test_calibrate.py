"""calibrate: what an interrupted run is continued with, and what its result says of itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qatcli.data import load_windows
from qatcli.errors import DivergedError, InputError
from qatcli.grid import initial_grid
from qatcli.packed import PackedCheckpoint
from qatcli.recipe import Recipe
from qatcli.runlog import RunLog
from qatcli.stages import Job, calibrate


def _job(model: Path, text: Path, out: Path, *, method: str = "qat", seed: int = 2, **quant: Any) -> Job:
    sampled = {"samples": 4, "validation_samples": 2, "seq_len": 12, "seed": seed}
    recipe = Recipe.model_validate(
        {
            "method": method,
            "model": {"source": str(model)},
            "quant": {"bits": 2, "group_size": 16, **quant},
            "calibrate": {"data": [{"source": str(text)}], **sampled},
            "block_ap": {"amp": "float32"},
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


def test_weights_that_are_not_finite_are_refused(model: Path, tiny_text: Path, tmp_path: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.1.mlp.down_proj.weight"))
    tensors[name][3, 2] = float("nan")
    save_file(tensors, model / "model.safetensors")
    with pytest.raises((InputError, DivergedError), match="not finite"):
        calibrate.run(_job(model, tiny_text, tmp_path / "out"))


def test_a_linear_whose_weight_the_model_uses_by_itself_is_refused(
    model: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mamba's dt_proj: what stands in for it in training would not be asked."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        up = x @ self.up_proj.weight.T
        return self.down_proj(self.act_fn(self.gate_proj(x)) * up)

    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaMLP.forward", forward)
    with pytest.raises(InputError, match="up_proj is not called as a linear") as caught:
        calibrate.run(_job(model, tiny_text, tmp_path / "out"))
    assert "quant.skip" in (caught.value.hint or "")


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


# The grids, against a search of our own on what each linear of the first block receives.


def _received(model: Path, tokens: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """The weight of every linear of the first block, and the mean square of each of its inputs."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Linear, arguments: tuple[Tensor, ...]) -> None:
            found[name] = module.weight.detach(), arguments[0].detach().flatten(0, -2).square().mean(0)

        return hook

    for name, module in loaded.model.layers[0].named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(keep(f"model.layers.0.{name}"))
    with torch.no_grad():
        loaded(input_ids=tokens.long(), use_cache=False)
    return found


def _errors(weight: Tensor, moment: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Of every group of 16 at 2 bits, its squared error weighted by the moments of its inputs."""
    groups, s, z = weight.unflatten(-1, (-1, 16)), scale[..., None], zero_point[..., None].float()
    codes = ((groups / s).round() + z).clamp(0, 3)
    return (((codes - z) * s - groups).square() * moment.unflatten(-1, (-1, 16))).sum(-1)


@pytest.mark.parametrize(("method", "search"), [("qat", "weighted"), ("efficientqat", "minmax")])
def test_grids_are_those_of_the_search_on_the_training_windows(
    tiny_llama: Path, tiny_text: Path, tmp_path: Path, method: str, search: Any
) -> None:
    job = _job(tiny_llama, tiny_text, tmp_path / "out", method=method)
    calibrate.run(job)
    checkpoint, zero_points = PackedCheckpoint.open(job.out), job.recipe.quant.zero_points
    train, _ = load_windows(job.out)
    ignored = 0
    for name, (weight, moment) in _received(tiny_llama, train.tokens).items():
        found = checkpoint.linear(name)
        grid = {"bits": 2, "group_size": 16, "zero_points": zero_points}
        scale, zero_point = initial_grid(weight, **grid, method=search, moment=moment)
        torch.testing.assert_close(found.scale, scale, rtol=1e-3, atol=0)
        # Other scales and zero points may serve a group equally well, to the last digit; which are taken is rounding.
        made, best = (_errors(weight, moment, *each) for each in ((found.scale, found.zero_point), (scale, zero_point)))
        torch.testing.assert_close(made, best, rtol=1e-5, atol=0)
        assert (found.zero_point == zero_point).float().mean() > 0.99
        ignored += torch.allclose(scale, initial_grid(weight, **grid, method="mse")[0], rtol=1e-4)
    assert ignored == 0, "or the moments would not matter to this test"


@pytest.mark.parametrize(("allowed", "values"), [("central", {1, 2}), ("middle", {2}), ("any", {0, 1, 2, 3})])
def test_zero_points_are_those_that_the_recipe_allows(
    tiny_llama: Path, tiny_text: Path, tmp_path: Path, allowed: str, values: set[int]
) -> None:
    job = _job(tiny_llama, tiny_text, tmp_path / "out", zero_points=allowed)
    calibrate.run(job)
    checkpoint = PackedCheckpoint.open(job.out)
    found = {int(z) for name in checkpoint.modules for z in checkpoint.linear(name).zero_point.unique()}
    assert found <= values
    assert len(found) == len(values) or allowed == "any"
    assert checkpoint.config["quantization_config"]["symmetric"] is (allowed == "middle")


def test_linears_have_the_bits_and_groups_of_their_overrides(tiny_llama: Path, tiny_text: Path, tmp_path: Path) -> None:
    overrides = [{"pattern": "*.down_proj", "bits": 4}, {"pattern": "*.layers.1.*.k_proj", "group_size": 32}]
    job = _job(tiny_llama, tiny_text, tmp_path / "out", overrides=overrides, skip=["*.layers.2.*.q_proj"])
    calibrate.run(job)
    checkpoint = PackedCheckpoint.open(job.out)
    assert len(checkpoint.modules) == 20
    assert "model.layers.2.self_attn.q_proj" not in checkpoint.modules
    for name, quant in checkpoint.modules.items():
        bits, group = 4 if "down_proj" in name else 2, 32 if name.endswith("1.self_attn.k_proj") else 16
        assert quant.kind == (bits, group)
        linear = checkpoint.linear(name)
        assert linear.scale.shape[1] == quant.in_features // group
        assert int(linear.codes.max()) == 2**bits - 1


def test_the_seed_chooses_the_windows(tiny_llama: Path, tiny_text: Path, tmp_path: Path) -> None:
    tokens = []
    for number, seed in enumerate((2, 2, 3)):
        job = _job(tiny_llama, tiny_text, tmp_path / str(number), seed=seed)
        calibrate.run(job)
        tokens.append(load_windows(job.out)[0].tokens)
    assert torch.equal(tokens[0], tokens[1])
    assert not torch.equal(tokens[0], tokens[2])
