"""The checkpoint as exports see it: numpy arrays with fp16 scales, surveyed before anything is written."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qatcli.casting import equally_finite
from qatcli.errors import InputError, QatError
from qatcli.packed import HEAD, SCALE, ZERO_POINT, PackedCheckpoint, unpack_zero_point

_SHOWN = 4


@dataclass(frozen=True)
class Arrays:
    """One linear as numpy: codes uint8 [N, K], zero_point uint8 [N, G], scale fp16 [N, G], bias or None."""

    codes: NDArray[np.uint8]
    zero_point: NDArray[np.uint8]
    scale: NDArray[np.float16]
    bits: int
    bias: Tensor | None


def arrays(checkpoint: PackedCheckpoint, name: str) -> Arrays:
    """Read one linear. Scales become fp16: every consumer computes in it, and bf16 would lose 3 bits of them."""
    linear = checkpoint.linear(name)
    return Arrays(
        linear.codes.numpy(), linear.zero_point.numpy(), linear.scale.half().numpy(), linear.bits, linear.bias
    )


def expand_groups(linear: Arrays, groups: int) -> Arrays:
    """The same weights with more groups per row: scales and zero points repeated. `groups` is a multiple."""
    times = groups // linear.scale.shape[1]
    repeated = (np.repeat(linear.zero_point, times, axis=1), np.repeat(linear.scale, times, axis=1))
    return Arrays(linear.codes, *repeated, linear.bits, linear.bias)


def survey(checkpoint: PackedCheckpoint) -> bool:
    """True when every zero point is 2^(bits-1) (symmetric). Reads scales and zero points only.

    Raises InputError for an architecture that only the model's own code has, QatError naming the linears whose scales
    fp16 cannot hold.
    """
    from transformers import CONFIG_MAPPING

    kind = checkpoint.config.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise InputError(
            f"{checkpoint.path}: transformers has no model_type {kind}, so no export can be verified",
            hint="serve the directory that `qat pack` wrote, with trust_remote_code",
        )
    symmetric, unfit = True, []
    for name, quant in checkpoint.modules.items():
        packed = checkpoint.tensor(name + ZERO_POINT)
        zero_point = unpack_zero_point(packed, bits=quant.bits, out_features=quant.out_features)
        symmetric = symmetric and bool((zero_point == 1 << (quant.bits - 1)).all())
        scale = checkpoint.tensor(name + SCALE)
        half = scale.half()
        if not bool(torch.isfinite(half).all()) or bool(((half == 0) & (scale != 0)).any()):
            unfit.append(name)
    refuse_if(
        unfit,
        "scales that fp16 cannot hold (overflow, underflow or not finite)",
        hint="train longer or lower the rates",
    )
    return symmetric


def refuse_if(names: Iterable[str], problem: str, *, hint: str) -> None:
    """QatError naming the linears with `problem`, when there are any."""
    found = list(names)
    if found:
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise QatError(f"{problem}: {', '.join(found[:_SHOWN])}{more}", hint=hint)


def refuse_bits(checkpoint: PackedCheckpoint, format_name: str, carried: Iterable[int], *, hint: str) -> None:
    """QatError when a linear has bits the format does not carry."""
    known = set(carried)
    wrong = [f"{name} ({quant.bits} bits)" for name, quant in checkpoint.modules.items() if quant.bits not in known]
    refuse_if(wrong, f"{format_name} carries {sorted(known)} bits only", hint=hint)


def refuse_quantized_head(checkpoint: PackedCheckpoint, format_name: str) -> None:
    """QatError when the output head is quantized: most runtimes of these formats keep it dense."""
    heads = [name for name in checkpoint.modules if name.rsplit(".", 1)[-1] == "lm_head"]
    refuse_if(
        heads, f"{format_name} keeps the output head dense", hint="put `lm_head` into quant.skip, or export dense"
    )


def majority(checkpoint: PackedCheckpoint) -> tuple[int, int]:
    """The (bits, group_size) most linears have."""
    return Counter(q.kind for q in checkpoint.modules.values()).most_common(1)[0][0]


def dense_linears(checkpoint: PackedCheckpoint) -> list[str]:
    """Linears of the model that are not quantized, the output head excluded."""
    model = skeleton(checkpoint.config)
    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head and name not in checkpoint.modules
    ]


def skeleton(config: Mapping[str, Any]) -> Any:
    """The model that config.json describes, without memory for its weights and without its quantization."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(full_config(config))


def full_config(config: Mapping[str, Any]) -> Any:
    """What transformers makes of config.json, without its quantization: every key has a value."""
    from transformers import AutoConfig

    return AutoConfig.for_model(**copy.deepcopy(base_config(config)))  # which writes into what it is given


def base_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json without our quantization_config."""
    return {key: value for key, value in config.items() if key != "quantization_config"}


def dense_tensor_names(checkpoint: PackedCheckpoint) -> list[str]:
    """Tensors copied as they are; a head that is tied to the embeddings is left out."""
    tied = bool(checkpoint.config.get("tie_word_embeddings"))
    return [name for name in checkpoint.dense_names() if not (tied and name == HEAD)]


def copied_names(checkpoint: PackedCheckpoint) -> list[str]:
    """All tensors that are no part of a quantized linear's weight: the linears' biases, then `dense_tensor_names`."""
    biases = [name + ".bias" for name in checkpoint.modules if name + ".bias" in checkpoint.shards]
    return biases + dense_tensor_names(checkpoint)


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` in `dtype` when it is floating point. QatError when a value overflows."""
    if not tensor.is_floating_point() or tensor.dtype == dtype:
        return tensor
    out = tensor.to(dtype)
    if not equally_finite(out, tensor):
        raise QatError(f"{name} has values beyond {dtype}", hint="export dense or native with dtype bfloat16")
    return out
