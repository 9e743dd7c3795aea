"""The chain of `qat run`, before it begins; what it does is in tests/test_pipeline.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qatcli import chain
from qatcli.directory import BASELINE, CHAIN, StageDirectory, begin, commit
from qatcli.errors import InputError, RecipeError, ResourceError, UsageError
from qatcli.recipe import Recipe

METRICS: dict[str, Any] = {"models": {}, "protocol": {}, "size": {"bits_per_weight": 2.5, "bits_per_parameter": 4.0}}
FACTS: dict[str, Any] = {
    "stage": "any",
    "kind": "any",
    "identity": {},
    "recipe": {},
    "metrics": METRICS,
    "seconds": 1.0,
    "peak_memory": {},
}


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


@pytest.fixture
def recipe(tiny_llama: Path, tiny_text: Path, tmp_path: Path) -> Path:
    text = {"name": "tiny", "source": str(tiny_text), "seq_len": 32, "windows": 4}
    sections = {
        "model": {"source": str(tiny_llama)},
        "quant": {"bits": 2, "group_size": 32},
        "calibrate": {"data": [{"source": str(tiny_text)}], "samples": 4, "validation_samples": 1, "seq_len": 32},
        "block_ap": {"batch_size": 4},
        "e2e_qp": {"samples": 4, "batch_size": 4, "micro_batch_size": 4, "seq_len": 32},
        "eval": {"perplexity": [text]},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(sections))
    return tmp_path / "recipe.yaml"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("eval.perplexity.0.windows=100000", "not 100000"),
        ("eval.zero_shot={tasks: [piqa], data: .}", "piqa_val.jsonl does not exist"),
        ("eval.perplexity.0={name: w, source: wikitext2}", "wikitext"),
    ],
)
def test_what_the_evaluation_lacks_is_said_before_the_training(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, override: str, message: str
) -> None:
    monkeypatch.setattr(chain, "run_stage", lambda *_, **__: pytest.fail("begun"))
    with pytest.raises(InputError, match=message):
        chain.run_all(recipe, [override], run_dir=recipe.parent / "run", restart=False, device="cpu", verbosity=-1)


def test_a_format_that_cannot_hold_the_model_is_said_before_the_training(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chain, "run_stage", lambda *_, **__: pytest.fail("begun"))
    options: dict[str, Any] = {"run_dir": recipe.parent / "run", "restart": False, "device": "cpu", "verbosity": -1}
    with pytest.raises(RecipeError, match=r"export\.formats: awq will be refused: ") as caught:
        chain.run_all(recipe, ["quant.bits=4", "quant.group_size=-1", "export.formats=[native, awq]"], **options)
    assert "take awq out of export.formats, or " in (caught.value.hint or "")


def test_a_baseline_that_has_no_room_is_said_before_the_training(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def require(given: Recipe, stage: str, _variant: str, **_: Any) -> None:
        if given.block_ap.rounding == "gptq":
            raise ResourceError("too little memory")

    monkeypatch.setattr("qatcli.plan.require", require)
    monkeypatch.setattr(chain, "run_stage", lambda *_, **__: pytest.fail("begun"))
    options: dict[str, Any] = {"run_dir": recipe.parent / "run", "restart": False, "device": "cpu", "verbosity": -1}
    with pytest.raises(ResourceError, match="the baseline gptq of the evaluation: too little") as caught:
        chain.run_all(recipe, ["eval.baselines=[gptq]"], **options)
    assert "eval.baselines" in (caught.value.hint or "")


def test_a_restart_that_is_refused_replaces_nothing_later(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    for name in CHAIN:
        commit(run / name, begin(run / name, {}, restart=False), FACTS)
    monkeypatch.setattr(chain, "run_stage", lambda *_, **__: pytest.fail("begun"))
    options: dict[str, Any] = {"run_dir": run, "restart": True, "device": "cpu", "verbosity": -1}
    with pytest.raises(InputError, match="not 100000"):
        chain.run_all(recipe, ["eval.perplexity.0.windows=100000"], **options)
    assert not (run / chain.RESTART).exists()


def test_a_restart_gets_past_a_damaged_stage(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    for name in CHAIN:
        commit(run / name, begin(run / name, {}, restart=False), FACTS)
    (run / "eval" / "stage.json").write_text("")
    monkeypatch.setattr(chain, "run_stage", lambda name, *_, **__: StageDirectory(run / name, FACTS))
    chain.run_all(recipe, [], run_dir=run, restart=True, device="cpu", verbosity=-1)


def test_an_interrupted_restart_replaces_the_baseline_that_it_did_not_reach(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, made = tmp_path / "run", []
    for name in (*CHAIN, BASELINE):
        commit(run / name, begin(run / name, {}, restart=False), FACTS)

    def run_stage(name: str, _recipe: Recipe, run_dir: Path, *, outdated: bool, **_: Any) -> StageDirectory:
        made.append((str((run_dir / name).relative_to(run)), outdated))
        if len(made) == 1:
            raise KeyboardInterrupt
        return StageDirectory(run_dir / name, FACTS)

    monkeypatch.setattr(chain, "run_stage", run_stage)
    options: dict[str, Any] = {"run_dir": run, "device": "cpu", "verbosity": -1}
    with pytest.raises(KeyboardInterrupt):
        chain.run_all(recipe, ["eval.baselines=[gptq]"], restart=True, **options)
    made[:] = [("interrupted", False)]
    chain.run_all(recipe, ["eval.baselines=[gptq]"], restart=False, **options)
    assert made[1:] == [(name, True) for name in (*CHAIN[:-1], BASELINE, CHAIN[-1])]


def test_an_input_may_be_in_the_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert chain._given_source("~/run/block-ap") == Path("/home/somebody/run/block-ap")
    assert chain._given_source("~nobody-at-all/run") == Path("~nobody-at-all/run")


@pytest.mark.parametrize("device", ["cudafoo", "cuda:-1", "tpu"])
def test_a_device_that_is_none_is_not_planned_for(recipe: Path, device: str) -> None:
    with pytest.raises(UsageError, match=r"is not (a device|supported)"):
        chain.run_plan(recipe, [], run_dir=None, device=device)


def test_a_stage_is_described_by_what_it_holds(tmp_path: Path) -> None:
    """Not by its recipe: that of a `pack --from` may have other bits."""
    partial = begin(tmp_path / "pack", {}, restart=False)
    quantization = {"bits": 3, "group_size": -1}
    (partial / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    facts = {"stage": "pack", "kind": "packed", "identity": {}, "metrics": {}, "input": "x", "seconds": 1.0}
    commit(tmp_path / "pack", partial, facts | {"recipe": {"quant": {"bits": 4, "group_size": 16}}})
    assert "bits: 3, group size: -1" in chain.describe(tmp_path / "pack", as_json=False)
