"""Quantized blocks on disk: one safetensors file per finished block, which is also the unit of resume.

The files are shards of a packed checkpoint already; `finish` adds everything outside the blocks, the index and the
configuration, and nothing is rewritten.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qatcli.casting import dtype_name
from qatcli.errors import InputError
from qatcli.events import read_log
from qatcli.memory import release_memory
from qatcli.models.blocks import BlockModel
from qatcli.packed import (
    DTYPE_KEYS,
    PACKED,
    SCALE,
    ZERO_POINT,
    ModuleQuant,
    QuantizedLinear,
    copy_companions,
    pack_linear,
    quantization_config,
    read_config,
    unpack_zero_point,
    write_config,
)
from qatcli.recipe.schema import QuantSection
from qatcli.runlog import RunLog
from qatcli.shards import digest, index_shards, load_tensors, save_tensors

OUTSIDE = "model-outside-blocks.safetensors"


def block_file(directory: Path, index: int) -> Path:
    """Where block `index` is kept."""
    return directory / f"model-block-{index:04d}.safetensors"


def save_block(
    directory: Path,
    index: int,
    block: nn.Module,
    linears: dict[str, QuantizedLinear],
    *,
    prefix: str,
    log: RunLog,
    event: dict[str, Any],
) -> None:
    """Write one block and its `block` event: `linears` by full name, and what else `block` keeps (norms, buffers).

    `prefix` is what the checkpoint's names of its tensors begin with.
    """
    quantized = tuple(f"{name}." for name in linears)
    state = {prefix + name: tensor for name, tensor in block.state_dict().items()}
    others = {name: tensor for name, tensor in state.items() if not name.startswith(quantized)}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in others.items()}
    for name, linear in linears.items():
        packed = pack_linear(name, linear)
        tensors.update({key: value.cpu() for key, value in packed.items()})
    log.event("block", index=index, **event, sha256=digest(tensors))
    save_tensors(block_file(directory, index), tensors)


def finished_blocks(directory: Path) -> dict[int, dict[str, Any]]:
    """Index -> `block` event of every block that is in the log and, as it was written, on disk: what is kept.

    A block's event is logged before its file appears. A crash of the machine may keep either without the other; such
    a block is made again, and comes out the same. Reads every file; InputError when one is not as it was written.
    """
    events = block_events(directory)
    return {index: event for index, event in events.items() if _is_kept(block_file(directory, index), event)}


def block_events(directory: Path) -> dict[int, dict[str, Any]]:
    """Index -> latest `block` event in the log, those of interrupted runs included."""
    problems: list[str] = []
    events = read_log(directory, problems).of("block")
    if problems and not events:
        raise InputError(problems[0], hint="move the log away: the blocks are made again")
    return {event["index"]: event for event in events if isinstance(event.get("index"), int)}


def _is_kept(file: Path, event: dict[str, Any]) -> bool:
    if not file.is_file():
        return False
    if digest(load_tensors(file)) != event.get("sha256"):
        hint = "delete it, and the same command makes this block again"
        raise InputError(f"{file} is damaged: its tensors are not those that were written", hint=hint)
    return True


def block_quants(model: BlockModel, index: int, quant: QuantSection) -> dict[str, ModuleQuant]:
    """Full name -> quantization of the linears of one block that are not skipped."""
    found = {}
    for name, linear in model.linears(index).items():
        choice = quant.for_module(name)
        if choice is not None:
            found[name] = ModuleQuant(*choice, linear.in_features, linear.out_features)
    return found


def read_linear(tensors: dict[str, Tensor], name: str, quant: ModuleQuant) -> tuple[Tensor, Tensor, Tensor]:
    """Packed codes, scale fp32 [N, G] and zero point uint8 [N, G] of one linear among a block file's tensors."""
    zero_point = unpack_zero_point(tensors[name + ZERO_POINT], bits=quant.bits, out_features=quant.out_features)
    return tensors[name + PACKED], tensors[name + SCALE].float(), zero_point


def load_quantized_block(
    directory: Path, model: BlockModel, index: int, quants: dict[str, ModuleQuant], device: torch.device
) -> nn.Module:
    """A block whose linears hold the dequantized weights of its file (fp32, dense), ready to run."""
    from qat_kernels import dequantize

    tensors = {name: tensor.to(device) for name, tensor in load_tensors(block_file(directory, index)).items()}
    for name, quant in quants.items():
        packed, scale, zero_point = read_linear(tensors, name, quant)
        shape = {"bits": quant.bits, "group_size": quant.group_size, "in_features": quant.in_features}
        tensors[f"{name}.weight"] = dequantize(packed, scale, zero_point, **shape, dtype=torch.float32)
        for part in (PACKED, SCALE, ZERO_POINT):
            del tensors[name + part]
    return model.make_block(index, {name: tensor.float() for name, tensor in tensors.items()}, device)


def finish(directory: Path, model: BlockModel, quant: QuantSection) -> None:
    """Make the block files a complete packed checkpoint: the rest of the model, index, config.json, tokenizer."""
    release_memory()  # what the blocks took
    outside = model.source.tensors(model.outside_names())
    save_tensors(directory / OUTSIDE, outside)
    modules: dict[str, ModuleQuant] = {}
    for index in range(len(model)):
        modules.update(block_quants(model, index, quant))
    index_shards(directory, sorted(directory.glob("model-*.safetensors")))
    config = read_config(model.source.path)
    if not any(config.get(key) for key in DTYPE_KEYS):  # what is not trained keeps its dtype, and pack goes by it
        config[DTYPE_KEYS[0]] = dtype_name(max(outside.values(), key=Tensor.numel).dtype)
    config["quantization_config"] = quantization_config(
        modules,
        bits=quant.bits,
        group_size=quant.group_size,
        symmetric=quant.zero_points == "middle",
        scale_dtype=torch.float32,
    )
    write_config(directory, config)
    copy_companions(model.source.path, directory)
