"""Which implementation a kernel test runs, where, and on what.

`tests/conftest.py` has set TRITON_INTERPRET=1 by now if there is no GPU, so that Triton kernels run on CPU tensors,
slowly: shapes are small here, and tests marked gpu repeat the comparison at real size.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qat_kernels import cpu, cpu_build, tuning

ROOT = Path(__file__).resolve().parents[2]
TRITON = pytest.param("triton", marks=[pytest.mark.gpu] if torch.cuda.is_available() else [])


@pytest.fixture(params=["reference", "cpu", TRITON])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs the test once with each implementation."""
    if request.param == "triton":
        pytest.importorskip("triton")
    if request.param == "cpu":
        if cpu_build.library() is None:
            pytest.skip("no C++ compiler")
        monkeypatch.setattr(cpu, "SMALLEST", 0)
    monkeypatch.setenv("QAT_KERNELS", "" if request.param == "cpu" else request.param)
    return request.param


@pytest.fixture
def device(backend: str) -> str:
    """Where the backend runs: Triton on a GPU if there is one, else in the interpreter."""
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


@pytest.fixture(params=[TRITON])
def triton_device(request: pytest.FixtureRequest) -> str:
    """Where a test that calls a Triton kernel itself runs it."""
    pytest.importorskip("triton")
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def fixed_settings(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same launch settings on every GPU, tuned or not; at real sizes those that it gets."""
    if "both_backends" not in request.fixturenames:
        monkeypatch.setattr(tuning, "table_for", lambda device: tuning.default())


@pytest.fixture(autouse=True)
def in_bounds(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Fails a test whose kernel, in the interpreter, reads or writes outside the tensors it was given.

    Yields a list that holds the number of accesses seen. On a GPU, compute-sanitizer does this (docs/kernels.md).
    """
    seen = [0]
    if torch.cuda.is_available() or not importlib.util.find_spec("triton"):
        yield seen
        return
    from triton.runtime import interpreter

    given: list[tuple[int, int]] = []
    convert, builder, launch = (
        interpreter._implicit_cvt,
        interpreter.InterpreterBuilder,
        interpreter.GridExecutor.__call__,
    )

    def start(self: Any, *arguments: Any, **options: Any) -> None:
        given.clear()  # a launch may touch its own tensors only
        launch(self, *arguments, **options)

    def remember(argument: Any) -> Any:
        if isinstance(argument, torch.Tensor):
            assert argument.is_contiguous()
            start = argument.data_ptr()
            given.append((start, start + argument.numel() * argument.element_size()))
        return convert(argument)

    def check(pointers: Any, mask: Any) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        used = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].astype(np.int64)
        if used.size:
            first, last = int(used.min()), int(used.max()) + size
            assert any(start <= first and last <= end for start, end in given), "a kernel left its tensors"
            seen[0] += used.size

    def checked(name: str, mask_argument: int) -> Callable[..., Any]:
        access = getattr(builder, name)

        def run(self: Any, *arguments: Any) -> Any:
            check(arguments[0], arguments[mask_argument])
            return access(self, *arguments)

        return run

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", start)
    monkeypatch.setattr(interpreter, "_implicit_cvt", remember)
    monkeypatch.setattr(builder, "create_masked_load", checked("create_masked_load", 1))
    monkeypatch.setattr(builder, "create_masked_store", checked("create_masked_store", 2))
    yield seen


@pytest.fixture
def rounds_to_bf16(backend: str, device: str) -> bool:
    """Whether fp32 becomes bf16 by rounding: the interpreter truncates."""
    return backend != "triton" or device == "cuda"


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
    cases: dict[str, dict[str, torch.Tensor]] = {}
    with np.load(ROOT / "tests" / "qatcli" / "formats" / "golden" / "layouts.npz") as arrays:
        for key in arrays.files:
            case, name = key.split("/", 1)
            cases.setdefault(case, {})[name] = torch.from_numpy(arrays[key])
    return cases
