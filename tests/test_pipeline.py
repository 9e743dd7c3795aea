"""The whole chain through the real command, on a tiny Llama: files, streams, exit codes, resume."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "recipes" / "smoke" / "w2g32.yaml"
TIMEOUT = 600  # seconds until a process that a test waits for counts as stuck
LONG = ("--set", "block_ap.epochs=2000")  # a stage that cannot be over before a test has done with it
QUANTIZED_FILES = {
    "config.json",
    "generation_config.json",
    "log.jsonl",
    "model-block-0000.safetensors",
    "model-block-0001.safetensors",
    "model-block-0002.safetensors",
    "model-outside-blocks.safetensors",
    "model.safetensors.index.json",
    "stage.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


def qat(*arguments: str | Path, env: dict[str, str], stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qatcli", *map(str, arguments)]
    return subprocess.run(command, env=env, input=stdin, capture_output=True, text=True, timeout=TIMEOUT, check=False)


@pytest.fixture(scope="session")
def smoke_env(tiny_llama: Path, tiny_text: Path) -> dict[str, str]:
    return {**os.environ, "QAT_SMOKE_MODEL": str(tiny_llama), "QAT_SMOKE_TEXT": str(tiny_text), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def finished_run(smoke_env: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A finished `qat run` and the JSON object it printed."""
    run = tmp_path_factory.mktemp("runs") / "smoke"
    done = qat("run", RECIPE, "--run", run, "--json", env=smoke_env)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1, "stdout carries data only"
    assert "\x1b" not in done.stderr, "no control characters where there is no terminal"
    return run, json.loads(done.stdout)


def test_run_reports_every_figure(finished_run: tuple[Path, dict]) -> None:
    _, result = finished_run
    assert result["bits"] == 2
    assert result["group_size"] == 32
    assert set(result["ppl"]) == {"full_precision", "round_to_nearest", "block_ap", "quantized"}
    assert set(result["seconds"]) == {"calibrate", "block-ap", "e2e-qp", "pack", "eval"}
    assert 2.0 < result["bits_per_weight"] < 3.0
    assert result["ppl"]["full_precision"] < result["ppl"]["quantized"] < result["ppl"]["round_to_nearest"]


def test_the_chain_learns_as_much_as_ever(finished_run: tuple[Path, dict]) -> None:
    """Golden numbers, of x86 with AVX2 and AVX-512, which are 3 % apart behind the first block, as codes flip."""
    run, result = finished_run
    trained, tuned = (json.loads((run / name / "stage.json").read_text())["metrics"] for name in ("block-ap", "e2e-qp"))
    before, after = ([block[key] for block in trained["blocks"]] for key in ("before", "after"))
    assert before[0] == pytest.approx(0.2091, rel=0.01)
    assert before == pytest.approx([0.2091, 0.1836, 0.1489], rel=0.05)
    assert [b / a for a, b in zip(before, after, strict=True)] == pytest.approx([0.635, 0.634, 0.662], abs=0.05)
    assert tuned["before"] == pytest.approx(0.0936, rel=0.05)
    assert tuned["after"] / tuned["before"] == pytest.approx(0.879, abs=0.03)
    expected = {"full_precision": 1.593, "round_to_nearest": 3.168, "block_ap": 1.731, "quantized": 1.705}
    assert result["ppl"] == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(
    ("stage", "files"),
    [
        ("calibrate", QUANTIZED_FILES | {"windows.safetensors", "data.json", "layer-errors.json"}),
        ("block-ap", QUANTIZED_FILES),
        ("e2e-qp", QUANTIZED_FILES | {"windows.safetensors", "data.json"}),
        (
            "pack",
            {"config.json", "generation_config.json", "log.jsonl", "model.safetensors", "stage.json", "tokenizer.json"}
            | {"tokenizer_config.json"},
        ),
        ("eval", {"eval.json", "log.jsonl", "stage.json"}),
    ],
)
def test_stage_directory_holds_exactly_its_files(finished_run: tuple[Path, dict], stage: str, files: set[str]) -> None:
    run, _ = finished_run
    assert {str(file.relative_to(run / stage)) for file in (run / stage).rglob("*") if file.is_file()} == files


