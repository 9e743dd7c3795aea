"""The packed checkpoint: the one form of a quantized model, from block-ap's output to what `pack` publishes.

A Hugging Face safetensors directory in which a quantized linear `X` has, in place of `X.weight`:

    X.weight_packed      int32 [N, ceil(K*bits/32)]   codes, a dense little-endian bitstream along K
    X.weight_scale       float [N, G]                 step sizes; fp32 while training, fp16 as published
    X.weight_zero_point  int32 [ceil(N*bits/32), G]   zero points, a dense little-endian bitstream along N

with N = out_features, K = in_features, G = K / group_size and W = (codes - zero_point) * scale. This is the tensor
layout of compressed-tensors' "pack-quantized" (dense since 0.18), so exporting to it moves no bits.
`config.json["quantization_config"]` names every quantized linear with its bits and group size: nothing is inferred
from shapes or file names. Format reference: docs/checkpoint-format.md.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat_kernels import dequantize, pack, unpack
from qatcli.casting import dtype_name
from qatcli.errors import InputError
from qatcli.inputs import file_inside, read_json
from qatcli.shards import ShardWriter, load_tensors, read_header, shard_map

FORMAT_VERSION = 1
QUANT_METHOD = "qat"
PACKED, SCALE, ZERO_POINT = ".weight_packed", ".weight_scale", ".weight_zero_point"
HEAD = "lm_head.weight"
COMPANIONS = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "spiece.model"),
    *("generation_config.json", "chat_template*", "*.tiktoken"),
)
DTYPE_KEYS = ("dtype", "torch_dtype")  # of config.json: transformers 5's, and what other readers know
CODE = "*.py"  # of a model whose configuration says that it has its own (model.trust_remote_code)


@dataclass(frozen=True)
class ModuleQuant:
    """How one linear is quantized; group_size -1 means one group per row."""

    bits: int
    group_size: int
    in_features: int
    out_features: int

    @property
    def kind(self) -> tuple[int, int]:
        """Bits and group size."""
        return self.bits, self.group_size

    @property
    def weights(self) -> int:
        """How many weights the linear has."""
        return self.in_features * self.out_features

    @property
    def groups(self) -> int:
        """Groups of one row."""
        return 1 if self.group_size < 0 else self.in_features // self.group_size


@dataclass(frozen=True)
class QuantizedLinear:
    """One linear in canonical form: W = (codes - zero_point) * scale.

    codes uint8 [N, K] in 0..2^bits-1; scale float [N, G]; zero_point uint8 [N, G]; bias float [N] or None.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    bits: int
    group_size: int
    bias: Tensor | None = None

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        return self.codes.shape[1]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight [N, K] in `dtype`."""
        return dequantize(
            pack(self.codes, bits=self.bits),
            self.scale,
            self.zero_point,
            bits=self.bits,
            group_size=self.group_size,
            in_features=self.in_features,
            dtype=dtype,
        )


def module_quant(linear: QuantizedLinear) -> ModuleQuant:
    """The config.json entry of a quantized linear."""
    return ModuleQuant(linear.bits, linear.group_size, linear.in_features, linear.out_features)


def pack_linear(name: str, linear: QuantizedLinear) -> dict[str, Tensor]:
    """The checkpoint tensors of one quantized linear, bias included."""
    tensors = {
        name + PACKED: pack(linear.codes, bits=linear.bits),
        name + SCALE: linear.scale.contiguous(),
        name + ZERO_POINT: pack_zero_point(linear.zero_point, bits=linear.bits),
    }
    if linear.bias is not None:
        tensors[name + ".bias"] = linear.bias.contiguous()
    return tensors


def pack_zero_point(zero_point: Tensor, *, bits: int) -> Tensor:
    """Zero points uint8 [N, G] -> int32 [ceil(N*bits/32), G], dense along N."""
    return pack(zero_point.T.contiguous(), bits=bits).T.contiguous()


def unpack_zero_point(packed: Tensor, *, bits: int, out_features: int) -> Tensor:
    """The inverse of `pack_zero_point`: uint8 [N, G]."""
    return unpack(packed.T.contiguous(), bits=bits, length=out_features).T.contiguous()


def quantization_config(
    modules: Mapping[str, ModuleQuant], *, bits: int, group_size: int, symmetric: bool, scale_dtype: torch.dtype
) -> dict[str, Any]:
    """The `quantization_config` entry of a packed checkpoint's config.json."""
    return {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "bits": bits,
        "group_size": group_size,
        "symmetric": symmetric,
        "scale_dtype": dtype_name(scale_dtype),
        "modules": {name: asdict(modules[name]) for name in sorted(modules)},
    }


