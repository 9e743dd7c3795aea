"""GGUF export: one file for llama.cpp, blocks written from the codes, metadata and tokenizer complete.

Each linear gets the smallest block type that carries its integers (`layouts.gguf_blocks`): llama.cpp's own converter
would dequantize and choose other scales. Norms and biases are F32, embeddings and head F16 or Q8_0, linears that are
not quantized F16; a tied head is left out. Architectures and row order: `gguf_model`; tokenizer: `gguf_tokenizer`.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qatcli.errors import InputError, QatError, missing_extra
from qatcli.formats import deployment, gguf_model, source
from qatcli.formats.atomic import atomic_directory
from qatcli.formats.card import model_card
from qatcli.formats.contract import ExportOptions, Verification
from qatcli.formats.gguf_compare import compare_file
from qatcli.formats.gguf_tokenizer import add_tokenizer
from qatcli.formats.layouts import gguf_blocks
from qatcli.grid import ZeroPoints
from qatcli.packed import ModuleQuant, PackedCheckpoint

FILE = "model.gguf"
# ggml file types (llama.cpp's llama_ftype), by the block type most linears have.
FILE_TYPES = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q2_K": 10, "Q4_K": 15, "Q2_0": 41}
_F32, _F16, _Q8_0 = 0, 1, 8
_UNFIT = "put them into quant.skip, choose another gguf_type, or export compressed-tensors"


@dataclass(frozen=True)
class Planned:
    """One tensor of the file: its name there, ggml type, shape and size, and how to make its bytes when it is due."""

    name: str
    type_id: int
    shape: tuple[int, ...]
    bytes: int
    make: Callable[[], NDArray[Any]]


def write(checkpoint: PackedCheckpoint, out: Path, options: ExportOptions) -> None:
    """Write `out`/model.gguf and its card. QatError for an architecture, tokenizer or linear that GGUF cannot carry."""
    if importlib.util.find_spec("gguf") is None:
        raise missing_extra("gguf", "gguf")
    import gguf

    checkpoint = gguf_model.with_defaults(checkpoint)
    source.survey(checkpoint)
    types = block_types(checkpoint, options.gguf_type)
    plan = list(_plan(checkpoint, types, options))
    with atomic_directory(out) as work:
        writer = gguf.GGUFWriter(work / FILE, gguf_model.architecture(checkpoint).name)
        gguf_model.add_metadata(writer, checkpoint)
        writer.add_file_type(FILE_TYPES[Counter(types.values()).most_common(1)[0][0]])
        add_tokenizer(writer, checkpoint.path, checkpoint.config["vocab_size"])
        for tensor in plan:
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.int8), tensor.bytes, raw_dtype=tensor.type_id)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in plan:
            writer.write_tensor_data(tensor.make())
        writer.close()
        rows = deployment.gguf(FILE, set(types.values()))
        others = f"Embeddings and head are {options.gguf_embedding}, norms and biases F32, other linears F16."
        (work / "README.md").write_text(model_card(checkpoint, "gguf", rows, others=others), encoding="utf-8")


def compare(checkpoint: PackedCheckpoint, out: Path, options: ExportOptions) -> Verification:
    """Parse the file with our own reader and compare integers."""
    checkpoint = gguf_model.with_defaults(checkpoint)
    found = compare_file(checkpoint, out / FILE, embedding=options.gguf_embedding)
    longest, limit = checkpoint.config["max_position_embeddings"], gguf_model.context_length(checkpoint.config)
    if limit < longest:
        found = found.with_note(f"context limited to {limit} of {longest}: llama.cpp has no sliding window here")
    return found


def refuse(checkpoint: PackedCheckpoint, options: ExportOptions) -> None:
    """QatError for an architecture, or for rows and groups, that GGUF cannot carry whatever the integers."""
    gguf_model.with_defaults(checkpoint)
    unfit = [name for name, quant in checkpoint.modules.items() if likely_type(quant, "any", options.gguf_type) is None]
    source.refuse_if(unfit, "no block type of GGUF has such rows or groups", hint=_UNFIT)


def likely_type(quant: ModuleQuant, zero_points: ZeroPoints, wanted: str) -> str | None:
    """The block type that a linear gets, or one no smaller, by the zero points it may have; None where no type fits."""
    if wanted in gguf_blocks.TYPES:
        return None if quant.in_features // quant.groups % gguf_blocks.TYPES[wanted].length else wanted
    middle = 1 << (quant.bits - 1)
    zero_point = np.full((1, quant.groups), {"any": 0, "central": middle - 1, "middle": middle}[zero_points], np.uint8)
    codes = np.zeros((1, quant.in_features), np.uint8)
    return gguf_blocks.choose_type(codes, zero_point, bits=quant.bits, exact=wanted == "exact")


def block_types(checkpoint: PackedCheckpoint, wanted: str) -> dict[str, str]:
    """The block type of every linear: the smallest exact fit, or `wanted` for all of them."""
    names = ("auto", "exact", *gguf_blocks.TYPES)
    if wanted not in names:
        raise QatError(f"gguf_type is {wanted}", hint=f"choose one of {', '.join(names)}")
    types, unfit = {}, []
    for name in checkpoint.modules:
        linear = source.arrays(checkpoint, name)
        if wanted in gguf_blocks.TYPES:
            fits = gguf_blocks.accepts(wanted, linear.codes, linear.zero_point, linear.scale)
            chosen = wanted if fits else None
        else:
            chosen = gguf_blocks.choose_type(linear.codes, linear.zero_point, bits=linear.bits, exact=wanted == "exact")
        if chosen is None:
            unfit.append(f"{name} ({linear.bits} bits, {list(linear.codes.shape)})")
        else:
            types[name] = chosen
    source.refuse_if(unfit, "no block type of GGUF carries these integers", hint=_UNFIT)
    return types


def _plan(checkpoint: PackedCheckpoint, types: dict[str, str], options: ExportOptions) -> Iterator[Planned]:
    file_name = name_map(checkpoint)
    for name, type_name in types.items():
        quant, block = checkpoint.modules[name], gguf_blocks.TYPES[type_name]
        shape = (quant.out_features, quant.in_features)
        size = shape[0] * shape[1] // block.length * block.bytes
        yield Planned(file_name(name + ".weight"), block.type_id, shape, size, _blocks(checkpoint, name, block))
    factors = gguf_model.rope_factors(checkpoint.config)
    if factors is not None:
        yield Planned("rope_freqs.weight", _F32, factors.shape, factors.nbytes, lambda: factors)
    for name in source.copied_names(checkpoint):
        yield _dense(checkpoint, name, file_name(name), options.gguf_embedding)


def name_map(checkpoint: PackedCheckpoint) -> Callable[[str], str]:
    """A function from Hugging Face tensor names to GGUF's. It raises QatError for a name GGUF does not have."""
    import gguf

    kind = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == gguf_model.architecture(checkpoint).name)
    names = gguf.get_tensor_name_map(kind, checkpoint.config["num_hidden_layers"])

    def file_name(name: str) -> str:
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise QatError(f"GGUF has no place for the tensor {name}", hint="export another format")
        return str(found)

    return file_name


