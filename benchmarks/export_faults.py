"""Three faults that exports of other tools were published with, put into a written export and taken out again.

    python benchmarks/export_faults.py PACKED_DIR... [--formats gptq,gguf] [--out FOLDER]

Writes every format of the given packed checkpoints, injects each fault and verifies: a Markdown table of what was
caught, one row per checkpoint and format, with `--out` also in export_faults.md. Exit code 1 when one was missed. A
fault is an edit of bytes in the file, found through the file's own header: nothing of the writers is used, but for
GGUF's block encoders. The tests inject the same.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qatcli.errors import QatError
from qatcli.formats import FORMATS, ExportOptions, gguf_model, source
from qatcli.formats.gguf_compare import gguf_name
from qatcli.formats.gguf_readback import open_gguf
from qatcli.formats.layouts.gguf_blocks import TYPES
from qatcli.packed import PackedCheckpoint
from qatcli.shards import read_header

U8 = NDArray[np.uint8]
FAULTS = ("flipped bit", "zero points off by one", "swapped nibbles")
CODES = {"gptq": "qweight", "bitblas": "qweight", "awq": "qweight", "mlx": "weight", "dense": "weight"}
ZEROS = {"gptq": "qzeros", "bitblas": "qzeros", "awq": "qzeros"}
QUANTS = {"Q4_0": 2, "Q4_1": 4, "Q5_0": 6, "Q8_0": 2, "Q2_0": 2, "Q2_K": 16, "Q4_K": 16}  # where a block's codes begin
QUANTS_END = {"Q2_K": 80}


OPTIONS = ExportOptions(runtimes=False, awq_promote=True)
COLUMNS = ("checkpoint", "format", *FAULTS)


def main() -> int:
    """Inject, print and write; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("packed", type=Path, nargs="+", help="directories that `qat pack` wrote")
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--out", type=Path, help="folder for export_faults.md")
    arguments = parser.parse_args()
    names = " ".join(f"{label(path)}/{path.name}" for path in arguments.packed)
    text = [f"`python benchmarks/export_faults.py {names}` at commit {commit()}; {machine()}.", "", heading(COLUMNS)]
    print("\n".join(text), flush=True)
    missed = False
    for path in arguments.packed:
        checkpoint = PackedCheckpoint.open(path)
        for name in arguments.formats.split(","):
            found = outcomes(checkpoint, name)
            missed = missed or "MISSED" in found.values()
            text.append(line({"checkpoint": label(path), "format": name, **found}, COLUMNS))
            print(text[-1], flush=True)
            if arguments.out:
                arguments.out.mkdir(parents=True, exist_ok=True)
                content = "\n".join(["# Injected faults", "", *text, ""])
                (arguments.out / "export_faults.md").write_text(content, encoding="utf-8")
    return int(missed)


def outcomes(checkpoint: PackedCheckpoint, name: str) -> dict[str, str]:
    """What verification, integers only, makes of each fault in one format."""
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch, "out")
        try:
            FORMATS[name].write(checkpoint, out, OPTIONS)
        except QatError as error:
            return dict.fromkeys(FAULTS, f"refused: {error.message}")
        for fault in FAULTS:
            try:
                with injected(fault, checkpoint, out, name) as linear:
                    verification = FORMATS[name].verify(checkpoint, out, OPTIONS)
            except ValueError as error:
                found[fault] = f"none: {error}"
            else:
                named = any(linear in difference for difference in verification.differences)
                found[fault] = "caught" if named and not verification.passed else "MISSED"
        if not FORMATS[name].verify(checkpoint, out, OPTIONS).passed:
            found[FAULTS[0]] = "MISSED: the undamaged export does not verify"
    return found


@dataclass(frozen=True)
class Place:
    """Where a tensor is: its file, the offset of its first byte, its size in bytes, shape, and GGUF type or dtype."""

    file: Path
    offset: int
    bytes: int
    shape: tuple[int, ...]
    kind: str