@dataclass(frozen=True)
class PackedCheckpoint:
    """A packed checkpoint on disk, read one tensor at a time."""

    path: Path
    config: dict[str, Any]
    modules: dict[str, ModuleQuant]
    shards: dict[str, str] = field(repr=False)  # tensor name -> file name

    @classmethod
    def open(cls, path: Path) -> PackedCheckpoint:
        """Read config, index and headers.

        InputError when `path` is not a packed checkpoint, is incomplete, or holds other shapes than its config says.
        """
        config = read_config(path)
        quantization = config.get("quantization_config")
        found = quantization.get("quant_method", "none") if isinstance(quantization, dict) else "none"
        if not isinstance(quantization, dict) or found != QUANT_METHOD:
            raise InputError(
                f"{path} is not a packed qat checkpoint: quantization_config.quant_method is {found}",
                hint="give the directory that `qat block-ap`, `qat e2e-qp` or `qat pack` wrote",
            )
        if quantization.get("format_version") != FORMAT_VERSION:
            raise InputError(
                f"{path} has packed format {quantization.get('format_version')}; this qat reads {FORMAT_VERSION}",
                hint="install the qatcli release that wrote it, or make the checkpoint again",
            )
        try:
            modules = {name: _read_quant(entry) for name, entry in quantization["modules"].items()}
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise InputError(f"{path}/config.json: quantization_config.modules is malformed ({error})") from error
        if not modules:
            raise InputError(f"{path} has no quantized linear", hint="there is nothing to train or to export")
        shards = shard_map(path)
        missing = [n + s for n in modules for s in (PACKED, SCALE, ZERO_POINT) if n + s not in shards]
        if missing:
            raise InputError(f"{path} lacks {len(missing)} tensors of quantized linears, first: {missing[0]}")
        _check_shapes(path, modules, shards)
        checkpoint = cls(path, config, modules, shards)
        if config.get("tie_word_embeddings") and checkpoint._has_own_head():
            config["tie_word_embeddings"] = False  # transformers goes by the tensors, other runtimes by the config
        return checkpoint

    def tensor(self, name: str) -> Tensor:
        """One tensor by its name in the file."""
        return load_tensors(self.path / self.shards[name], [name])[name]

    def linear(self, name: str) -> QuantizedLinear:
        """One quantized linear in canonical form."""
        quant = self.modules[name]
        zero_point = self.tensor(name + ZERO_POINT)
        return QuantizedLinear(
            codes=unpack(self.tensor(name + PACKED), bits=quant.bits, length=quant.in_features),
            scale=self.tensor(name + SCALE),
            zero_point=unpack_zero_point(zero_point, bits=quant.bits, out_features=quant.out_features),
            bits=quant.bits,
            group_size=quant.group_size,
            bias=self.tensor(name + ".bias") if name + ".bias" in self.shards else None,
        )

    def dense_names(self) -> list[str]:
        """Names of the tensors that belong to no quantized linear."""
        quantized = {n + s for n in self.modules for s in (PACKED, SCALE, ZERO_POINT, ".bias")}
        return [name for name in self.shards if name not in quantized]

    def _has_own_head(self) -> bool:
        """Whether there is an output head beside the embeddings, and not the same values."""
        dense = self.dense_names()
        head = self.tensor(HEAD) if HEAD in dense else None
        others = (self.tensor(name) for name in dense if name != HEAD and ("embed" in name or "wte" in name))
        return head is not None and not any(torch.equal(head, other) for other in others)


