"""Which implementation a kernel test runs, where, and on what.

`tests/conftest.py` has set TRITON_INTERPRET=1 by now if there is no GPU, so that Triton kernels run on CPU tensors,
slowly: shapes are small here, and tests marked gpu repeat the comparison at real size.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(params=["reference", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs the test once with each implementation."""
    if request.param == "triton":
        pytest.importorskip("triton")
    monkeypatch.setenv("QAT_KERNELS", request.param)
    return request.param


@pytest.fixture
def device(backend: str) -> str:
    """Where the backend runs: Triton on a GPU if there is one, else in the interpreter."""
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


@pytest.fixture
def rounds_to_bf16(backend: str, device: str) -> bool:
    """Whether fp32 becomes bf16 by rounding: the interpreter truncates."""
    return backend == "reference" or device == "cuda"


@pytest.fixture
def both_backends(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], tuple[Any, Any]]:
    """A function that returns what a call gives with the reference and with Triton; needs a GPU."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")

    def run(call: Callable[[], Any]) -> tuple[Any, Any]:
        results = []
        for name in ("reference", "triton"):
            monkeypatch.setenv("QAT_KERNELS", name)
            results.append(call())
        return results[0], results[1]

    return run


@pytest.fixture(scope="session")
def layouts() -> dict[str, dict[str, torch.Tensor]]:
    """Tensors made by an independent packer, by case and name: {"b2_n32_k128_g64": {"codes": ..., ...}, ...}."""
    data = Path(os.environ.get("QAT_DATA") or ROOT.parent / "shared" / "data")
    path = data.parent / "golden" / "layouts.npz"
    if not path.is_file():
        pytest.skip(f"no golden vectors at {path}: set QAT_DATA to the folder beside golden/")
    cases: dict[str, dict[str, torch.Tensor]] = {}
    with np.load(path) as arrays:
        for key in arrays.files:
            case, name = key.split("/", 1)
            cases.setdefault(case, {})[name] = torch.from_numpy(arrays[key])
    return cases
