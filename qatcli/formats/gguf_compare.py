"""Comparison of a GGUF file with its checkpoint, by our own reader of container and blocks (`gguf_readback`).

GGUF stores no zero points: a block type either holds q - z, or q with the offset -s z. Both are recovered exactly;
Q4_1 keeps its offset in fp16, so there the offset must be -s z rounded to fp16. Row order is computed here by formula,
not by the writer's permutation.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qatcli.errors import InputError
from qatcli.formats import source
from qatcli.formats.compare import Tally, parts_of
from qatcli.formats.contract import Verification
from qatcli.formats.gguf_metadata import metadata_differences
from qatcli.formats.gguf_model import rope_factors
from qatcli.formats.gguf_readback import Decoded, GgufFile, decode, open_gguf
from qatcli.packed import PackedCheckpoint

_LEAVES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_GEMMA_LEAVES = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_ROPE = "rope_freqs.weight"  # equal to transformers' own factors by tests/qatcli/formats/test_gguf.py


def compare_file(checkpoint: PackedCheckpoint, file: Path, *, embedding: str) -> Verification:
    """Compare every tensor of `file`; metadata is checked where a wrong value would change what the model computes."""
    tally = Tally()
    try:
        found = open_gguf(file)
    except InputError as error:
        tally.others.append(error.message)
        return tally.verification("gguf")
    expected_names: set[str] = set()
    for name in checkpoint.modules:
        expected_names.add(_compare_linear(checkpoint, name, found, tally))
    for name in source.copied_names(checkpoint):
        target = gguf_name(checkpoint, name)
        expected_names.add(target)
        difference = _dense_difference(checkpoint, name, target, found, embedding)
        tally.others += [f"tensor {target} {difference}"] if difference else []
    factors = rope_factors(checkpoint.config)
    if factors is not None:
        expected_names.add(_ROPE)
        if _ROPE not in found.tensors or found.rows(_ROPE).tobytes() != factors.tobytes():
            tally.others.append(f"tensor {_ROPE} is missing or not what the config says")
    tally.others += [f"tensor {name} is unexpected" for name in found.tensors if name not in expected_names]
    tally.others += metadata_differences(checkpoint, found)
    notes = [f"block types: {', '.join(sorted({entry.type_name for entry in found.tensors.values()}))}"]
    return tally.verification("gguf", notes=notes)


def gguf_name(checkpoint: PackedCheckpoint, name: str) -> str:
    """The GGUF name of a Hugging Face tensor, without the gguf package. KeyError when it has none."""
    module, _, suffix = name.rpartition(".")
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
    if match is None:
        return f"{_TOP[module]}.{suffix}"
    gemma = _GEMMA_LEAVES if checkpoint.config["model_type"].startswith("gemma3") else {}
    return f"blk.{match[1]}.{gemma.get(match[2]) or _LEAVES[match[2]]}.{suffix}"


def file_rows(checkpoint: PackedCheckpoint, name: str, rows: int) -> NDArray[np.int64]:
    """Where row r of a Hugging Face tensor is in the file: halves of a head become even and odd rows for Llama."""
    index = np.arange(rows)
    leaf = name.split(".")[-2]
    config = checkpoint.config
    if config["model_type"] not in ("llama", "mistral") or leaf not in ("q_proj", "k_proj"):
        return index
    width = int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
    inside = index % width
    return index - inside + inside % (width // 2) * 2 + inside // (width // 2)


def _compare_linear(checkpoint: PackedCheckpoint, name: str, found: GgufFile, tally: Tally) -> str:
    target = gguf_name(checkpoint, name + ".weight")
    tally.modules += 1
    if target not in found.tensors:
        tally.others.append(f"tensor {target} is missing")
        return target
    linear = source.arrays(checkpoint, name)
    entry = found.tensors[target]
    if entry.shape != linear.codes.shape:
        tally.codes.append(f"{name}: shape {list(entry.shape)} instead of {list(linear.codes.shape)}")
        return target
    order, wrong = file_rows(checkpoint, name + ".weight", len(linear.codes)), np.zeros(3, np.int64)
    try:
        rows = found.rows(target)
        for part in parts_of(linear.codes.shape):
            codes, zero_point, scale = linear.codes[part], linear.zero_point[part], linear.scale[part]
            expected = replace(linear, codes=codes, zero_point=zero_point, scale=scale)
            wrong += _differences(decode(entry.type_name, rows[order[part]]), expected, entry.type_name)
    except (InputError, ValueError, KeyError) as error:
        tally.others.append(f"{target} cannot be read: {error}")
        return target
    for kind, count in zip((tally.codes, tally.zero_points, tally.scales), wrong, strict=True):
        if count:
            kind.append(f"{name}: {count} values differ")
    return target


def _differences(found: Decoded, linear: source.Arrays, type_name: str) -> tuple[int, int, int]:
    """How many codes, zero points and scales differ."""
    blocks = found.scale.shape[1]
    scale, zero = (
        np.repeat(a.astype(np.float32), blocks // a.shape[1], axis=1) for a in (linear.scale, linear.zero_point)
    )
    width = linear.codes.shape[1] // blocks
    sign = np.where((found.scale < 0) != (scale < 0), -1, 1)  # a block may hold both negated
    wrong_scales = int(np.count_nonzero(np.abs(found.scale) != np.abs(scale)))
    levels = found.levels * np.repeat(sign, width, axis=1)
    if found.offset is None:
        expected = linear.codes.astype(np.int16) - np.repeat(zero, width, axis=1).astype(np.int16)
        wrong = levels != expected
        # A whole block moved by the same amount is a zero point that differs, anything else are codes.
        moved = (levels - expected).reshape(len(levels), blocks, width)
        shifted = (moved == moved[..., :1]).all(axis=-1) & (moved[..., 0] != 0)
        return int(wrong.sum()) - int(shifted.sum()) * width, int(shifted.sum()), wrong_scales
    offset = -scale * zero
    if type_name == "Q4_1":
        offset = offset.astype(np.float16).astype(np.float32)
    wrong_codes = int(np.count_nonzero(levels != linear.codes))
    return wrong_codes, int(np.count_nonzero(found.offset != offset)), wrong_scales


def _dense_difference(
    checkpoint: PackedCheckpoint, name: str, target: str, found: GgufFile, embedding: str
) -> str | None:
    """What is wrong with an unquantized tensor, or None."""
    if target not in found.tensors:
        return "is missing"
    entry, tensor = found.tensors[target], checkpoint.tensor(name)
    shape = tuple(tensor.shape)
    offset = checkpoint.config["model_type"].startswith("gemma3") and name.endswith("norm.weight")
    wanted = "F32" if tensor.ndim == 1 else "F16"
    if embedding == "Q8_0" and target in ("token_embd.weight", "output.weight") and shape[1] % 32 == 0:
        wanted = "Q8_0"
    if entry.type_name != wanted or entry.shape != shape:
        return f"is {entry.type_name} {list(entry.shape)}, expected {wanted} {list(shape)}"
    try:
        rows = found.rows(target).reshape(len(tensor), -1)
    except InputError as error:
        return f"cannot be read: {error.message}"
    order = file_rows(checkpoint, name, len(tensor))
    for part in parts_of(shape):
        stored, values = rows[order[part]], tensor[part].float().numpy() + np.float32(offset)
        if wanted == "Q8_0":
            if not _is_eight_bit_rounding(decode("Q8_0", stored), values):
                return "is no 8-bit rounding of its source"
            continue
        kind = np.dtype("<f4" if wanted == "F32" else "<f2")
        if not np.array_equal(stored.view(kind).reshape(values.shape), values.astype(kind)):
            return "differs from its source"
    return None


def _is_eight_bit_rounding(found: Decoded, tensor: NDArray[np.float32]) -> bool:
    """Within three quarters of a step: half for the level, the rest for the scale's own rounding to fp16."""
    largest = np.abs(tensor).reshape(len(tensor), -1, 32).max(axis=-1)
    value = found.levels * np.repeat(found.scale, 32, axis=1)
    return bool(np.all(np.abs(value - tensor) <= np.repeat(0.75 * largest / 127, 32, axis=1) + 1e-7))
