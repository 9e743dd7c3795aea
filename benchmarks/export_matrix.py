"""Every export format at the bits of the given packed checkpoints: size, who loaded it, what differs, perplexity.

    python benchmarks/export_matrix.py TEXT.txt PACKED_DIR... [--formats gptq,gguf] [--json rows.json]

Perplexity is measured over the same windows of 256 tokens for the checkpoint itself (transformers, fp32) and for GGUF
in llama.cpp. Install what should be compared: `pip install 'qatcli[gptq,gguf]' compressed-tensors xllamacpp`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qatcli.errors import QatError
from qatcli.formats import FORMATS, ExportOptions
from qatcli.formats.gguf_tokenizer import load_tokenizer
from qatcli.formats.runtimes.reference import dense_model, logits
from qatcli.packed import PackedCheckpoint

WINDOW, WINDOWS = 256, 4
PROMPT = "The capital of France is"
Logits = Callable[[list[int]], NDArray[np.float32]]
COLUMNS = (
    "bits",
    "format",
    "MB",
    "bits/weight",
    "integers equal",
    "largest logit difference",
    "perplexity",
    "verified by",
)


def main() -> None:
    """Export, verify and print one row per checkpoint and format."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("packed", type=Path, nargs="+")
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS), flush=True)
    rows = []
    for path in arguments.packed:
        checkpoint = PackedCheckpoint.open(path)
        ids = load_tokenizer(path)(arguments.text.read_text(encoding="utf-8")[:20_000])["input_ids"]
        reference = reference_perplexity(checkpoint, ids)
        print(f"| {bits_of(checkpoint)} | (checkpoint) | | | | | {reference:.4f} | transformers, fp32 |", flush=True)
        for name in arguments.formats.split(","):
            rows.append(row := measure(checkpoint, name, ids))
            print("| " + " | ".join(str(row.get(column, "")) for column in COLUMNS) + " |", flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def measure(checkpoint: PackedCheckpoint, name: str, ids: list[int]) -> dict[str, Any]:
    """One row of the table; the refusal instead where the format does not carry this checkpoint."""
    row: dict[str, Any] = {"bits": bits_of(checkpoint), "format": name}
    options = ExportOptions(awq_promote=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch, "out")
        try:
            FORMATS[name].write(checkpoint, out, options)
        except QatError as error:
            return {**row, "verified by": f"refused: {error.message}"}
        size = sum(file.stat().st_size for file in [*out.glob("*.safetensors"), *out.glob("*.gguf")])
        written = time.monotonic() - started
        verification = FORMATS[name].verify(checkpoint, out, options)
        row |= {
            "MB": round(size / 1e6, 1),
            "bits/weight": round(size * 8 / weights_of(checkpoint), 2),
            "integers equal": verification.codes_equal and verification.zero_points_equal and verification.scales_equal,
            "largest logit difference": verification.max_logit_difference,
            "tolerance": verification.logit_tolerance,
            "verified by": "; ".join([verification.verifier, *verification.differences]),
            "notes": verification.notes,
            "seconds to write": round(written, 1),
        }
        if name == "gguf" and importlib.util.find_spec("xllamacpp"):
            from qatcli.formats.runtimes.llama_cpp import LlamaCpp

            with LlamaCpp(next(out.glob("*.gguf"))) as model:
                row["perplexity"] = round(perplexity(model.logits, ids), 4)
                row["text"] = model.generate(PROMPT, 12)
    return row


def reference_perplexity(checkpoint: PackedCheckpoint, ids: list[int]) -> float:
    """Perplexity of the checkpoint itself."""
    model = dense_model(checkpoint)
    return perplexity(lambda window: logits(model, np.array([window]))[0], ids)


def perplexity(logits_of: Logits, ids: list[int]) -> float:
    """Perplexity over WINDOWS windows of WINDOW tokens that do not overlap."""
    losses = []
    for start in range(0, WINDOW * WINDOWS, WINDOW):
        window = ids[start : start + WINDOW]
        scores = logits_of(window)[:-1].astype(np.float64)
        scores -= scores.max(axis=-1, keepdims=True)
        chosen = scores[np.arange(len(scores)), window[1:]] - np.log(np.exp(scores).sum(axis=-1))
        losses.append(-chosen.mean())
    return float(np.exp(np.mean(losses)))


def bits_of(checkpoint: PackedCheckpoint) -> str:
    """The bit widths of a checkpoint, as text."""
    return "/".join(map(str, sorted({quant.bits for quant in checkpoint.modules.values()})))


def weights_of(checkpoint: PackedCheckpoint) -> int:
    """How many weights the model has, all tensors counted once."""
    dense = sum(checkpoint.tensor(name).numel() for name in checkpoint.dense_names())
    return dense + sum(quant.in_features * quant.out_features for quant in checkpoint.modules.values())


if __name__ == "__main__":
    main()
