"""The proof of `qat export`: every format of the given packed checkpoints, loaded where it is served.

    python benchmarks/export_matrix.py TEXT PACKED_DIR... [--formats gptq,gguf] [--windows 4] [--out FOLDER]

Prints a Markdown table for each checkpoint, one row per format and runtime: file size, bits per weight, integers equal
to the checkpoint's or not, largest logit difference, perplexity as that runtime computes it, and the text it writes.
`--out` also writes it as export_matrix_<checkpoint>.md and .json. Every runtime has a process of its own; one that
crashes is a row that says so. Exit code 1 when anything differs. What verification catches: export_faults.py.
Install what should load the exports: `pip install 'qatcli[gptq,gguf,runtimes]'`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from export_faults import commit, heading, label, line, machine, tensor_places
from numpy.typing import NDArray

from qatcli.errors import QatError
from qatcli.formats import FORMATS, ExportOptions
from qatcli.formats.gguf_compare import gguf_name
from qatcli.formats.gguf_readback import open_gguf
from qatcli.formats.gguf_tokenizer import load_tokenizer
from qatcli.formats.runtimes import obstacle, run
from qatcli.formats.runtimes.child import PROMPT, TOKENS
from qatcli.formats.runtimes.reference import Reference, dense_model, logits, perplexity, reference
from qatcli.packed import PackedCheckpoint

COLUMNS = (
    *("bits", "format", "file MB", "bits/weight", "integers equal", "loaded by"),
    *("largest logit difference", "tolerance", "perplexity", "text", "remarks"),
)
INTEGERS = ExportOptions(runtimes=False, awq_promote=True)
LIBRARIES = (
    *("torch", "transformers", "gptqmodel", "optimum", "compressed-tensors"),
    *("mlx", "mlx-lm", "gguf", "xllamacpp"),
)
Row = dict[str, Any]


def main() -> int:
    """Measure, print and write; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path, help="UTF-8 text whose perplexity is computed")
    parser.add_argument("packed", type=Path, nargs="+", help="directories that `qat pack` wrote")
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--windows", type=int, default=4, help="windows of text (default 4)")
    parser.add_argument("--context", type=int, default=256, help="tokens per window (default 256)")
    parser.add_argument("--out", type=Path, help="folder for export_matrix_<checkpoint>.md and .json")
    arguments = parser.parse_args()
    failed = False
    for path in arguments.packed:
        checkpoint = PackedCheckpoint.open(path)
        sheet = Sheet(label(path), conditions(arguments), arguments.out)
        ids = load_tokenizer(path)(arguments.text.read_text(encoding="utf-8")[:200_000])["input_ids"]
        windows = np.array(ids[: arguments.windows * arguments.context]).reshape(-1, arguments.context)
        expected = reference(checkpoint)
        sheet.add(baseline(checkpoint, windows))
        for name in arguments.formats.split(","):
            measure(sheet, checkpoint, name, windows, expected)
        failed = failed or sheet.failed
    return int(failed)


class Sheet:
    """The rows so far: printed when they are added, and written to --out, so that a run cut short leaves them."""

    def __init__(self, name: str, conditions: str, out: Path | None) -> None:
        self.rows: list[Row] = []
        self._name = name
        self._out = out
        self._conditions = conditions
        print(f"# Exports of {name}\n\n{conditions}\n\n{heading(COLUMNS)}", flush=True)

    def add(self, row: Row) -> None:
        """One more row."""
        self.rows.append(row)
        print(line(row, COLUMNS), flush=True)
        self._write()

    @property
    def failed(self) -> bool:
        """Whether integers differ or a runtime failed."""
        return any(row.get("integers equal") == "NO" or "FAILED" in row.get("loaded by", "") for row in self.rows)

    def _write(self) -> None:
        if self._out is None:
            return
        self._out.mkdir(parents=True, exist_ok=True)
        table = [heading(COLUMNS), *(line(row, COLUMNS) for row in self.rows)]
        text = "\n".join([f"# Exports of {self._name}", "", self._conditions, "", *table, ""])
        (self._out / f"export_matrix_{self._name}.md").write_text(text, encoding="utf-8")
        content = {"conditions": self._conditions, "exports": self.rows}
        file = self._out / f"export_matrix_{self._name}.json"
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def baseline(checkpoint: PackedCheckpoint, windows: NDArray[np.int64]) -> Row:
    """The row of the checkpoint itself, computed by plain torch from the canonical integers."""
    model = dense_model(checkpoint)
    found = perplexity(lambda ids: logits(model, np.array([ids]))[0], windows)
    return {
        "bits": bits_of(checkpoint),
        "format": "(checkpoint)",
        "loaded by": "torch, fp32",
        "perplexity": f"{found:.4f}",
    }


