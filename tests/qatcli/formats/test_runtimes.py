"""Third-party libraries load each export and agree with the checkpoint; skipped where they are not installed."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qatcli.formats import FORMATS, ExportOptions
from qatcli.formats.contract import Verification
from qatcli.formats.runtimes import RUNTIMES, run, verify_in
from qatcli.formats.runtimes.reference import prompts, reference
from qatcli.packed import PackedCheckpoint

Packed = Callable[..., PackedCheckpoint]
WITHOUT = ExportOptions(runtimes=False)


def _needs(name: str) -> None:
    missing = [module for module in RUNTIMES[name].imports if importlib.util.find_spec(module) is None]
    if missing:
        pytest.skip(f"{missing[0]} is not installed ({RUNTIMES[name].install})")


_MIXED = {"kinds": {"layers.1.mlp.down_proj": (4, 32)}, "skip": ("layers.0.self_attn",)}
CASES = [
    ("gptq", "gptqmodel", 2, _MIXED),
    ("gptq", "gptqmodel", 3, {"group_size": -1}),
    ("gptq", "transformers", 4, {"symmetric": True}),
    ("awq", "gptqmodel", 4, {}),
    ("compressed-tensors", "compressed-tensors", 3, _MIXED),
    ("compressed-tensors", "compressed-tensors", 4, {"symmetric": True}),
    ("dense", "transformers-dense", 2, {}),
    ("gguf", "gguf", 2, {}),
    ("gguf", "llama.cpp", 4, {}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("format_name", "runtime", "bits", "options"), CASES)
def test_runtime_computes_what_the_checkpoint_says(
    packed: Packed, tmp_path: Path, format_name: str, runtime: str, bits: int, options: dict[str, object]
) -> None:
    _needs(runtime)
    checkpoint = packed(bits, **options)
    FORMATS[format_name].write(checkpoint, tmp_path / "out", WITHOUT)
    report = run(runtime, checkpoint, tmp_path / "out", reference(checkpoint))
    assert report.ran
    assert report.differences == ()
    if runtime != "gguf" and not (runtime == "compressed-tensors" and "kinds" in options):
        assert report.max_logit_difference is not None
        assert report.logit_tolerance is not None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("format_name", "runtime", "tensor"),
    [
        ("gptq", "gptqmodel", "qzeros"),
        ("dense", "transformers-dense", "weight"),
    ],
)
def test_runtime_notices_a_changed_tensor(
    packed: Packed, tmp_path: Path, format_name: str, runtime: str, tensor: str
) -> None:
    _needs(runtime)
    checkpoint, out = packed(4), tmp_path / "out"
    FORMATS[format_name].write(checkpoint, out, WITHOUT)
    tensors = load_file(out / "model.safetensors")
    name = f"model.layers.0.mlp.up_proj.{tensor}"
    tensors[name] = tensors[name] * 2 if tensor == "weight" else tensors[name] - 0x11111111
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    assert run(runtime, checkpoint, out, reference(checkpoint)).differences


def test_missing_runtime_is_a_note_that_names_the_extra(
    packed: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = replace(RUNTIMES["gptqmodel"], imports=("no_such_package",))
    monkeypatch.setitem(RUNTIMES, "gptqmodel", absent)
    checkpoint = packed(2)
    good = Verification("gptq", "reader", 21, True, True, True)
    result = verify_in(good, ("gptqmodel",), checkpoint, tmp_path)
    assert result.passed
    assert result.max_logit_difference is None
    assert "no_such_package" in result.notes[0]
    assert "qatcli[gptq]" in result.notes[0]


def test_runtime_that_cannot_load_the_export_is_a_difference(packed: Packed, tmp_path: Path) -> None:
    out = tmp_path / "out"
    FORMATS["dense"].write(packed(2), out, WITHOUT)
    shutil.copy(out / "config.json", out / "model.safetensors")
    differences = run("transformers-dense", packed(2), out, reference(packed(2))).differences
    assert len(differences) == 1
    assert differences[0].startswith("transformers-dense failed: ")


def test_failed_integers_are_not_run(packed: Packed, tmp_path: Path) -> None:
    bad = Verification("gptq", "reader", 21, False, True, True)
    assert verify_in(bad, ("gptqmodel",), packed(2), tmp_path / "absent") is bad


def test_prompts_fit_every_vocabulary() -> None:
    for size in (258, 49152):
        ids = torch.from_numpy(prompts(size))
        assert ids.shape == (2, 24)
        assert int(ids.min()) >= 0
        assert int(ids.max()) < size