def test_run_leaves_its_report(finished_run: tuple[Path, dict]) -> None:
    run, result = finished_run
    assert result["report"] == str(run / "report.html")
    facts = json.loads((run / "report.json").read_text())
    assert facts["run"]["status"] == "finished"
    assert [stage["status"] for stage in facts["stages"]] == ["finished"] * 5
    assert len(facts["blocks"]) == 3
    figures = {"relative_error", "relative_error_after", "before", "after", "seconds"}
    assert all(figures <= set(block) for block in facts["blocks"])
    assert len(facts["layers"]) == 21
    assert len(facts["e2e_qp"]["train"]) == 16
    page = (run / "report.html").read_text()
    assert page.count("<svg") > 5
    assert 'http-equiv="refresh"' not in page


def test_a_figure_that_is_expected_and_missed(smoke_env: dict[str, str], finished_run: tuple[Path, dict]) -> None:
    run, _ = finished_run
    reached = qat("eval", RECIPE, "--run", run, "--set", "expect={tiny: {value: 1000}}", env=smoke_env)
    assert reached.returncode == 0, reached.stderr
    missed = qat("eval", RECIPE, "--run", run, "--set", "expect={tiny: {value: 1.0, tolerance: 0.1}}", env=smoke_env)
    assert missed.returncode == 4
    assert missed.stdout == reached.stdout == f"{run}/eval\n"
    assert "error: the recipe expects more: tiny is " in missed.stderr


def test_quantizers_without_training_are_baselines(
    smoke_env: dict[str, str], finished_run: tuple[Path, dict], tmp_path: Path
) -> None:
    run = shutil.copytree(finished_run[0], tmp_path / "run")
    command = ["eval", RECIPE, "--run", run, "--set", "eval.baselines=[calibrate,gptq]", "--restart", "--json"]
    done = qat(*command, env=smoke_env)
    assert done.returncode == 0, done.stderr
    models = json.loads(done.stdout)["metrics"]["models"]
    assert list(models) == ["calibrate", "gptq", "quantized"]
    perplexities = {name: found["perplexity"]["tiny"] for name, found in models.items()}
    assert perplexities["gptq"] < perplexities["calibrate"]
    made_by = json.loads((run / "gptq" / "block-ap" / "stage.json").read_text())["recipe"]["block_ap"]
    assert (made_by["epochs"], made_by["rounding"]) == (0, "gptq")
    again = qat(*command[:-2], "--json", env=smoke_env)
    assert again.returncode == 0, again.stderr
    assert f"block-ap: already finished in {run / 'gptq'}" in again.stderr


def test_codes_survive_training_of_scales(finished_run: tuple[Path, dict]) -> None:
    run, _ = finished_run
    before = load_file(run / "block-ap" / "model-block-0001.safetensors")
    after = load_file(run / "e2e-qp" / "model-block-0001.safetensors")
    codes = [name for name in before if name.endswith((".weight_packed", ".weight_zero_point"))]
    scales = [name for name in before if name.endswith(".weight_scale")]
    assert len(codes) == 14
    assert all(torch.equal(before[name], after[name]) for name in codes)
    assert any(not torch.equal(before[name], after[name]) for name in scales)


def test_packed_checkpoint_loads_in_plain_transformers(finished_run: tuple[Path, dict]) -> None:
    """Logits equal those of the end-to-end stage's model once its scales, norms and embeddings are rounded to fp16."""
    run, _ = finished_run
    script = """
import sys, torch, qatcli
from transformers import AutoModelForCausalLM, AutoTokenizer
trained, packed = (AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32).eval() for p in sys.argv[1:])
for parameter in trained.parameters():
    if parameter.is_floating_point():
        parameter.data = parameter.data.half().float()
tokens = torch.arange(1, 60)[None]
with torch.no_grad():
    a, b = trained(tokens).logits, packed(tokens).logits
print((a - b).abs().max().item() / a.abs().max().item())
tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
print(len(packed.generate(**tokenizer("the cat", return_tensors="pt"), max_new_tokens=5, do_sample=False)[0]))
"""
    command = [sys.executable, "-c", script, str(run / "e2e-qp"), str(run / "pack")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=True)
    difference, generated = done.stdout.split()
    assert float(difference) < 1e-5
    assert int(generated) > 5


