"""A model to quantize: a local folder, a hub id or a GGUF file, read one tensor at a time."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from qatcli.errors import InputError
from qatcli.failures import own_error
from qatcli.models.gguf import convert
from qatcli.models.refusal import load_complete, refused
from qatcli.packed import companion_files, read_config
from qatcli.shards import TensorEntry, load_tensors, read_header, shard_map

FINGERPRINT_BYTES = 1024  # of every tensor
MOST_LAYERS = 1000
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.tiktoken", "*.txt", "*.jinja", "*.py"]
HUB_DUPLICATES = ["consolidated*", "original/*"]  # the same weights once more, in their maker's own layout


@dataclass(frozen=True)
class ModelSource:
    """A full-precision model directory. `fingerprint` identifies its config and, by samples, its weights; `gguf` is the
    file that it was converted from, if it was."""

    path: Path
    trust_remote_code: bool
    fingerprint: str
    shards: dict[str, str] = field(repr=False)  # tensor name -> file name
    shapes: dict[str, tuple[int, ...]] = field(repr=False)
    gguf: Path | None = None

    def config(self) -> Any:
        """The transformers configuration."""
        with refused(f"{self.path}: transformers does not accept its config.json"):
            return AutoConfig.from_pretrained(self.path, trust_remote_code=self.trust_remote_code)

    def tokenizer(self) -> Any:
        """The tokenizer that travels with the model."""
        return load_tokenizer(self.path, trust_remote_code=self.trust_remote_code)

    @property
    def quantized(self) -> bool:
        """Whether the config says that the weights are codes, which what reads single tensors takes for weights."""
        config = read_config(self.path)
        return "quantization_config" in config or bool(config.get("quantization"))

    def bytes(self, *, fp32: bool = False) -> int:
        """Of all weights, as they are stored or in fp32."""
        if fp32:
            return 4 * sum(math.prod(shape) for shape in self.shapes.values())
        return sum((self.path / file).stat().st_size for file in set(self.shards.values()))

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors, in the dtype of the file. InputError when one is absent or its file is damaged."""
        by_file: dict[str, list[str]] = {}
        for name in names:
            if name not in self.shards:
                raise InputError(f"{self.path} has no tensor `{name}`", hint="is the checkpoint complete?")
            by_file.setdefault(self.shards[name], []).append(name)
        tensors: dict[str, Tensor] = {}
        for file, wanted in by_file.items():
            tensors |= load_tensors(self.path / file, wanted)
        return tensors

    def load_model(self, dtype: torch.dtype | str, device: torch.device) -> Any:
        """The whole model, to be evaluated. InputError when it does not load, or not all."""
        return load_complete(self.path, dtype=dtype, trust_remote_code=self.trust_remote_code).to(device).eval()


def load_tokenizer(path: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer in a model directory. InputError when there is none that loads."""
    companion_files(path)  # for links that lead out
    with refused(f"{path} has no tokenizer that loads"):
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)


@contextmanager
def fetching(repo: str) -> Iterator[None]:
    """InputError for whatever goes wrong between the hub and us, but for a full disk or memory."""
    from huggingface_hub.errors import HFValidationError

    try:
        yield
    except Exception as error:  # the hub client raises a different class for every way a network fails
        if any(isinstance(each, HFValidationError) for each in (error, error.__cause__)):
            hint = "give the path of a folder or file that exists, or a name such as meta-llama/Llama-2-7b-hf"
            raise InputError(f"{repo} is neither a folder, a GGUF file nor a hub id", hint=hint) from error
        if own := own_error(error):
            raise own from error
        raise InputError(
            f"{repo} could not be fetched from the hub: {error}",
            hint="check the name and the network, log in for gated models, or give a local folder",
        ) from error


def open_source(
    source: str, *, revision: str | None = None, gguf_file: str | None = None, trust_remote_code: bool = False
) -> ModelSource:
    """The model at a folder, a GGUF file or a hub id. InputError when it cannot be had or holds no safetensors."""
    path = Path(source)
    if not path.exists():
        path = _download(source, revision, gguf_file)
    elif gguf_file:
        path /= gguf_file
    elif path.is_file() and path.suffix != ".gguf":
        raise InputError(f"{source} is a file but not .gguf", hint="give a model folder or a GGUF file")
    gguf = None if path.is_dir() else path
    if gguf is not None:
        path = convert(gguf)
    check_config(path, trust_remote_code=trust_remote_code)
    shards = shard_map(path)
    headers = {file: read_header(path / file) for file in sorted(set(shards.values()))}
    shapes = {name: entry.shape for header in headers.values() for name, entry in header.items()}
    return ModelSource(path, trust_remote_code, _fingerprint(path, headers), shards, shapes, gguf)


def check_config(path: Path, *, trust_remote_code: bool) -> None:
    """InputError for a config.json that must not reach transformers.

    It names attention code to be fetched from the hub and executed, layers that would be built one by one for days, or
    a file of weights that transformers would read and we would not.
    """
    config = read_config(path)
    if named := config.get("transformers_weights"):
        hint = "take the key out, and give the file the name model.safetensors"
        raise InputError(f"{path}/config.json: transformers_weights is {json.dumps(named)}", hint=hint)
    for key in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
        if isinstance(config.get(key), int) and not 0 < config[key] <= MOST_LAYERS:
            raise InputError(f"{path}/config.json: {key} is {config[key]}", hint="restore the config.json of the model")
    keys = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
    chosen = [json.dumps(config[key]) for key in keys if "/" in json.dumps(config.get(key))]
    if chosen and not trust_remote_code:
        raise InputError(
            f"{path}/config.json asks for code from the hub: {', '.join(chosen)}",
            hint="remove the key, or set model.trust_remote_code if you trust who wrote it",
        )


def _download(repo: str, revision: str | None, gguf_file: str | None) -> Path:
    """The hub's snapshot, or one GGUF file of it."""
    from huggingface_hub import hf_hub_download, snapshot_download

    with fetching(repo):
        if gguf_file:
            return Path(hf_hub_download(repo, gguf_file, revision=revision))
        return Path(
            snapshot_download(repo, revision=revision, allow_patterns=HUB_FILES, ignore_patterns=HUB_DUPLICATES)
        )


def _fingerprint(path: Path, headers: dict[str, dict[str, TensorEntry]]) -> str:
    """sha256 over config.json and, of every tensor, name, type, shape and the first bytes.

    Not over all bytes, which takes minutes for a large model: any training changes the beginning of a tensor, too.
    """
    digest = hashlib.sha256((path / "config.json").read_bytes())
    for file, entries in headers.items():
        with open(path / file, "rb") as handle:
            for name in sorted(entries):
                entry = entries[name]
                handle.seek(entry.begin)
                start = handle.read(min(entry.bytes, FINGERPRINT_BYTES))
                digest.update(f"{name} {entry.dtype} {entry.shape} ".encode() + start)
    return digest.hexdigest()
