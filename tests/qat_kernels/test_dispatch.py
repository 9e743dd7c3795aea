"""Which implementation serves a call, and what importing the package costs."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import qat_kernels
from qat_kernels import dispatch


def backend_name(*, is_cuda: bool) -> str:
    return dispatch.backend_for(SimpleNamespace(is_cuda=is_cuda)).fake_quant.__module__.rpartition(".")[2]


def test_cuda_tensors_get_triton_and_others_what_is_compiled_for_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.delenv("QAT_KERNELS", raising=False)
    assert backend_name(is_cuda=True) == "triton_fake_quant"
    assert backend_name(is_cuda=False) == "cpu"


def test_cuda_tensors_get_the_reference_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QAT_KERNELS", raising=False)
    monkeypatch.setattr(dispatch, "_has_triton", lambda: False)
    assert backend_name(is_cuda=True) == "reference"


def test_the_environment_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("QAT_KERNELS", "reference")
    assert backend_name(is_cuda=True) == "reference"
    monkeypatch.setenv("QAT_KERNELS", "triton")
    assert backend_name(is_cuda=False) == "triton_fake_quant"


def test_an_unknown_override_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAT_KERNELS", "cuda")
    with pytest.raises(ValueError, match=r"QAT_KERNELS must be reference or triton\. Got: 'cuda'"):
        qat_kernels.pack(torch.zeros(1, 8, dtype=torch.uint8), bits=2)


def test_import_and_reference_need_neither_triton_nor_a_device() -> None:
    program = """
import sys
sys.modules["triton"] = None  # importing it raises ImportError
import torch, qat_kernels
codes = qat_kernels.quantize(torch.ones(1, 8), torch.ones(1, 1), torch.zeros(1, 1), bits=2, group_size=-1)
print(codes.tolist(), torch.cuda.is_initialized())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[[1, 1, 1, 1, 1, 1, 1, 1]] False"


def test_all_names_every_public_function_once() -> None:
    public = {
        name
        for name, value in vars(qat_kernels).items()
        if getattr(value, "__module__", None) == "qat_kernels" and not name.startswith("_")
    }
    assert sorted(public) == sorted(qat_kernels.__all__)