@contextmanager
def injected(fault: str, checkpoint: PackedCheckpoint, out: Path, format_name: str) -> Iterator[str]:
    """Damage one linear of the export `out` inside the `with` block; yields the linear's name.

    ValueError when the format has no such thing: dense weights are no nibbles, a symmetric model has no zero points.
    """
    name = list(checkpoint.modules)[len(checkpoint.modules) // 2]
    place, damage = _damage(fault, checkpoint, out, format_name, name)
    with open(place.file, "r+b") as handle:
        handle.seek(place.offset)
        good = handle.read(place.bytes)
        bad = damage(np.frombuffer(good, np.uint8).copy()).tobytes()
        if len(bad) != len(good) or bad == good:
            raise ValueError(f"{fault} changes nothing in {format_name}")
        handle.seek(place.offset)
        handle.write(bad)
        handle.flush()
        try:
            yield name
        finally:
            handle.seek(place.offset)
            handle.write(good)


def _damage(
    fault: str, checkpoint: PackedCheckpoint, out: Path, format_name: str, name: str
) -> tuple[Place, Callable[[U8], U8]]:
    """The place to damage, and a function from its bytes to the damaged ones."""
    if format_name == "gguf":
        codes = _in_gguf(next(out.glob("*.gguf")), gguf_name(checkpoint, name + ".weight"))
    else:
        places = tensor_places(out)
        codes = places[f"{name}.{CODES.get(format_name, 'weight_packed')}"]
    if fault == "flipped bit":
        return codes, _flip
    if fault == "swapped nibbles":
        if format_name == "dense":
            raise ValueError("dense weights are no nibbles")
        return codes, lambda raw: _swap(raw, codes.kind)
    linear = source.arrays(checkpoint, name)
    if format_name == "gguf":
        return codes, lambda _: _other_zeros_gguf(checkpoint, name, linear, codes.kind)
    if format_name == "dense":
        return codes, lambda raw: _other_zeros_dense(raw, linear)
    if format_name == "mlx":
        offsets = -linear.scale.astype(np.float64) * _one_lower(linear)
        return places[name + ".biases"], lambda _: offsets.astype(np.float16).reshape(-1).view(np.uint8)
    tensor = f"{name}.{ZEROS.get(format_name, 'weight_zero_point')}"
    if tensor not in places:
        raise ValueError("a symmetric model stores no zero points")
    zeros = places[tensor]
    bits = 4 if format_name == "awq" or (format_name == "bitblas" and linear.bits == 3) else linear.bits
    down_columns = format_name in ("native", "compressed-tensors")
    return zeros, lambda raw: _minus_one(raw, bits, zeros.shape if down_columns else None)


def _one_lower(linear: source.Arrays) -> U8:
    return linear.zero_point - np.uint8(1) & np.uint8((1 << linear.bits) - 1)


def _flip(raw: U8) -> U8:
    raw[len(raw) // 2] ^= 1
    return raw


def _swap(raw: U8, kind: str) -> U8:
    blocks = raw.reshape(-1, TYPES[kind].bytes) if kind in TYPES else raw.reshape(1, -1)
    codes = blocks[:, QUANTS.get(kind, 0) : QUANTS_END.get(kind)]
    codes[...] = codes << 4 | codes >> 4
    return raw


def _minus_one(raw: U8, bits: int, shape: tuple[int, ...] | None) -> U8:
    """Every field of a dense little-endian stream one lower, modulo 2^bits, as version 1 of GPTQ stores zero points."""
    words = raw.view(np.int32).reshape(shape).T if shape else None
    stream = raw if words is None else np.ascontiguousarray(words).view(np.uint8)
    rows = stream.reshape(-1, stream.shape[-1])
    usable = rows.shape[1] * 8 // bits
    single = np.unpackbits(rows, axis=1, bitorder="little")
    fields = single[:, : usable * bits].reshape(len(rows), usable, bits) @ (1 << np.arange(bits))
    lower = (fields - 1) % (1 << bits)
    single[:, : usable * bits] = (lower[..., None] >> np.arange(bits) & 1).reshape(len(rows), -1)
    packed = np.packbits(single, axis=1, bitorder="little")
    return packed if words is None else np.ascontiguousarray(packed.view(np.int32).T).view(np.uint8)


def _other_zeros_dense(raw: U8, linear: source.Arrays) -> U8:
    """Weights of q - (z - 1): one step higher."""
    weight = raw.view(np.float16)
    step = np.repeat(linear.scale, linear.codes.shape[1] // linear.scale.shape[1], axis=1).reshape(-1)
    return (weight.astype(np.float32) + step).astype(np.float16).view(np.uint8)


def _other_zeros_gguf(checkpoint: PackedCheckpoint, name: str, linear: source.Arrays, kind: str) -> U8:
    """The blocks of the linear with other zero points: one lower, or for Q2_0, which has two, the other one."""
    zero_point = 3 - linear.zero_point if kind == "Q2_0" else _one_lower(linear)
    codes = np.minimum(linear.codes, 14) if kind == "Q4_0" else linear.codes  # 15 - 7 + 8 is no nibble
    order = gguf_model.row_order(checkpoint, name + ".weight")
    rows = slice(None) if order is None else order
    return TYPES[kind].encode(codes[rows], zero_point[rows], linear.scale[rows])


def tensor_places(out: Path) -> dict[str, Place]:
    """Every tensor of a safetensors directory."""
    places = {}
    for file in sorted(out.glob("*.safetensors")):
        for name, entry in read_header(file).items():
            places[name] = Place(file, entry.begin, entry.bytes, entry.shape, entry.dtype)
    return places


def _in_gguf(file: Path, name: str) -> Place:
    entry = open_gguf(file).tensors[name]
    return Place(file, entry.offset, entry.bytes, entry.shape, entry.type_name)


def label(path: Path) -> str:
    """The name of a checkpoint: that of its run, when it is a run's stage."""
    path = path.absolute()
    return path.parent.name if path.name in ("pack", "import") else path.name


def commit() -> str:
    """The commit of this checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def machine() -> str:
    """What the figures were taken on."""
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{os.cpu_count()} CPU cores ({platform.machine()}, {capability}), Python {platform.python_version()}"


def heading(columns: Sequence[str]) -> str:
    """The first two lines of a Markdown table."""
    return "| " + " | ".join(columns) + " |\n|" + "---|" * len(columns)


def line(row: Mapping[str, Any], columns: Sequence[str]) -> str:
    """One line of a Markdown table."""
    cells = (str(row.get(column, "")).replace("|", "\\|").replace("\n", "\\n") for column in columns)
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.exit(main())
