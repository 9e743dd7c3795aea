"""What a stage is made from: its predecessor's directory, finished and of the same recipe."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qatcli.directory import LOG_FILE, StageDirectory, begin, commit
from qatcli.errors import InputError
from qatcli.events import read_log
from qatcli.machine import device_name
from qatcli.packed import PackedCheckpoint
from qatcli.recipe import Recipe
from qatcli.runlog import RunLog
from qatcli.stages import STAGES, Job, Stage, _identity, _open_input, _refuse_another_recipe, _run
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


DEPENDS = {
    "calibrate": ("model", "quant", "calibrate", "block_ap.amp"),
    "block-ap": ("model", "quant", "block_ap", "calibrate.seed", "calibrate.moment_samples"),
    "e2e-qp": ("model", "calibrate", "e2e_qp"),
    "pack": ("pack",),
    "export": ("export",),
    "eval": ("model", "quant", "eval"),
}
FREE = {
    *("block_ap.cache", "export.formats", "eval.cache"),
    *("e2e_qp.micro_batch_size", "e2e_qp.gradient_checkpointing"),
}


@pytest.mark.parametrize("stage", DEPENDS)
def test_every_key_that_a_result_depends_on_makes_another_one(stage: str) -> None:
    """A key that was forgotten would give the old result for an edited recipe, without a word."""
    dumped = build().model_dump(mode="json")

    def identity(recipe: dict[str, Any]) -> dict[str, Any]:
        edited: Any = SimpleNamespace(model_dump=lambda **_: recipe)
        return _identity(STAGES[stage], edited, None)

    binding = set()
    for section, keys in dumped.items():
        for key in keys if isinstance(keys, dict) else ():
            edited = {**dumped, section: {**keys, key: "edited"}}
            if identity(edited) != identity(dumped):
                binding.add(f"{section}.{key}")
    sections = {f"{each}.{key}" for each in DEPENDS[stage] if "." not in each for key in dumped[each]}
    assert binding == (sections | {each for each in DEPENDS[stage] if "." in each}) - FREE


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


def test_a_folder_named_like_what_the_hub_has_is_no_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "c4").mkdir()
    (tmp_path / "c4" / "text.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    recipe = build(eval={"perplexity": [{"name": "t", "source": "c4"}]})
    assert _identity(STAGES["eval"], recipe, None)["content"] == {}


def test_a_file_that_was_edited_is_another_input(tmp_path: Path) -> None:
    """Its path is the same: the old result must not be taken for one of the new text, or of the new weights."""
    text, model, tasks = tmp_path / "text.jsonl", tmp_path / "model", tmp_path / "tasks"
    for folder in (model, tasks):
        folder.mkdir()
    (model / "model.safetensors").write_text("weights")
    (tasks / "piqa.jsonl").write_text("a task")
    text.write_text("a text")
    measured = [{"name": "t", "source": str(text)}, {"name": "w", "source": "wikitext2", "file": str(text)}]
    texts = {
        "calibrate": {"data": [{"source": str(text)}]},
        "eval": {"perplexity": measured, "zero_shot": {"data": str(tasks)}},
    }
    recipe = build(model={"source": str(model)}, **texts)
    read = {
        "calibrate": {"model.source", "calibrate.data.0.source"},
        "block-ap": {"model.source"},
        "pack": set(),
        "eval": {"model.source", "eval.perplexity.0.source", "eval.perplexity.1.file", "eval.zero_shot.data"},
    }

    def contents() -> dict[str, dict[str, str]]:
        return {name: _identity(STAGES[name], recipe, None)["content"] for name in read}

    before = contents()
    assert {name: set(found) for name, found in before.items()} == read
    text.write_text("b text")
    (model / "model.safetensors").write_text("Weights")
    (tasks / "piqa.jsonl").write_text("b task")
    for name, found in contents().items():
        assert {place for place, digest in found.items() if digest != before[name][place]} == read[name]


def test_every_stage_knows_the_model_at_the_start_of_its_chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By which those that read it again refuse another one."""
    monkeypatch.setitem(sys.modules, "qatcli.stages.fake", SimpleNamespace(run=lambda job: {}))  # type: ignore[arg-type]
    given = None
    for name, metrics in (("calibrate", {"model_fingerprint": "abc"}), ("block-ap", {}), ("e2e-qp", {}), ("pack", {})):
        monkeypatch.setattr(sys.modules["qatcli.stages.fake"], "run", lambda job, metrics=metrics: metrics)
        path = tmp_path / name
        partial = begin(path, {}, restart=False)
        (partial / "file").touch()
        job = Job(build(), given, partial, tmp_path, RunLog(verbosity=-1), torch.device("cpu"))
        given = _run(name, Stage("fake", (), (), "packed", ()), job, path, {})
        assert given.facts["model_fingerprint"] == "abc"


