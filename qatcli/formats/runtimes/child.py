"""One task of a verification in its own process: `python -m qatcli.formats.runtimes.child TASK CHECKPOINT OUT RESULT`.

Writes RESULT.json, the `Finding`, and, where the runtime computes them, RESULT.npy: fp32 logits [B, T, V] of
`prompts`. A fifth argument names a .npy file of token ids [W, T]: then their perplexity and a continuation of `PROMPT`
are measured, too. TASK is a key of `RUNTIMES`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from qatcli.formats import source
from qatcli.formats.compare import TensorFiles
from qatcli.formats.compressed_tensors import SUFFIXES as PARTS
from qatcli.formats.gguf_tokenizer import load_tokenizer
from qatcli.formats.runtimes.loaders import LOADERS, Loaded
from qatcli.formats.runtimes.reference import dense_weight, perplexity, prompts
from qatcli.packed import PackedCheckpoint, read_config

TEXT = "Hello, world! It's 2024: the 3 dogs (and 12345 cats)\nran  home. caf\u00e9 \u4f60\u597d"
PROMPT, TOKENS = "The capital of France is", 12
ULP = 2.0**-10  # of fp16, relative: the library dequantizes in fp16, we in fp32


@dataclass
class Finding:
    """What a task found."""

    runtime: str
    differences: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    perplexity: float | None = None
    text: str | None = None


Task = Callable[[PackedCheckpoint, Path], tuple[Finding, Loaded | None]]


def in_runtime(task: str, checkpoint: PackedCheckpoint, out: Path) -> tuple[Finding, Loaded]:
    """A runtime that loads the export: the weights that it computes with and its tokens, where it has them to show."""
    loaded = LOADERS[task](out)
    finding = Finding(loaded.name)
    if loaded.weight is not None:
        modules = dict(loaded.model.named_modules())
        with torch.inference_mode():
            weights = ((name, loaded.weight(modules[name]).float().numpy()) for name in checkpoint.modules)
            _compare_weights(checkpoint, weights, finding, loaded.expected)
    if loaded.tokenize is not None:
        expected, found = load_tokenizer(checkpoint.path)(TEXT)["input_ids"], loaded.tokenize(TEXT)
        if found != expected:
            finding.differences.append(f"{task} tokenizes to {found[:12]}..., the tokenizer to {expected[:12]}...")
    return finding, loaded


def in_compressed_tensors(checkpoint: PackedCheckpoint, out: Path) -> tuple[Finding, Loaded | None]:
    """compressed-tensors decompresses every linear; transformers loads the model unless its linears differ in kind."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    finding = Finding(f"compressed-tensors {version('compressed-tensors')}")
    schemes = QuantizationConfig.model_validate(read_config(out)["quantization_config"]).config_groups.values()
    files = TensorFiles.open(out)

    def weights() -> Iterator[tuple[str, NDArray[np.float32]]]:
        for name in checkpoint.modules:
            named = [scheme for scheme in schemes if name in scheme.targets]
            scheme = named[0] if named else next(s for s in schemes if "Linear" in s.targets)
            parts = {part: f"{name}.{part}" for part in PARTS if f"{name}.{part}" in files.shards}
            state = {part: files.tensor(stored) for part, stored in parts.items()}
            dense = BaseCompressor.get_value_from_registry(scheme.format).decompress(state, scheme)
            yield name, dense["weight"].float().numpy()

    _compare_weights(checkpoint, weights(), finding)
    if len(schemes) > 1:
        finding.notes.append("logits not compared: transformers reads one config group and this model has several")
        return finding, None
    loaded = LOADERS["compressed-tensors"](out)
    finding.runtime = loaded.name
    return finding, loaded


def in_gguf(checkpoint: PackedCheckpoint, out: Path) -> tuple[Finding, None]:
    """gguf-py's reader and dequantizer."""
    from qatcli.formats.runtimes.gguf_files import check_with_gguf_py

    return Finding(f"gguf {version('gguf')}", *check_with_gguf_py(checkpoint, out)), None


APART: dict[str, Task] = {"compressed-tensors": in_compressed_tensors, "gguf": in_gguf}
"""Tasks that do more than load, or less; the others are `in_runtime`."""


def _compare_weights(
    checkpoint: PackedCheckpoint,
    weights: Iterator[tuple[str, NDArray[np.float32]]],
    finding: Finding,
    expected: Callable[[source.Arrays], NDArray[np.float32]] = dense_weight,
) -> None:
    """Dequantized weights must equal ours up to the rounding of fp16."""
    for name, weight in weights:
        ours = expected(source.arrays(checkpoint, name))
        wrong = np.count_nonzero(np.abs(weight - ours) > ULP * np.abs(ours))
        if wrong:
            finding.differences.append(f"{finding.runtime} reads {wrong} of {ours.size} weights of {name} differently")
    if not finding.differences:
        finding.notes.append(f"{finding.runtime} dequantized {len(checkpoint.modules)} linears, equal to one fp16 ulp")


def _continuation(loaded: Loaded, checkpoint: PackedCheckpoint) -> str:
    """`TOKENS` greedy tokens after `PROMPT`, as text."""
    tokenizer = load_tokenizer(checkpoint.path)
    ids = loaded.tokenize(PROMPT) if loaded.tokenize else tokenizer(PROMPT)["input_ids"]
    start = len(ids)
    for _ in range(TOKENS):
        ids = [*ids, int(loaded.logits(ids)[-1].argmax())]
    return str(tokenizer.decode(ids[start:]))


def main(task: str, checkpoint_path: str, out: str, result: str, windows: str = "") -> None:
    """Run one task and write its result."""
    torch.manual_seed(0)
    checkpoint = PackedCheckpoint.open(Path(checkpoint_path))
    finding, loaded = APART.get(task, partial(in_runtime, task))(checkpoint, Path(out))
    if loaded is not None:
        asked = prompts(checkpoint.config["vocab_size"]).tolist()
        np.save(Path(result).with_suffix(".npy"), np.stack([loaded.logits(ids) for ids in asked]))
    if loaded is not None and windows:
        finding.perplexity = perplexity(loaded.logits, np.load(windows))
        finding.text = _continuation(loaded, checkpoint)
    Path(result).with_suffix(".json").write_text(json.dumps(asdict(finding)), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
