"""The faults that benchmarks/export_matrix.py injects, in every format at every number of bits."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from qatcli.formats import FORMATS, ExportOptions, Verification
from qatcli.packed import PackedCheckpoint
from qatcli.recipe import FORMAT_BITS

Packed = Callable[..., PackedCheckpoint]
OPTIONS = ExportOptions(runtimes=False, awq_promote=True)
ALL = ("flipped bit", "zero points off by one", "swapped nibbles")
CARRIED = {**FORMAT_BITS, "awq": (2, 3, 4)}  # which promotes fewer than 4
CASES = [(name, bits) for name, each in CARRIED.items() for bits in each]


@pytest.fixture(scope="module")
def faults() -> ModuleType:
    """benchmarks/export_faults.py, which is no part of a package."""
    file = Path(__file__).resolve().parents[3] / "benchmarks" / "export_faults.py"
    spec = importlib.util.spec_from_file_location("export_faults", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_all_faults_are_tested(faults: ModuleType) -> None:
    assert faults.FAULTS == ALL
    assert len(CASES) == 30


@pytest.mark.parametrize("fault", ALL)
@pytest.mark.parametrize(("name", "bits"), CASES)
def test_fault_is_caught_where_it_is(
    packed: Packed, tmp_path: Path, faults: ModuleType, name: str, bits: int, fault: str
) -> None:
    checkpoint = packed(bits)
    FORMATS[name].write(checkpoint, tmp_path / "out", OPTIONS)

    def verified() -> Verification:
        return FORMATS[name].verify(checkpoint, tmp_path / "out", OPTIONS)

    if name == "dense" and fault == "swapped nibbles":
        with (
            pytest.raises(ValueError, match="no nibbles"),
            faults.injected(fault, checkpoint, tmp_path / "out", name),
        ):
            pass
        return
    with faults.injected(fault, checkpoint, tmp_path / "out", name) as linear:
        found = verified()
    assert not found.passed
    assert found.differences
    assert all(linear in difference for difference in found.differences)
    if fault == "zero points off by one" and name not in ("gguf", "dense"):  # these two store no zero points
        assert found.codes_equal
        assert not found.zero_points_equal
    assert verified().passed, "the fault is taken out again"


def test_a_symmetric_model_has_no_zero_points_to_move(packed: Packed, tmp_path: Path, faults: ModuleType) -> None:
    checkpoint = packed(4, symmetric=True)
    FORMATS["compressed-tensors"].write(checkpoint, tmp_path / "out", OPTIONS)
    with (
        pytest.raises(ValueError, match="stores no zero points"),
        faults.injected("zero points off by one", checkpoint, tmp_path / "out", "compressed-tensors"),
    ):
        pass
