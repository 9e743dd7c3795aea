"""The wheel: what it holds, and that it works where the repository is not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import qatcli

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.slow


def run(*command: str, cwd: Path, pythonpath: Path | None = None) -> str:
    """Run Python outside of the repository, seeing nothing of it; returns standard output."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if pythonpath is not None:
        environment["PYTHONPATH"] = str(pythonpath)
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=cwd, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the sources: setuptools would keep its intermediate files beside them."""
    source = tmp_path_factory.mktemp("source")
    ignore = shutil.ignore_patterns("__pycache__")
    for folder in ("qatcli", "kernels", "recipes", "tests"):
        shutil.copytree(ROOT / folder, source / folder, ignore=ignore)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    out = tmp_path_factory.mktemp("dist")
    run(
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        str(out),
        ".",
        cwd=source,
    )
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel installed into it and nothing else."""
    target = tmp_path_factory.mktemp("site")
    options = ["--quiet", "--no-deps", "--no-index", "--no-compile", "--target", str(target)]
    run("-m", "pip", "install", *options, str(wheel), cwd=target)
    return target


def test_the_wheel_holds_both_packages_and_nothing_else(wheel: Path) -> None:
    packed = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    wanted = [path.relative_to(ROOT) for path in (ROOT / "qatcli").rglob("*.py")]
    package = ROOT / "kernels" / "qat_kernels"
    report = ROOT / "qatcli" / "report"
    wanted += [path.relative_to(ROOT) for path in [*report.glob("*.css"), *report.glob("*.jinja")]]
    files = [path for pattern in ("*.py", "*.cpp", "configs/*.json") for path in package.rglob(pattern)]
    wanted += [path.relative_to(package.parent) for path in files]
    assert sorted(packed) == sorted(map(Path.as_posix, wanted))
    assert {"qatcli/__main__.py", "qatcli/stages/__init__.py", "qat_kernels/reference.py"} <= set(packed)


def test_the_wheel_describes_itself(wheel: Path) -> None:
    assert wheel.name == f"qatcli-{qatcli.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        folder = f"qatcli-{qatcli.__version__}.dist-info"
        entry_points = archive.read(f"{folder}/entry_points.txt").decode()
        metadata = archive.read(f"{folder}/METADATA").decode()
        assert f"{folder}/licenses/LICENSE" in archive.namelist()
    assert entry_points.strip() == "[console_scripts]\nqat = qatcli.__main__:main"
    assert "License-Expression: Apache-2.0\n" in metadata
    assert "Requires-Python: >=3.11\n" in metadata
    assert all(f"Provides-Extra: {extra}\n" in metadata for extra in ("eval", "gguf", "gptq", "dev"))


def test_both_packages_import_from_the_installed_wheel(installed: Path, tmp_path: Path) -> None:
    code = "import qatcli, qat_kernels; print(qatcli.__version__, qatcli.__file__, qat_kernels.__file__)"
    version, *files = run("-c", code, cwd=tmp_path, pythonpath=installed).split()
    assert version == qatcli.__version__
    assert files == [str(installed / "qatcli" / "__init__.py"), str(installed / "qat_kernels" / "__init__.py")]


def test_the_command_runs_from_the_installed_wheel(installed: Path, tmp_path: Path) -> None:
    text = run("-m", "qatcli", "--help", cwd=tmp_path, pythonpath=installed)
    assert "calibrate" in text
    assert "block-ap" in text