class PackedWriter:
    """Writes a packed checkpoint shard by shard; `close` adds the index and config.json."""

    def __init__(self, path: Path, *, max_shard_bytes: float = 5e9) -> None:
        self.modules: dict[str, ModuleQuant] = {}
        self._path = path
        self._shards = ShardWriter(path, max_shard_bytes=max_shard_bytes)

    def add_linear(self, name: str, linear: QuantizedLinear) -> None:
        """Add one quantized linear."""
        self.modules[name] = module_quant(linear)
        for tensor_name, tensor in pack_linear(name, linear).items():
            self._shards.add(tensor_name, tensor)

    def add_tensor(self, name: str, tensor: Tensor) -> None:
        """Add one unquantized tensor."""
        self._shards.add(name, tensor)

    def close(self, config: Mapping[str, Any]) -> None:
        """Finish the shards and write `config` (with its quantization_config) as config.json."""
        self._shards.close()
        write_config(self._path, config)


def _read_quant(entry: Mapping[str, Any]) -> ModuleQuant:
    """An entry of quantization_config.modules. TypeError or ValueError when it describes no quantized linear."""
    quant = ModuleQuant(**entry)
    numbers = (quant.bits, quant.group_size, quant.in_features, quant.out_features)
    if not all(isinstance(number, int) for number in numbers) or quant.bits not in (2, 3, 4, 8):
        raise ValueError(f"not a quantized linear: {quant}")
    sizes = (quant.in_features, quant.out_features)
    if min(sizes) < 1 or not (quant.group_size == -1 or (quant.group_size > 0 and sizes[0] % quant.group_size == 0)):
        raise ValueError(f"sizes that make no groups: {quant}")
    return quant


def _check_shapes(path: Path, modules: Mapping[str, ModuleQuant], shards: Mapping[str, str]) -> None:
    """InputError for the first tensor of a quantized linear that has another type or shape than config.json implies."""
    headers = {file: read_header(path / file) for file in set(shards.values())}
    for name, file in shards.items():
        if name not in headers[file]:
            raise InputError(f"{path / file} has no tensor {name}", hint="copy or make the checkpoint again")
    for name, quant in modules.items():
        rows, columns = quant.out_features, quant.in_features
        expected = {
            PACKED: ([rows, -(-columns * quant.bits // 32)], ("I32",)),
            SCALE: ([rows, quant.groups], ("F16", "BF16", "F32")),
            ZERO_POINT: ([-(-rows * quant.bits // 32), quant.groups], ("I32",)),
        }
        for suffix, (shape, types) in expected.items():
            entry = headers[shards[name + suffix]][name + suffix]
            if list(entry.shape) != shape or entry.dtype not in types:
                raise InputError(
                    f"{path}: {name}{suffix} is {entry.dtype} {list(entry.shape)}, but config.json implies "
                    f"{' or '.join(types)} {shape}",
                    hint="weights and config.json are of different models; copy or make the checkpoint again",
                )


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a model directory. InputError when it is absent or not a JSON object."""
    if not (path / "config.json").exists():
        raise InputError(f"{path} is not a model directory: it has no config.json")
    return read_json(file_inside(path, "config.json"))


def write_config(path: Path, config: Mapping[str, Any]) -> None:
    """Write config.json."""
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def companion_files(path: Path) -> list[Path]:
    """Tokenizer and generation files in a model directory, each once, sorted. InputError for a link that leads out.

    With the model's own code where a configuration maps classes to it: without it what is made from it does not load.
    """
    configs = [file for name in ("config.json", "tokenizer_config.json") if (file := path / name).is_file()]
    mapped = any(b'"auto_map"' in file.read_bytes() for file in configs)
    patterns = (*COMPANIONS, CODE) if mapped else COMPANIONS
    names = {file.name for pattern in patterns for file in path.glob(pattern) if file.is_file()}
    return [file_inside(path, name) for name in sorted(names)]


def copy_companions(path: Path, out: Path) -> None:
    """Copy the `companion_files` of a model directory to another."""
    for file in companion_files(path):
        shutil.copyfile(file, out / file.name)
