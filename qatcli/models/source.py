"""A model to quantize: a local folder, a hub id or a GGUF file, read one tensor at a time.

A GGUF file is converted once into a safetensors folder under the cache directory (`~/.cache/qat` or
`$XDG_CACHE_HOME/qat`), in fp32 because its dequantized values do not fit 16 bits exactly.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from qatcli.errors import InputError, missing_extra
from qatcli.packed import read_config
from qatcli.shards import INDEX, shard_map

HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


@dataclass(frozen=True)
class ModelSource:
    """A full-precision model directory. `fingerprint` identifies its config and the layout of its weights."""

    path: Path
    trust_remote_code: bool
    fingerprint: str
    shards: dict[str, str] = field(repr=False)  # tensor name -> file name

    def config(self) -> Any:
        """The transformers configuration."""
        try:
            return AutoConfig.from_pretrained(self.path, trust_remote_code=self.trust_remote_code)
        except (ValueError, OSError, KeyError) as error:
            raise InputError(f"{self.path}: transformers does not accept its config.json: {error}") from error

    def tokenizer(self) -> Any:
        """The tokenizer that travels with the model."""
        return load_tokenizer(self.path, trust_remote_code=self.trust_remote_code)

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors, in the dtype of the file. InputError when one is absent or its file is damaged."""
        by_file: dict[str, list[str]] = {}
        for name in names:
            if name not in self.shards:
                raise InputError(f"{self.path} has no tensor `{name}`", hint="is the checkpoint complete?")
            by_file.setdefault(self.shards[name], []).append(name)
        tensors: dict[str, Tensor] = {}
        for file, wanted in by_file.items():
            try:
                with safe_open(self.path / file, framework="pt") as handle:
                    tensors.update({name: handle.get_tensor(name) for name in wanted})
            except (SafetensorError, OSError) as error:
                raise InputError(f"{self.path / file} cannot be read: {error}") from error
        return tensors

    def load_model(self, dtype: torch.dtype | str, device: torch.device) -> Any:
        """The whole model, for the end-to-end teacher and for evaluation."""
        model = AutoModelForCausalLM.from_pretrained(self.path, dtype=dtype, trust_remote_code=self.trust_remote_code)
        return model.to(device).eval()


def load_tokenizer(path: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer in a model directory. InputError when there is none that loads."""
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise InputError(f"{path} has no tokenizer that loads: {error}") from error


def open_source(
    source: str, *, revision: str | None = None, gguf_file: str | None = None, trust_remote_code: bool = False
) -> ModelSource:
    """Resolve `model.source` to a local directory. InputError when it cannot be had or holds no safetensors."""
    path = Path(source)
    if path.is_file():
        if path.suffix != ".gguf":
            raise InputError(
                f"model.source {source} is a file but not .gguf", hint="give a model folder or a GGUF file"
            )
        path = _convert_gguf(path)
    elif path.is_dir() and gguf_file:
        path = _convert_gguf(path / gguf_file)
    elif not path.is_dir():
        path = _download(source, revision, gguf_file)
    read_config(path)
    shards = shard_map(path)
    return ModelSource(path, trust_remote_code, _fingerprint(path, shards), shards)


def cache_directory() -> Path:
    """Where converted models are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qat"


def _download(repo: str, revision: str | None, gguf_file: str | None) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        if gguf_file:
            return _convert_gguf(Path(hf_hub_download(repo, gguf_file, revision=revision)))
        return Path(snapshot_download(repo, revision=revision, allow_patterns=HUB_FILES))
    except HFValidationError as error:
        raise InputError(f"model.source {repo} is neither a folder, a GGUF file nor a hub id") from error
    except Exception as error:  # the hub client raises a different class for every way a network fails
        raise InputError(
            f"model.source {repo} could not be fetched from the hub: {error}",
            hint="check the name and the network, log in for gated models, or give a local folder",
        ) from error


def _convert_gguf(file: Path) -> Path:
    if not file.is_file():
        raise InputError(f"{file} does not exist")
    if importlib.util.find_spec("gguf") is None:
        raise missing_extra("gguf", "gguf")
    with open(file, "rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    target = cache_directory() / f"gguf-{digest[:16]}"
    if target.is_dir():
        return target
    try:
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except (ValueError, OSError, KeyError, NotImplementedError) as error:
        raise InputError(f"{file}: transformers cannot read this GGUF file: {error}") from error
    # The weights are dense now; leaving the GGUF quantizer attached would save them as GGUF blocks again.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=target.name, dir=target.parent))
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    try:
        temporary.rename(target)
    except OSError:  # another process converted the same file meanwhile
        shutil.rmtree(temporary)
    return target


def _fingerprint(path: Path, shards: dict[str, str]) -> str:
    """sha256 over config.json, the index and every shard's size and header."""
    digest = hashlib.sha256((path / "config.json").read_bytes())
    if (path / INDEX).is_file():
        digest.update((path / INDEX).read_bytes())
    for name in sorted(set(shards.values())):
        with open(path / name, "rb") as handle:
            header_length = int.from_bytes(handle.read(8), "little")
            digest.update(f"{name} {(path / name).stat().st_size}".encode() + handle.read(header_length))
    return digest.hexdigest()