def test_a_stage_that_goes_on_with_other_libraries_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "qatcli.stages.fake", SimpleNamespace(run=lambda job: {}))  # type: ignore[arg-type]
    path = tmp_path / "block-ap"
    job = Job(build(), None, begin(path, {}, restart=False), tmp_path, RunLog(), torch.device("cpu"))
    (job.out / "file").touch()
    (job.out / LOG_FILE).write_text('{"time": 1, "event": "start", "versions": {"torch": "1.0", "triton": null}}\n')
    facts = _run("block-ap", Stage("fake", (), (), "packed", ()), job, path, {}).facts
    assert "block-ap: worked on with torch 1.0 before: " in capsys.readouterr().err
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["machine"].startswith(device_name(job.device))
    log = read_log(path, [])
    assert log.versions == facts["versions"]
    assert len(log.warnings) == 1


def finish(run_dir: Path, stage: str, given: StageDirectory | None) -> StageDirectory:
    partial = begin(run_dir / stage, {}, restart=True)
    (partial / "x").write_text(str(given and given.digest))
    identity = {"input": given and given.digest, "time": time.monotonic_ns()}
    facts = {
        "stage": stage,
        "kind": "quantized",
        "identity": identity,
        "input": given and str(given.path),
        "metrics": {},
    }
    return commit(run_dir / stage, partial, facts | {"recipe": build().model_dump(mode="json")})


def test_a_stage_whose_input_is_replaced_meanwhile_is_not_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would mix tensors of both."""
    given = finish(tmp_path / "other", "block-ap", None)

    def run(job: Job) -> dict[str, Any]:
        (job.out / "file").touch()
        finish(tmp_path / "other", "block-ap", None)
        return {}

    monkeypatch.setitem(sys.modules, "qatcli.stages.fake", SimpleNamespace(run=run))  # type: ignore[arg-type]
    path = tmp_path / "e2e-qp"
    job = Job(build(), given, begin(path, {}, restart=False), tmp_path, RunLog(verbosity=-1), torch.device("cpu"))
    with pytest.raises(InputError, match="was made again while this stage read it"):
        _run("e2e-qp", Stage("fake", (), (), "packed", ()), job, path, {})
    assert not path.exists()


def test_a_stage_is_not_read_whose_own_input_was_made_again(tmp_path: Path) -> None:
    """Else `pack` would publish what was trained from a calibration that is gone."""
    first = finish(tmp_path, "calibrate", None)
    second = finish(tmp_path, "block-ap", first)
    third = finish(tmp_path, "e2e-qp", second)
    assert _open_input(STAGES["pack"], build(), tmp_path, None) == third
    finish(tmp_path, "calibrate", None)
    with pytest.raises(InputError, match="block-ap was made from a calibrate that has been made again") as caught:
        _open_input(STAGES["pack"], build(), tmp_path, None)
    assert "qat block-ap --restart" in (caught.value.hint or "")
    assert _open_input(STAGES["pack"], build(), tmp_path, third.path) == third, "given with --from it is meant"
