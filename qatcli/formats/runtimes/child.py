"""One task of a verification, in its own process: `python -m qatcli.formats.runtimes.child TASK CHECKPOINT OUT RESULT`.

Writes RESULT.json {runtime, differences, notes} and, where the task computes them, RESULT.npy: fp32 logits [B, T, V]
of `prompts`. TASK is a key of `RUNTIMES`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qatcli.formats import source
from qatcli.formats.compare import TensorFiles
from qatcli.formats.compressed_tensors import SUFFIXES as PARTS
from qatcli.formats.runtimes.reference import dense_weight, logits, prompts
from qatcli.packed import PackedCheckpoint

TEXT = "Hello, world! It's 2024: the 3 dogs (and 12345 cats)\nran  home. caf\u00e9 \u4f60\u597d"
ULP = 2.0**-10  # of fp16, relative: the library dequantizes in fp16, we in fp32


@dataclass
class Finding:
    """What a task found."""

    runtime: str
    logits: NDArray[np.float32] | None = None
    differences: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def in_gptqmodel(checkpoint: PackedCheckpoint, out: Path) -> Finding:
    """GPTQModel's TorchLinear on the CPU: dequantized weights and logits."""
    from gptqmodel import BACKEND, GPTQModel

    awq = json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == "awq"
    backend = BACKEND.TORCH_AWQ if awq and hasattr(BACKEND, "TORCH_AWQ") else BACKEND.TORCH
    model = GPTQModel.load(str(out), device="cpu", backend=backend, dtype=torch.float16).model
    finding = Finding(f"gptqmodel {version('gptqmodel')}", logits(model))
    _compare_weights(checkpoint, _weights_by_identity(model, checkpoint), finding)
    return finding


def in_transformers(checkpoint: PackedCheckpoint, out: Path) -> Finding:
    """transformers with its own choice of kernel (optimum and gptqmodel)."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(out, device_map="cpu", dtype=torch.float16)
    return Finding(f"transformers {version('transformers')}", logits(model))


def in_transformers_dense(checkpoint: PackedCheckpoint, out: Path) -> Finding:
    """transformers, an ordinary dense checkpoint."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    return Finding(f"transformers {version('transformers')}", logits(model))


def in_compressed_tensors(checkpoint: PackedCheckpoint, out: Path) -> Finding:
    """compressed-tensors decompresses every linear; transformers loads the model unless its linears differ in kind."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    finding = Finding(f"compressed-tensors {version('compressed-tensors')}")
    settings = json.loads((out / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    schemes = QuantizationConfig.model_validate(settings).config_groups.values()
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
        return finding
    config = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(out, quantization_config=config, dtype=torch.float32)
    finding.logits = logits(model)
    return finding


def in_gguf(checkpoint: PackedCheckpoint, out: Path) -> Finding:
    """gguf-py's reader and dequantizer."""
    from qatcli.formats.runtimes.gguf_files import check_with_gguf_py

    differences, notes = check_with_gguf_py(checkpoint, out)
    return Finding(f"gguf {version('gguf')}", None, differences, notes)


def in_llama_cpp(checkpoint: PackedCheckpoint, out: Path) -> Finding:
    """llama.cpp on the CPU: tokens of a fixed text as the checkpoint's own tokenizer gives them, and logits."""
    from qatcli.formats.gguf_tokenizer import load_tokenizer
    from qatcli.formats.runtimes.llama_cpp import LlamaCpp

    finding = Finding(f"llama.cpp (xllamacpp {version('xllamacpp')})")
    with LlamaCpp(next(out.glob("*.gguf"))) as model:
        expected = load_tokenizer(checkpoint.path)(TEXT)["input_ids"]
        found = model.tokenize(TEXT)
        if found != expected:
            finding.differences.append(f"llama.cpp tokenizes to {found[:12]}..., the tokenizer to {expected[:12]}...")
        finding.logits = np.stack([model.logits(ids) for ids in prompts(checkpoint.config["vocab_size"]).tolist()])
    return finding


TASKS: dict[str, Callable[[PackedCheckpoint, Path], Finding]] = {
    "gptqmodel": in_gptqmodel,
    "transformers": in_transformers,
    "transformers-dense": in_transformers_dense,
    "compressed-tensors": in_compressed_tensors,
    "gguf": in_gguf,
    "llama.cpp": in_llama_cpp,
}


def _weights_by_identity(model: Any, checkpoint: PackedCheckpoint) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Weights as the kernel itself computes with them: the response to unit vectors. Biases are set to zero for it."""
    modules = dict(model.named_modules())
    for name, quant in checkpoint.modules.items():
        module = modules[name]
        if getattr(module, "bias", None) is not None:
            module.bias.data.zero_()
        with torch.inference_mode():
            columns = [module(rows).float() for rows in torch.eye(quant.in_features, dtype=torch.float16).split(1024)]
        yield name, torch.cat(columns).T.numpy()


def _compare_weights(
    checkpoint: PackedCheckpoint, weights: Iterator[tuple[str, NDArray[np.float32]]], finding: Finding
) -> None:
    """Dequantized weights must equal ours up to the rounding of fp16."""
    for name, weight in weights:
        expected = dense_weight(source.arrays(checkpoint, name))
        wrong = np.count_nonzero(np.abs(weight - expected) > ULP * np.abs(expected))
        if wrong:
            finding.differences.append(
                f"{finding.runtime} reads {wrong} of {expected.size} weights of {name} differently"
            )
    finding.notes.append(f"{finding.runtime} dequantized {len(checkpoint.modules)} linears, equal to one fp16 ulp")


def main(task: str, checkpoint: str, out: str, result: str) -> None:
    """Run one task and write its result."""
    torch.manual_seed(0)
    finding = TASKS[task](PackedCheckpoint.open(Path(checkpoint)), Path(out))
    facts = {"runtime": finding.runtime, "differences": finding.differences, "notes": finding.notes}
    Path(result).with_suffix(".json").write_text(json.dumps(facts), encoding="utf-8")
    if finding.logits is not None:
        np.save(Path(result).with_suffix(".npy"), finding.logits)


if __name__ == "__main__":
    main(*sys.argv[1:])
