"""Third-party runtimes run an export in a process of their own and say what they computed.

A process each, because these libraries patch transformers when they are imported, may crash the interpreter, and
should give their memory back. The child compares dequantized weights where the library offers them and returns the
logits of fixed prompts; the parent compares these with the logits of the checkpoint itself.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qatcli import machine
from qatcli.formats import source
from qatcli.formats.contract import RuntimeReport, Verification
from qatcli.formats.runtimes.reference import Reference, reference
from qatcli.packed import PackedCheckpoint, read_config

FP16_MAX = 65504.0
_FP32 = 4.4  # bytes of host memory for a parameter of the reference, which computes in fp32 on the CPU
_SECONDS = 1800
# Formats that are run in the type they are stored in, and what to do where activations leave it.
_RUN_AS_STORED = dict.fromkeys(("native", "dense"), "set export.dtype=bfloat16") | {"mlx": "export gguf or dense"}
_INTEGERS = "codes, zero points and scales were compared and are equal"


class _Unfinished(Exception):
    """A runtime was stopped before it could say anything of the export: it took too long, or the system ended it."""


@dataclass(frozen=True)
class Runtime:
    """One library: the modules it needs beyond ours, the extra that installs them, the precision of its activations."""

    imports: tuple[str, ...] = ()
    extra: str = ""
    activations: str = "fp16"


RUNTIMES = {
    "gptqmodel": Runtime(("gptqmodel",), "gptq"),
    "transformers": Runtime(("gptqmodel", "optimum"), "gptq"),
    "transformers-dense": Runtime(),
    "transformers-native": Runtime(),
    "compressed-tensors": Runtime(("compressed_tensors",), "runtimes"),
    "gguf": Runtime(("gguf",), "gguf"),
    "mlx": Runtime(("mlx_lm", "mlx"), "runtimes"),
    "llama.cpp": Runtime(("xllamacpp",), "runtimes", activations="8 bits"),
}


def verify_in(
    verification: Verification, runtimes: Iterable[str], checkpoint: PackedCheckpoint, out: Path
) -> Verification:
    """Extend a verification that passed by what each runtime finds; one that failed is returned as it is."""
    if not verification.passed:
        return verification
    expected: Reference | None = None
    for name in runtimes:
        why_not = obstacle(name, checkpoint, out)
        if why_not:
            report = RuntimeReport(name, ran=False, notes=(f"not loaded in {name}: {why_not}; {_INTEGERS}",))
        else:
            expected = expected or reference(checkpoint)
            report = run(name, checkpoint, out, expected)
        verification = verification.with_runtime(report)
    if expected is not None and expected.largest > FP16_MAX and stated_dtype(out) == "float16":
        text = f"activations reach {expected.largest:.3g}, which float16, the type in config.json, does not hold"
        if fix := _RUN_AS_STORED.get(verification.format):
            return replace(verification, differences=(*verification.differences, f"{text}: {fix}"))
        verification = verification.with_note(f"{text}: run it in bfloat16")
    return verification


def run(
    name: str,
    checkpoint: PackedCheckpoint,
    out: Path,
    expected: Reference,
    *,
    windows: NDArray[np.int64] | None = None,
) -> RuntimeReport:
    """Load `out` in one runtime and compare with the reference.

    `windows` are token ids [W, T] whose perplexity the runtime computes. Never raises for what the runtime does: it
    reports.
    """
    with tempfile.TemporaryDirectory() as scratch:
        found, asked = Path(scratch, "found"), Path(scratch, "windows.npy")
        if windows is not None:
            np.save(asked, windows)
        try:
            failure = _child(name, checkpoint.path, out, found, *([asked] if windows is not None else []))
        except _Unfinished as error:
            return RuntimeReport(name, ran=False, notes=(f"not loaded in {name}: {error}; {_INTEGERS}",))
        if failure:
            return RuntimeReport(name, ran=True, differences=(f"{name} failed: {failure}",))
        facts = json.loads(found.with_suffix(".json").read_text(encoding="utf-8"))
        differences, notes = tuple(facts["differences"]), tuple(facts["notes"])
        if not found.with_suffix(".npy").is_file():
            return RuntimeReport(facts["runtime"], ran=True, differences=differences, notes=notes)
        actual = np.load(found.with_suffix(".npy"))
    activations = RUNTIMES[name].activations
    tolerance = expected.tolerances[
        "bf16" if activations == "fp16" and stated_dtype(out) == "bfloat16" else activations
    ]
    largest = float(np.abs(actual[..., : expected.logits.shape[-1]] - expected.logits).max())
    if not largest <= tolerance:  # also catches a difference that is not a number
        differences += (f"logits in {facts['runtime']} differ by {largest:.4g}, more than {tolerance:.4g}",)
    measured = facts["perplexity"], facts["text"]
    return RuntimeReport(facts["runtime"], True, differences, largest, tolerance, notes, *measured)


def stated_dtype(out: Path) -> str | None:
    """The type in an export's config.json, in which it is stored and meant to be computed; None for a GGUF file."""
    return read_config(out).get("dtype") if (out / "config.json").is_file() else None


def obstacle(name: str, checkpoint: PackedCheckpoint, out: Path) -> str | None:
    """Why this runtime cannot be asked about the export `out` here, or None."""
    for module in RUNTIMES[name].imports:
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed, `pip install 'qatcli[{RUNTIMES[name].extra}]'` brings it"
    parameters = sum(parameter.numel() for parameter in source.skeleton(checkpoint.config).parameters())
    if why_not := too_large(parameters):
        return why_not
    if name == "transformers" and _has_overrides(out):
        return "it reads one number of bits and one group size for all linears"
    return None


def too_large(parameters: int) -> str | None:
    """Why a model of so many parameters cannot be computed here as a dense one in fp32, or None."""
    needed, free = int(_FP32 * parameters), machine.host_memory()
    if needed <= free:
        return None
    return f"in fp32 it takes {needed / 2**30:.0f} GiB of host memory, and {free / 2**30:.0f} are free"


def _has_overrides(out: Path) -> bool:
    """Whether GPTQ settings give some linears other bits or groups."""
    dynamic = read_config(out)["quantization_config"].get("dynamic", {})
    return any(pattern.startswith("+:") for pattern in dynamic)


def _child(task: str, *paths: Path) -> str | None:
    """Run one task in a process of its own; the last line of its error output when it failed.

    _Unfinished when it was stopped from outside.
    """
    command = [sys.executable, "-m", "qatcli.formats.runtimes.child", task, *map(str, paths)]
    quiet = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment = {**os.environ, **quiet, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise _Unfinished(f"no answer in {_SECONDS} s") from None
    if done.returncode == 0:
        return None
    if done.returncode == -signal.SIGKILL:  # which nothing sends to itself: as a rule there was no memory left
        raise _Unfinished("its process was killed, probably for want of memory")
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    if done.returncode < 0:
        return f"killed by signal {-done.returncode}"
    return lines[-1] if lines else f"exit code {done.returncode}"
