"""`qat export` and `qat import` through the real command: several formats at once, there and back, and onwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qatcli.formats import FORMATS, source
from qatcli.packed import PackedCheckpoint

RECIPE = Path(__file__).resolve().parents[3] / "recipes" / "smoke" / "w4g32.yaml"
FAST = ("--set", "export.runtimes=false", "--set", "export.max_shard_gb=0.00005")
FEW = ("--set", "calibrate.samples=4", "--set", "calibrate.validation_samples=1")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def environment(tiny_llama: Path, tiny_text: Path) -> dict[str, str]:
    return {**os.environ, "QAT_SMOKE_MODEL": str(tiny_llama), "QAT_SMOKE_TEXT": str(tiny_text), "OMP_NUM_THREADS": "1"}


def qat(*arguments: str | Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qatcli", *map(str, arguments)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def exported(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, list[str]]:
    """A run directory with a packed model and six exports of it; stderr of the export, and its lines of stdout."""
    run = tmp_path_factory.mktemp("runs") / "run"
    qat("calibrate", RECIPE, "--run", run, *FEW, env=environment)
    qat("pack", RECIPE, "--run", run, "--from", run / "calibrate", *FEW, env=environment)
    formats = ("--format", "gptq,bitblas,native", "--format", "awq", "--format", "compressed-tensors,mlx")
    done = qat("export", RECIPE, "--run", run, *formats, *FAST, *FEW, env=environment)
    return run, done.stderr, done.stdout.splitlines()


def test_every_format_named_is_written_verified_and_explained(exported: tuple[Path, str, list[str]]) -> None:
    run, errors, printed = exported
    names = ["gptq", "bitblas", "native", "awq", "compressed-tensors", "mlx"]
    assert printed == [str(run / "export" / name) for name in names]
    for name in names:
        out = run / "export" / name
        assert json.loads((out / "verify.json").read_text())["passed"] is True
        assert (out / "model.safetensors.index.json").is_file()
        assert not list(out.glob(".*")) and not (out / "written").exists()
    assert "SILENTLY WRONG" in errors
    assert "vllm serve . --quantization humming" in errors
    for name in names:
        assert f"{name}: written; reading it back\n" in errors
        assert f"{name}: verified, 21 linears have equal codes, zero points and scales, read by qat's" in errors
        assert f"{name} runs in, with these commands in its folder:\n  " in errors
    assert len(names) < len(FORMATS)


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_an_export_comes_back_and_goes_on(
    exported: tuple[Path, str, list[str]], environment: dict[str, str], tmp_path: Path, name: str
) -> None:
    original, run = exported[0], tmp_path / "run"
    qat("import", RECIPE, "--run", run, "--from", original / "export" / name, env=environment)
    before, after = (PackedCheckpoint.open(path) for path in (original / "pack", run / "import"))
    assert before.modules == after.modules
    for module in before.modules:
        left, right = source.arrays(before, module), source.arrays(after, module)
        assert (left.codes == right.codes).all() and (left.zero_point == right.zero_point).all()
        assert (left.scale == right.scale).all()
    qat("export", RECIPE, "--run", run, "--from", run / "import", "--format", "native", *FAST, env=environment)
    again = PackedCheckpoint.open(run / "export" / "native")
    assert again.modules == before.modules
    models = (original / "export" / "native", run / "import")
    asked = ("--text", environment["QAT_SMOKE_TEXT"], "--seq-len", "64", "--windows", "4", "--no-speed", "--json")
    found = json.loads(qat("eval", *models, *asked, env=environment).stdout)["models"]
    # Both say fp16. The packed model they come from says fp32, as its source does, and is computed in that: not equal.
    assert found[str(models[0])]["perplexity"] == found[str(models[1])]["perplexity"]


def test_training_goes_on_from_an_import(
    exported: tuple[Path, str, list[str]], environment: dict[str, str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    qat("import", RECIPE, "--run", run, "--from", exported[0] / "export" / "gptq", env=environment)
    few = ("--set", "e2e_qp.samples=8", "--set", "e2e_qp.validation_samples=2", "--set", "e2e_qp.epochs=1")
    few += ("--set", "e2e_qp.keep_best=false")  # so few updates need not beat the start
    qat("e2e-qp", RECIPE, "--run", run, "--from", run / "import", *few, env=environment)
    before, after = (PackedCheckpoint.open(run / name) for name in ("import", "e2e-qp"))
    assert before.modules == after.modules
    moved = 0
    for module in before.modules:
        left, right = source.arrays(before, module), source.arrays(after, module)
        assert (left.codes == right.codes).all() and (left.zero_point == right.zero_point).all()
        moved += int((left.scale != right.scale).sum())
    assert moved > 0


def test_a_difference_is_exit_code_4_and_leaves_nothing(
    exported: tuple[Path, str, list[str]], environment: dict[str, str], tmp_path: Path
) -> None:
    """A writer that is off by one, put in the place of ours."""
    wrong = (
        "import sys; from qatcli.cli import main; from qatcli.formats.layouts import awq\n"
        "pack = awq._pack; awq._pack = lambda values: pack(values ^ 1)\n"
        "sys.argv[0] = 'qat'; main()"
    )
    options = ("--from", str(exported[0] / "pack"), "--run", str(tmp_path / "run"), "--format", "awq", *FAST)
    command = [sys.executable, "-c", wrong, "export", str(RECIPE), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 4, done.stderr
    assert "the awq export differs from its source: codes of model.layers.0" in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "run" / "export" / "awq").exists()
    assert not list((tmp_path / "run").rglob("*.safetensors"))


def test_no_verify_is_loud(exported: tuple[Path, str, list[str]], environment: dict[str, str], tmp_path: Path) -> None:
    options = ("--from", exported[0] / "pack", "--run", tmp_path / "run", "--format", "gptq", "--no-verify", *FAST)
    done = qat("export", RECIPE, *options, env=environment)
    assert "warning: gptq: NOT verified, as asked; nobody knows whether this export is right" in done.stderr
    assert not (tmp_path / "run" / "export" / "gptq" / "verify.json").exists()