def test_stages_chain_through_pipes(smoke_env: dict[str, str], finished_run: tuple[Path, dict], tmp_path: Path) -> None:
    """`qat calibrate | qat block-ap --from -` in another run directory gives the bits of `qat run`."""
    run, _ = finished_run
    first = qat("calibrate", RECIPE, "--run", tmp_path / "a", "-q", env=smoke_env)
    assert first.returncode == 0, first.stderr
    assert first.stderr == ""
    second = qat("block-ap", RECIPE, "--run", tmp_path / "b", "--from", "-", env=smoke_env, stdin=first.stdout)
    assert second.returncode == 0, second.stderr
    assert Path(second.stdout.strip()) == tmp_path / "b" / "block-ap"
    assert _digests(tmp_path / "b" / "block-ap") == _digests(run / "block-ap")


def test_killed_stages_resume_to_the_same_bits(
    smoke_env: dict[str, str], finished_run: tuple[Path, dict], tmp_path: Path
) -> None:
    run, _ = finished_run
    mine = tmp_path / "run"
    shutil.copytree(run / "calibrate", mine / "calibrate")
    for stage, killed_after in (("block-ap", "model-block-0000.safetensors"), ("e2e-qp", "resume.safetensors")):
        _kill_after_writing(killed_after, stage, mine, smoke_env)
        assert not (mine / stage).exists()
        kept = (mine / f"{stage}.partial" / killed_after).stat()
        _add_an_earlier_sitting(mine / f"{stage}.partial", seconds=1000)
        resumed = qat(stage, RECIPE, "--run", mine, env=smoke_env)
        assert resumed.returncode == 0, resumed.stderr
        assert _digests(mine / stage) == _digests(run / stage)
        assert 1000 < json.loads((mine / stage / "stage.json").read_text())["seconds"] < 2000
        if stage == "block-ap":  # the finished block was not trained again
            assert (mine / stage / killed_after).stat().st_mtime_ns == kept.st_mtime_ns


def _add_an_earlier_sitting(partial: Path, *, seconds: int) -> None:
    log = partial / "log.jsonl"
    events = [{"time": 0, "event": "start"}, {"time": seconds, "event": "progress"}]
    log.write_text("".join(json.dumps(event) + "\n" for event in events) + log.read_text())


def test_finished_stage_is_not_run_again(smoke_env: dict[str, str], finished_run: tuple[Path, dict]) -> None:
    run, _ = finished_run
    before = (run / "pack" / "stage.json").stat().st_mtime_ns
    again = qat("pack", RECIPE, "--run", run, env=smoke_env)
    assert again.returncode == 0
    assert again.stdout.strip() == str(run / "pack")
    assert "already finished" in again.stderr
    assert (run / "pack" / "stage.json").stat().st_mtime_ns == before


def test_other_settings_are_refused_by_name(smoke_env: dict[str, str], finished_run: tuple[Path, dict]) -> None:
    run, _ = finished_run
    before = _digests(run / "block-ap")
    refused = qat("block-ap", RECIPE, "--run", run, "--set", "block_ap.epochs=1", env=smoke_env)
    assert refused.returncode == 3
    assert "block_ap.epochs: was 2, is 1" in refused.stderr
    assert "--restart" in refused.stderr
    assert _digests(run / "block-ap") == before


def test_missing_input_names_the_command(smoke_env: dict[str, str], tmp_path: Path) -> None:
    missing = qat("block-ap", RECIPE, "--run", tmp_path / "empty", env=smoke_env)
    assert missing.returncode == 3
    assert "hint: run `qat calibrate`" in missing.stderr
    assert missing.stdout == ""


def test_flipped_bit_is_refused(smoke_env: dict[str, str], finished_run: tuple[Path, dict], tmp_path: Path) -> None:
    run, _ = finished_run
    shutil.copytree(run / "e2e-qp", tmp_path / "e2e-qp")
    file = tmp_path / "e2e-qp" / "model-block-0001.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.unlink()
    file.write_bytes(content)
    assert qat("inspect", tmp_path / "e2e-qp", env=smoke_env).returncode == 3
    refused = qat("pack", RECIPE, "--run", tmp_path, env=smoke_env)
    assert refused.returncode == 3
    assert "model-block-0001.safetensors is damaged" in refused.stderr
    assert not (tmp_path / "pack").exists()


