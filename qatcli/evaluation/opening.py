"""Any model on disk as a candidate: told by what is in it, not by its name.

stage directory          calibration, quantized and packed ones, and every export
packed by qat (native)   runs on its packed codes
GPTQ, AWQ, AutoRound, BitBLAS, compressed-tensors, MLX, EfficientQAT
                         imported bit for bit into packed codes: one code measures all, on any device
GGUF file                dequantized to fp32
anything else of Hugging Face, or a hub id
                         as transformers loads it
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qatcli.directory import STAGE_FILE, open_stage
from qatcli.errors import InputError
from qatcli.evaluation.candidates import Candidate, full_precision, packed
from qatcli.formats.importing import import_checkpoint, require_importable, settings_of
from qatcli.formats.importing.linears import CODES
from qatcli.hf import load_packed
from qatcli.models.source import load_tokenizer, open_source
from qatcli.packed import QUANT_METHOD, read_config
from qatcli.recipe.locations import is_local
from qatcli.shards import shard_map

MODEL_KINDS = ("calibration", "quantized", "packed", "exported")


def open_candidate(target: str, device: torch.device, *, keep: bool = False) -> Candidate:
    """The model at `target`: a directory, a GGUF file or a hub id. InputError when it is none, or is damaged."""
    path = Path(target)
    if not path.exists() and is_local(target):
        hint = "give a model directory, a GGUF file, a hub id or a recipe"
        raise InputError(f"{target} does not exist", hint=hint)
    if (path / STAGE_FILE).is_file() and (kind := open_stage(path).kind) not in MODEL_KINDS:
        raise InputError(f"{path} holds a {kind}, not a model", hint="give another stage of the run, such as `pack`")
    if path.is_dir() and not any(path.glob("*.safetensors")):
        path = _only_gguf(path)
    if path.is_dir():
        quantization = settings_of(path, read_config(path))
        if quantization.get("quant_method") == QUANT_METHOD:
            return packed(target, path, device)
        if any(name.endswith(CODES) for name in shard_map(path)):
            require_importable(path)
            kind = str(quantization.get("checkpoint_format") or quantization.get("quant_method") or "EfficientQAT")
            load = partial(_import, path, device), partial(load_tokenizer, path)
            return Candidate(target, *load, path, f"{kind}, imported bit for bit")
    return full_precision(open_source(str(path)), device, keep=keep, name=target)


def _only_gguf(path: Path) -> Path:
    files = sorted(path.glob("*.gguf"))
    if len(files) != 1:
        found = f"{len(files)} GGUF files" if files else "neither safetensors nor a GGUF file"
        raise InputError(f"{path} holds {found}", hint="give a model directory with safetensors, or one GGUF file")
    return files[0]


def _import(path: Path, device: torch.device) -> Any:
    with tempfile.TemporaryDirectory(prefix="qat-eval-") as folder:
        import_checkpoint(path, Path(folder, "packed"))
        return load_packed(Path(folder, "packed"), dtype="auto", device=device)
