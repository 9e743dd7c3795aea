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
    """A run directory with a packed model and five exports of it; stderr of the export, and its lines of stdout."""
    run = tmp_path_factory.mktemp("runs") / "run"
    qat("calibrate", RECIPE, "--run", run, *FEW, env=environment)
    qat("pack", RECIPE, "--run", run, "--from", run / "calibrate", *FEW, env=environment)
    formats = ("--format", "gptq,bitblas,native", "--format", "awq", "--format", "compressed-tensors")
    done = qat("export", RECIPE, "--run", run, *formats, *FAST, *FEW, env=environment)
    return run, done.stderr, done.stdout.splitlines()


def test_every_format_named_is_written_verified_and_explained(exported: tuple[Path, str, list[str]]) -> None:
    run, errors, printed = exported
    names = ["gptq", "bitblas", "native", "awq", "compressed-tensors"]
    assert printed == [str(run / "export" / name) for name in names]
    for name in names:
        out = run / "export" / name
        assert json.loads((out / "verify.json").read_text())["passed"] is True
        assert (out / "model.safetensors.index.json").is_file()
        assert not list(out.glob(".*")) and not (out / "written").exists()
    assert "SILENTLY WRONG" in errors
    assert "vllm serve . --quantization humming" in errors
    assert errors.count("| runtime | releases | command | remark |") == len(names)
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
    results = []
    for place in (original / "pack", run / "import"):
        done = qat("eval", RECIPE, "--run", tmp_path / place.name, "--from", place, "--json", env=environment)
        results.append(json.loads(done.stdout)["metrics"]["models"]["quantized"]["perplexity"]["tiny"])
    assert results[1] == pytest.approx(results[0], rel=1e-3)  # an export says fp16, in which it is then computed