def test_inspect_describes_a_stage(smoke_env: dict[str, str], finished_run: tuple[Path, dict]) -> None:
    run, _ = finished_run
    done = qat("inspect", run / "pack", "--json", env=smoke_env)
    assert done.returncode == 0
    facts = json.loads(done.stdout)
    assert facts["kind"] == "packed"
    assert facts["verified"] is True
    assert facts["recipe"]["quant"]["bits"] == 2


def test_second_process_is_refused(smoke_env: dict[str, str], finished_run: tuple[Path, dict], tmp_path: Path) -> None:
    run, _ = finished_run
    shutil.copytree(run / "calibrate", tmp_path / "calibrate")
    first = _start("block-ap", tmp_path, smoke_env, LONG)
    try:
        _wait(lambda: (tmp_path / "block-ap.partial").is_dir(), first)  # the lock comes before it
        second = qat("block-ap", RECIPE, "--run", tmp_path, env=smoke_env)
    finally:
        first.kill()
        first.wait()
    assert second.returncode == 2
    assert f"process {first.pid}" in second.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_says_how_to_continue(
    smoke_env: dict[str, str], finished_run: tuple[Path, dict], tmp_path: Path, number: signal.Signals
) -> None:
    run, _ = finished_run
    shutil.copytree(run / "calibrate", tmp_path / "calibrate")
    process = _start("block-ap", tmp_path, smoke_env, LONG)
    _wait(lambda: (tmp_path / "block-ap.partial" / "log.jsonl").is_file(), process)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 130
    assert "continue with `qat block-ap" in stderr
    assert "Traceback" not in stderr


def test_interrupt_while_libraries_load_is_not_lost_in_them(
    smoke_env: dict[str, str], finished_run: tuple[Path, dict], tmp_path: Path
) -> None:
    """As an extension in C that guards an import does: whatever is raised in there is dropped."""
    run, _ = finished_run
    shutil.copytree(run / "calibrate", tmp_path / "calibrate")
    script = """
import contextlib, signal, sys
struck = []
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            struck.append(name)
            with contextlib.suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGTERM)
sys.meta_path.insert(0, Finder())
from qatcli.cli import main
try:
    main()
finally:
    assert struck
"""
    command = [sys.executable, "-c", script, "block-ap", str(RECIPE), "--run", str(tmp_path)]
    done = subprocess.run(command, env=smoke_env, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert done.returncode == 130, done.stderr
    assert "continue with `qat block-ap" in done.stderr
    assert not (tmp_path / "block-ap.partial").exists()


def test_signal_after_the_result_changes_nothing(
    smoke_env: dict[str, str], finished_run: tuple[Path, dict], tmp_path: Path
) -> None:
    """The stage is committed and its directory printed: the process ends as if nothing had come."""
    run, _ = finished_run
    script = """
import atexit, signal
atexit.register(signal.raise_signal, signal.SIGTERM)
from qatcli.cli import main
main()
"""
    command = [sys.executable, "-c", script, "pack", str(RECIPE), "--run", str(run)]
    done = subprocess.run(command, env=smoke_env, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{run}/pack\n"
    assert "Traceback" not in done.stderr


def _start(stage: str, run: Path, env: dict[str, str], options: Sequence[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "qatcli", stage, str(RECIPE), "--run", str(run), *options]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _kill_after_writing(name: str, stage: str, run: Path, env: dict[str, str]) -> None:
    """Run a stage that kill -9 ends at the moment when the file `name` has appeared under its final name."""
    script = """
import os, signal, sys
last, replace = sys.argv.pop(1), os.replace
def replace_then_die(source, target, **options):
    replace(source, target, **options)
    if os.path.basename(target) == last:
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = replace_then_die
from qatcli.cli import main
main()
"""
    command = [sys.executable, "-c", script, name, stage, str(RECIPE), "--run", str(run)]
    killed = subprocess.run(command, env=env, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr


def _wait(reached, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not reached():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "the stage did not get there"
        time.sleep(0.002)


def _digests(stage: Path) -> dict[str, str]:
    """sha256 of the stage's model and data files: what has to be equal bit for bit."""
    return dict(json.loads((stage / "stage.json").read_text())["files"])
