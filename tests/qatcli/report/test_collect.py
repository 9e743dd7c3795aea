"""The facts of a run: finished, under way, stopped, damaged, and of no run at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qatcli.directory import locked
from qatcli.errors import InputError
from qatcli.report.collect import collect

Run = Callable[..., Path]


def stage(facts: dict[str, Any], name: str) -> dict[str, Any]:
    return next(one for one in facts["stages"] if one["name"] == name)


def test_a_finished_run(make_run: Run) -> None:
    facts = collect(make_run())
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert facts["run"]["name"] == "model/w2g64"
    assert facts["run"]["status"] == "finished"
    assert (facts["run"]["started"], facts["run"]["ended"]) == (100.0, 4030.0)
    assert [one["name"] for one in facts["stages"]] == ["calibrate", "block-ap", "e2e-qp", "pack", "eval"]
    assert facts["recipe"]["quant"]["bits"] == 2
    assert facts["problems"] == []
    assert facts["evaluation"]["models"]["quantized"]["perplexity"] == {"wiki": 20.25}
    (export,) = facts["exports"]
    assert (export["format"], export["bytes"], export["verified"]) == ("gptq", 2**21, True)


def test_blocks_and_layers(make_run: Run) -> None:
    facts = collect(make_run())
    assert [block["index"] for block in facts["blocks"]] == [0, 1, 2, 3]
    assert facts["blocks"][2]["before"] == 2.4
    assert facts["blocks"][2]["relative_error"] == pytest.approx((0.03 + 0.04) / 2)
    assert facts["blocks"][2]["validation"] == [2.3, 2.2]
    assert facts["blocks"][2]["relative_error_after"] == pytest.approx(2 * (0.03 + 0.04) / 2)
    assert len(facts["layers"]) == 8
    errors = {"relative_error": 0.03, "relative_error_after": 0.06}
    assert facts["layers"][3] == {"name": "model.layers.1.mlp.down_proj", "block": 1, **errors}


def test_layers_that_are_not_trained_yet(make_run: Run) -> None:
    facts = collect(make_run(blocks=1, at_work=True))
    assert [layer["relative_error_after"] for layer in facts["layers"]] == [0.02, 0.04, *[None] * 6]
    assert ["relative_error_after" in block for block in facts["blocks"]] == [True, False, False, False]


def test_the_time_of_a_run_is_that_of_its_stages(make_run: Run) -> None:
    facts = collect(make_run())
    assert [stage(facts, name)["sessions"] for name in ("calibrate", "block-ap")] == [1, 2]
    assert [stage(facts, name)["seconds"] for name in ("calibrate", "block-ap")] == [5.0, 50.0]
    assert facts["run"]["seconds"] == pytest.approx(5 + 50 + 5 + 1 + 20 + 2)


def test_updates_made_again_count_once_and_what_is_not_finite_is_null(make_run: Run) -> None:
    e2e = collect(make_run())["e2e_qp"]
    assert e2e["train"] == [[1, 0.9], [2, 0.7], [3, None]]
    assert e2e["held_out"] == [[0, 1.0], [3, 0.6]]
    assert (e2e["before"], e2e["after"]) == (1.0, 0.6)


def test_expectations(make_run: Run, metrics: dict[str, Any]) -> None:
    (one,) = collect(make_run(metrics))["expectations"]
    assert (one["metric"], one["measured"], one["limit"], one["passed"]) == ("wiki", 20.25, 20.5, True)


def test_expectations_that_were_edited_since(make_run: Run, metrics: dict[str, Any]) -> None:
    """They may change without a restart: the stage's own recipe has the old ones."""
    run = make_run(metrics)
    (run / "expect.json").write_text(json.dumps({"wiki": {"value": 1.0, "tolerance": 0.5}}))
    (one,) = collect(run)["expectations"]
    assert (one["passed"], one["limit"]) == (False, 1.5)
    (run / "expect.json").write_text("[")
    facts = collect(run)
    assert any("expect.json" in problem for problem in facts["problems"])
    assert facts["expectations"][0]["limit"] == 20.5


def test_nothing_is_expected_of_what_is_not_evaluated(make_run: Run) -> None:
    facts = collect(make_run(None))
    assert facts["expectations"] == []
    assert facts["run"]["status"] == "incomplete"
    assert stage(facts, "eval")["status"] == "waiting"