def measure(
    sheet: Sheet, checkpoint: PackedCheckpoint, name: str, windows: NDArray[np.int64], expected: Reference
) -> None:
    """Write one format, compare its integers, load it in each of its runtimes."""
    row: Row = {"bits": bits_of(checkpoint), "format": name}
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch, "out")
        try:
            FORMATS[name].write(checkpoint, out, INTEGERS)
        except QatError as error:
            sheet.add({**row, "remarks": f"refused: {error.message}"})
            return
        found = FORMATS[name].verify(checkpoint, out, INTEGERS)
        size = sum(file.stat().st_size for file in [*out.glob("*.safetensors"), *out.glob("*.gguf")])
        row |= {
            "file MB": f"{size / 1e6:.1f}",
            "bits/weight": f"{bits_per_weight(checkpoint, out):.3f}",
            "integers equal": "yes" if found.passed else "NO",
        }
        remarks = (*found.notes, *found.differences[:3])
        for runtime in FORMATS[name].runtimes:
            report = load(runtime, checkpoint, out, windows, expected)
            sheet.add({**row, **report, "remarks": "; ".join([*remarks, *report["remarks"]])})
            remarks = ()
        if not FORMATS[name].runtimes:
            sheet.add({**row, "loaded by": "no runtime without CUDA", "remarks": "; ".join(remarks)})


def load(runtime: str, checkpoint: PackedCheckpoint, out: Path, windows: NDArray[np.int64], expected: Reference) -> Row:
    """What one runtime made of the export."""
    why_not = obstacle(runtime, checkpoint, out)
    if why_not:
        return {"loaded by": f"not loaded: {why_not}", "remarks": []}
    report = run(runtime, checkpoint, out, expected, windows=windows)
    row: Row = {
        "loaded by": f"FAILED: {report.runtime}" if report.differences else report.runtime,
        "remarks": [*report.differences[:3], *report.notes],
    }
    if report.max_logit_difference is not None:
        row |= {
            "largest logit difference": f"{report.max_logit_difference:.4f}",
            "tolerance": f"{report.logit_tolerance:.4f}",
        }
    if report.perplexity is not None:
        row |= {"perplexity": f"{report.perplexity:.4f}", "text": report.text}
    return row


def conditions(arguments: argparse.Namespace) -> str:
    """What the figures depend on, in one paragraph."""
    found = []
    for library in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{library} {version(library)}")
    names = " ".join(f"{label(path)}/{path.name}" for path in arguments.packed)
    formats = "" if arguments.formats == ",".join(FORMATS) else f" --formats {arguments.formats}"
    command = f"{arguments.text.name} {names} --windows {arguments.windows} --context {arguments.context}{formats}"
    return (
        f"`python benchmarks/export_matrix.py {command}` at commit {commit()}. "
        f"Perplexity: {arguments.text.name}, the first {arguments.windows} windows of {arguments.context} tokens that "
        f"do not overlap. Text: {TOKENS} greedy tokens after {PROMPT!r}. bits/weight: codes, scales and zero points of "
        f"the quantized linears as stored, over their weights. Tolerance: docs/export-formats.md. "
        f"{machine()}, {', '.join(found)}."
    )


def bits_per_weight(checkpoint: PackedCheckpoint, out: Path) -> float:
    """Stored bits of the quantized linears over their weights; biases are left out."""
    quantized = sum(quant.in_features * quant.out_features for quant in checkpoint.modules.values())
    if list(out.glob("*.gguf")):
        tensors = open_gguf(next(out.glob("*.gguf"))).tensors
        return (
            8 * sum(tensors[gguf_name(checkpoint, name + ".weight")].bytes for name in checkpoint.modules) / quantized
        )
    linears = set(checkpoint.modules)
    sizes = {name: entry.bytes for name, entry in tensor_places(out).items() if not name.endswith(".bias")}
    return 8 * sum(size for name, size in sizes.items() if name.rpartition(".")[0] in linears) / quantized


def bits_of(checkpoint: PackedCheckpoint) -> str:
    """The bit widths of a checkpoint, as text."""
    return "/".join(map(str, sorted({quant.bits for quant in checkpoint.modules.values()})))


if __name__ == "__main__":
    sys.exit(main())