def _blocks(checkpoint: PackedCheckpoint, name: str, block: gguf_blocks.BlockType) -> Callable[[], NDArray[np.uint8]]:
    def make() -> NDArray[np.uint8]:
        linear = source.arrays(checkpoint, name)
        order = gguf_model.row_order(checkpoint, name + ".weight")
        rows = slice(None) if order is None else order
        return block.encode(linear.codes[rows], linear.zero_point[rows], linear.scale[rows])

    return make


def _dense(checkpoint: PackedCheckpoint, name: str, file_name: str, embedding: str) -> Planned:
    tensor = checkpoint.tensor(name)
    shape = tuple(tensor.shape)
    if tensor.ndim == 1:
        return Planned(file_name, _F32, shape, 4 * tensor.numel(), lambda: dense_values(checkpoint, name))
    if tensor.ndim != 2:
        raise InputError(f"{name} has {tensor.ndim} dimensions; GGUF export knows vectors and matrices")
    if embedding == "Q8_0" and file_name in ("token_embd.weight", "output.weight") and shape[1] % 32 == 0:
        return Planned(file_name, _Q8_0, shape, tensor.numel() // 32 * 34, lambda: _eight_bit(checkpoint, name))
    return Planned(file_name, _F16, shape, 2 * tensor.numel(), lambda: _half(checkpoint, name))


def dense_values(checkpoint: PackedCheckpoint, name: str) -> NDArray[np.float32]:
    """An unquantized tensor as llama.cpp wants it, fp32: rows moved, Gemma's norms shifted by one."""
    values = checkpoint.tensor(name).float().numpy()
    order = gguf_model.row_order(checkpoint, name)
    if name.endswith("norm.weight"):
        values = values + np.float32(gguf_model.architecture(checkpoint).norm_offset)
    return values if order is None else values[order]


def _half(checkpoint: PackedCheckpoint, name: str) -> NDArray[np.float16]:
    values: NDArray[np.float16] = source.cast(
        name, torch.from_numpy(dense_values(checkpoint, name)), torch.float16
    ).numpy()
    return values


def _eight_bit(checkpoint: PackedCheckpoint, name: str) -> NDArray[np.uint8]:
    import gguf

    quantized = gguf.quants.quantize(dense_values(checkpoint, name), gguf.GGMLQuantizationType.Q8_0)
    return np.asarray(quantized, np.uint8)