def test_a_stage_under_way(make_run: Run) -> None:
    facts = collect(make_run(blocks=3, at_work=True))
    assert facts["run"]["status"] == "running"
    block_ap = stage(facts, "block-ap")
    assert block_ap["status"] == "running"
    assert block_ap["progress"]["count"] == 2
    assert block_ap["progress"]["left"] == 30.0
    assert block_ap["peak_memory"] == {"host_bytes": 2**29 + 2}
    assert [block["index"] for block in facts["blocks"] if "after" in block] == [0, 1, 2]
    assert stage(facts, "e2e-qp")["status"] == "waiting"


def test_a_stage_whose_process_is_gone(make_run: Run) -> None:
    """Killed, on whichever machine: its lock is still there and nobody holds it."""
    facts = collect(make_run(blocks=3))
    assert facts["run"]["status"] == "stopped"
    assert stage(facts, "block-ap")["status"] == "stopped"


def test_the_baseline_of_an_evaluation_is_a_stage_with_a_recipe_of_its_own(make_run: Run) -> None:
    run = make_run(None)
    partial = run / "gptq" / "block-ap.partial"
    partial.mkdir(parents=True)
    start = {"time": 5000.0, "event": "start", "stage": "block-ap", "recipe": {"block_ap": {"epochs": 0}}}
    (partial / "log.jsonl").write_text(json.dumps(start) + "\n")
    with locked(run / "gptq" / "block-ap"):
        facts = collect(run)
    assert [row["name"] for row in facts["stages"]][-2:] == ["gptq/block-ap", "eval"]
    assert (facts["run"]["status"], stage(facts, "gptq/block-ap")["status"]) == ("running", "running")
    assert facts["recipe"]["block_ap"]["epochs"] == 2


def test_a_run_called_gptq_is_no_baseline_of_the_folder_that_it_is_in(make_run: Run, tmp_path: Path) -> None:
    run = make_run()
    run.rename(tmp_path / "gptq")
    with pytest.raises(InputError, match="is not a run directory") as caught:
        collect(tmp_path)
    assert str(tmp_path / "gptq") in (caught.value.hint or "")


def test_a_baseline_that_the_evaluation_did_without_stops_nothing(make_run: Run) -> None:
    run = make_run()
    (run / "gptq" / "block-ap.partial").mkdir(parents=True)
    facts = collect(run)
    assert facts["run"]["status"] == "finished"
    assert "gptq/block-ap" not in {row["name"] for row in facts["stages"]}


def test_between_two_stages_the_caller_says_that_the_run_goes_on(make_run: Run) -> None:
    assert collect(make_run(None), under_way=True)["run"]["status"] == "running"


def test_why_a_stage_stopped(make_run: Run) -> None:
    run = make_run(blocks=3)
    with open(run / "block-ap.partial" / "log.jsonl", "a") as log:
        log.write('{"time": 3760, "event": "stopped", "error": "DivergedError: not finite"}\n')
    assert stage(collect(run), "block-ap")["error"] == "DivergedError: not finite"


def test_a_half_written_last_line_is_no_problem(make_run: Run) -> None:
    run = make_run(blocks=3, at_work=True)
    with open(run / "block-ap.partial" / "log.jsonl", "a") as log:
        log.write('{"time": 3760, "event": "blo')
    facts = collect(run)
    assert facts["problems"] == []
    assert len([block for block in facts["blocks"] if "after" in block]) == 3


def test_what_cannot_be_read_is_a_problem_and_not_the_end(make_run: Run) -> None:
    run = make_run()
    (run / "pack" / "stage.json").write_text("{")
    log = run / "block-ap" / "log.jsonl"
    log.write_text("nonsense\n[]\n" + log.read_text())
    facts = collect(run)
    assert len(facts["problems"]) == 2
    assert "2 lines are no events" in facts["problems"][0]
    assert str(run / "pack" / "stage.json") in facts["problems"][1]
    assert len(facts["blocks"]) == 4


def test_an_evaluation_under_way_shows_the_models_measured_so_far(make_run: Run) -> None:
    run = make_run(None)
    (run / "eval.partial").mkdir()
    event = {"time": 5000.0, "event": "measured", "model": "full_precision", "perplexity": {"wiki": 15.0}}
    (run / "eval.partial" / "log.jsonl").write_text(json.dumps(event) + "\n")
    models = collect(run)["evaluation"]["models"]
    assert {name: model["perplexity"] for name, model in models.items()} == {"full_precision": {"wiki": 15.0}}


def test_no_run(make_run: Run, tmp_path: Path) -> None:
    run = make_run()
    (run / "tensorboard" / "calibrate").mkdir(parents=True)
    with pytest.raises(InputError, match="holds no stage") as caught:
        collect(tmp_path / "runs")
    assert caught.value.hint == f"runs below it: {run}"
    with pytest.raises(InputError, match="is not a directory"):
        collect(tmp_path / "nowhere")
