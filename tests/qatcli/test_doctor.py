"""The examination of an environment: every finding has its fix, and only what prevents running is broken."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from qat_kernels import cpu, cpu_build
from qatcli import doctor
from qatcli.cli import app
from qatcli.doctor import Finding

GIB = 2**30


def states(findings: Iterator[Finding]) -> dict[str, str]:
    return {finding.name: finding.state for finding in findings}


def test_this_environment_runs() -> None:
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["broken"] == []
    areas = {finding["area"] for finding in found["findings"]}
    assert areas == {"python", "packages", "extras", "devices", "kernels", "memory", "caches", "disk"}
    assert all(finding["text"] for finding in found["findings"])
    assert all(finding["fix"] for finding in found["findings"] if finding["state"] != "ok")
    assert "reference" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("qat runs here; ")


def test_what_prevents_running_fails_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(_: object, rows: int = 16) -> str:
        return "quantize gives other codes at 2 bits" * (rows == 16)

    monkeypatch.setattr(doctor, "_wrong", wrong)
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 1
    assert "kernels: reference" in json.loads(result.stdout)["broken"]
    assert result.stderr.splitlines()[-1] == "qat does not run here before this is mended: kernels: reference"


@pytest.mark.parametrize(("cuda", "fix"), [(None, "install a CUDA build"), ("13.0", "update the driver")])
def test_a_driver_without_a_gpu_in_torch_has_its_fix(
    monkeypatch: pytest.MonkeyPatch, cuda: str | None, fix: str
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(doctor.shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    found = next(finding for finding in doctor._devices() if finding.name == "CUDA")
    assert found.state == "note"
    assert found.fix.startswith(fix)


def test_an_examination_that_fails_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def torn(_: Path) -> int:
        raise OSError("stale file handle")

    monkeypatch.setattr(doctor.machine, "disk_space", torn)
    found = doctor.examine()
    assert {"caches: examination", "disk: examination"} <= set(found["broken"])
    assert any(finding["area"] == "kernels" for finding in found["findings"]), "the others are looked at all the same"


def test_a_package_that_is_absent_or_old(monkeypatch: pytest.MonkeyPatch) -> None:
    declared = ["psutil>=5.9", "absent>=1", "rich>=999", "gone>=2; extra == 'gguf'", "skipped>=1; sys_platform == 'x'"]
    monkeypatch.setattr(doctor, "requires", lambda _: declared)
    found = list(doctor._packages())
    broken = {finding.name: finding for finding in found if finding.state == "broken"}
    assert set(broken) == {"absent", "rich"}
    assert broken["absent"].text == "absent is not installed"
    assert broken["absent"].fix == "pip install 'absent>=1'"
    assert "is not >=999" in broken["rich"].text
    extra = next(finding for finding in found if finding.name == "gguf")
    assert (extra.state, extra.fix) == ("note", "pip install 'qatcli[gguf]'")
    assert "gone is not installed" in extra.text


def test_every_extra_has_its_description() -> None:
    extras = {finding.name for finding in doctor._packages() if finding.area == "extras"}
    assert extras <= doctor.BRINGS.keys()
    assert {"eval", "gguf", "gptq"} <= extras


def test_little_memory_and_disk_are_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.machine, "host_memory", lambda: 2 * GIB)
    monkeypatch.setattr(doctor.machine, "cgroup_memory", lambda: 2 * GIB)
    monkeypatch.setattr(doctor.machine, "disk_space", lambda _: GIB)
    assert states(doctor._memory())["host"] == "note"
    assert "control group" in next(doctor._memory()).text
    assert states(doctor._disk()) == {"run directories": "note"}


def test_a_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    assert states(doctor._disk()) == {"run directories": "broken"}
    found = [finding for finding in doctor._caches() if finding.name != "HF_HUB_OFFLINE"]
    assert len(found) == 3
    assert {finding.state for finding in found} == {"note"}
    assert all("set " in finding.fix for finding in found)


def test_kernels_that_compute_wrongly_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    import qat_kernels

    assert doctor._wrong(torch.device("cpu")) == ""
    true_unpack = qat_kernels.unpack

    def unpack(packed: torch.Tensor, *, bits: int, length: int) -> torch.Tensor:
        return true_unpack(packed, bits=bits, length=length) ^ (bits == 3)

    monkeypatch.setattr(qat_kernels, "unpack", unpack)
    assert doctor._wrong(torch.device("cpu")) == "pack and unpack lose codes at 3 bits"


def test_a_cpu_without_a_compiler_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_build, "library", lambda: None)
    found = doctor._compiled()
    assert (found.state, found.fix) == ("note", "install g++ or clang++, or set CXX")
    monkeypatch.setenv("QAT_KERNELS", "reference")
    assert doctor._compiled().fix == "unset it"


def test_a_compiler_that_computes_wrongly_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled functions take large weights only: small ones are the reference's, and right."""
    import torch

    def zeros(*arguments: int) -> None:
        ctypes.memset(arguments[3], 0, 4 * cpu.SMALLEST)

    miscompiled = SimpleNamespace(qat_fake_quant=zeros, qat_dequantize=zeros)
    monkeypatch.setattr(cpu_build, "library", lambda: miscompiled)
    assert doctor._wrong(torch.device("cpu")) == ""
    found = doctor._compiled()
    assert (found.state, found.text) == ("broken", "weights differ at 2 bits")


def test_launch_settings_that_were_never_timed_are_a_note() -> None:
    finding = doctor._kernel_settings("A GPU nobody has seen")
    assert (finding.state, finding.fix) == ("note", "python -m qat_kernels.tune")
    assert "A GPU nobody has seen" in finding.text
