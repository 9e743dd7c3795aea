"""A GGUF file as a safetensors folder, made once and kept under the cache directory.

In fp32, because dequantized values do not fit 16 bits exactly. transformers reads the weights, but (5.23) not how far
positions are stretched: of `rope.scaling.*` and `rope_freqs.weight` it makes a model without them. They are read here.
"""

from __future__ import annotations

import importlib.util
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qatcli.errors import InputError, missing_extra
from qatcli.gguf_container import Stored, read_container
from qatcli.inputs import read_json, sha256
from qatcli.models.refusal import refused

LAYOUT = 3  # of the folder: another number makes it anew
_HINT = "take the model's safetensors instead of this file"
_FREQUENCIES, _LONG = "rope_freqs.weight", "rope_factors_long.weight"
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def cache_directory() -> Path:
    """Where converted models are kept: `$XDG_CACHE_HOME/qat`, else `~/.cache/qat`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qat"


def converted(file: Path) -> Path:
    """Where the converted form of a GGUF file is kept, whether it was made already or not."""
    return cache_directory() / f"gguf-{LAYOUT}-{sha256(file)[:16]}"


def convert(file: Path) -> Path:
    """The converted form of a GGUF file. InputError when it does not exist, or cannot be read as what it is."""
    if not file.is_file():
        raise InputError(f"{file} does not exist", hint="name a GGUF file that is there")
    if importlib.util.find_spec("gguf") is None:
        raise missing_extra("gguf", "gguf")
    target = converted(file)
    if target.is_dir():
        return target
    fields, tensors = read_container(file)
    _check_types(file, tensors)
    with refused(f"{file}: transformers cannot read this GGUF file"):
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    there, made = (sum(name.endswith(".bias") for name in names) for names in (tensors, model.state_dict()))
    if there > made:
        raise InputError(f"{file} has {there} biases, the model that transformers makes of it {made}", hint=_HINT)
    add_rope_scaling(model.config, file, fields, tensors)
    # The weights are dense now; leaving the GGUF quantizer attached would save them as GGUF blocks again.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=target.name, dir=target.parent, ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary, "model")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        _name_tokenizer(folder / "tokenizer_config.json")
        try:
            folder.rename(target)
        except OSError:
            if not target.is_dir():  # else another process converted the same file meanwhile
                raise
    return target


def add_rope_scaling(config: Any, file: Path, fields: dict[str, Any], tensors: dict[str, Stored]) -> None:
    """Give a configuration that transformers read the file's scaling of positions, and what Gemma 3 divides by.

    llama.cpp's names (gguf-py, constants.Keys.Rope). InputError for a scaling that transformers cannot be told of.
    """
    kind = fields["general.architecture"]
    if kind == "gemma3":  # no key says it: llama.cpp knows the model of 27B by its layers
        width = config.hidden_size // config.num_attention_heads
        config.query_pre_attn_scalar = width if config.num_hidden_layers == 62 else config.head_dim
    prefix = f"{kind}.rope.scaling."
    said = {key.removeprefix(prefix): value for key, value in fields.items() if key.startswith(prefix)}
    said.pop("finetuned", None)
    rope = getattr(config, "rope_parameters", None)
    if rope is None or kind == "gpt-oss":  # the one whose scaling transformers reads
        return
    rope = rope.get("full_attention", rope)
    name = "longrope" if _LONG in tensors else said.pop("type", "none")
    factor, context = said.pop("factor", 0.0), said.pop("original_context_length", None)
    if _FREQUENCIES in tensors:
        factors = _vector(file, tensors[_FREQUENCIES])
        rope |= {"rope_type": "llama3", "factor": float(factors.max()), **_LLAMA3}
        plain = rope["rope_theta"] ** (-np.arange(len(factors)) / len(factors))
        scaled = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0].numpy()
        known = not said and np.allclose(plain / scaled, factors, rtol=1e-3)
    elif name == "none":
        known = True
    else:
        rope |= {"rope_type": name, "factor": float(factor)}
        rope |= {"original_max_position_embeddings": context} if name == "yarn" else {}
        known = not said and factor > 0 and (name == "linear" or (name == "yarn" and bool(context)))
    if not known:
        keys = ", ".join(key for key in [*fields, *tensors] if key.startswith((prefix, _FREQUENCIES, _LONG)))
        raise InputError(f"{file} scales positions as transformers cannot be told ({keys})", hint=_HINT)


def _vector(file: Path, entry: Stored) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.fromfile(file, "<f4", entry.shape[0], offset=entry.offset)


def _check_types(file: Path, tensors: dict[str, Stored]) -> None:
    """InputError for a type of block that gguf-py does not know, as our own Q2_0 of 64 weights."""
    from gguf import GGMLQuantizationType

    known = {int(number) for number in GGMLQuantizationType}
    for name, entry in tensors.items():
        if entry.type_id not in known:
            raise InputError(
                f"{file}: the installed gguf cannot read {name}, of ggml type {entry.type_id}",
                hint="take the checkpoint that the file was made from",
            )


def _name_tokenizer(file: Path) -> None:
    """Name the tokenizer's class as transformers 4 does, too: exports carry this file to what was written for it."""
    settings = read_json(file)
    file.write_text(json.dumps(settings | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2), encoding="utf-8")
