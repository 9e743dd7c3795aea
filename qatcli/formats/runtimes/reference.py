"""What a runtime should compute: the checkpoint itself as a dense fp32 model in plain transformers.

A runtime has the same weights but rounds activations, to fp16, bf16 or (llama.cpp on the CPU) 8 bits in blocks of 32.
How much that moves logits depends on the model, so it is measured: the reference runs again with the inputs of its
linears rounded, and a runtime may differ by a few times as much. A model that rounding throws off course gets a wide
tolerance; its integers are compared exactly all the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qatcli.errors import InputError
from qatcli.formats import source
from qatcli.packed import PackedCheckpoint

_TIMES = 4  # a runtime also rounds residuals, attention and the key-value cache
_LEAST = 0.05  # of the logits' standard deviation


@dataclass(frozen=True)
class Reference:
    """Logits [B, T, V] of `prompts`, the accepted difference by the precision of a runtime's activations, and the
    largest magnitude that a module gives."""

    logits: NDArray[np.float32]
    tolerances: dict[str, float]
    largest: float


def reference(checkpoint: PackedCheckpoint) -> Reference:
    """Run the checkpoint, exactly and with activations rounded."""
    model = dense_model(checkpoint)
    largest = 0.0

    def watch(_module: torch.nn.Module, _inputs: Any, output: Any) -> None:
        nonlocal largest
        if isinstance(output, Tensor) and output.is_floating_point():
            largest = max(largest, float(output.abs().max()))

    watching = [module.register_forward_hook(watch) for module in model.modules()]
    exact = logits(model)
    for hook in watching:
        hook.remove()
    tolerances = {}
    for name, rounding in ROUNDINGS.items():
        hooks = [
            module.register_forward_pre_hook(lambda _, inputs, rounding=rounding: (rounding(inputs[0]),))
            for module in model.modules()
            if isinstance(module, torch.nn.Linear)
        ]
        moved = float(np.abs(logits(model) - exact).max())
        tolerances[name] = max(_LEAST * float(exact.std()), _TIMES * moved)
        for hook in hooks:
            hook.remove()
    return Reference(exact, tolerances, largest)


def _to_8_bits(x: Tensor) -> Tensor:
    """Blocks of 32 along the last axis on 255 levels, ggml's Q8_0. A width that is no multiple of 32 stays."""
    if x.shape[-1] % 32:
        return x
    blocks = x.reshape(*x.shape[:-1], -1, 32)
    step = blocks.abs().amax(dim=-1, keepdim=True).clamp(min=1e-30) / 127
    return ((blocks / step).round() * step).reshape(x.shape)


ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "fp16": lambda x: x.half().to(x.dtype),
    "bf16": lambda x: x.bfloat16().to(x.dtype),  # and weights that are stored so: an error of the same size
    "8 bits": _to_8_bits,
}


def prompts(vocabulary: int) -> NDArray[np.int64]:
    """Two fixed prompts of 24 token ids that every vocabulary has: [2, 24]."""
    index = np.arange(48, dtype=np.int64).reshape(2, 24)
    return (index * index * 37 + index * 11 + 5) % min(vocabulary, 30000)


def dense_weight(linear: source.Arrays) -> NDArray[np.float32]:
    """(q - z) * s in fp32, [N, K]."""
    rows, groups = linear.scale.shape
    weight = linear.codes.reshape(rows, groups, -1).astype(np.float32)
    weight -= linear.zero_point[..., None]
    weight *= linear.scale[..., None]
    return weight.reshape(rows, -1)


def dense_model(checkpoint: PackedCheckpoint) -> Any:
    """The transformers model with dense fp32 weights. InputError when the tensors do not fit the architecture.

    Loaded by transformers, which knows families whose checkpoints have other names than their modules (GPT-NeoX), and
    which takes the tensors as they are: every weight is in memory once.
    """
    config = source.full_config(checkpoint.config)
    kind = type(source.skeleton(checkpoint.config))
    state = {}
    for name in checkpoint.modules:
        linear = source.arrays(checkpoint, name)
        state[name + ".weight"] = torch.from_numpy(dense_weight(linear))
        if linear.bias is not None:
            state[name + ".bias"] = linear.bias.float()
    for name in source.dense_tensor_names(checkpoint):
        state[name] = source.cast(name, checkpoint.tensor(name), torch.float32)
    model, found = kind.from_pretrained(
        None, config=config, state_dict=state, dtype=torch.float32, output_loading_info=True
    )
    if odd := sorted({*found["missing_keys"], *found["unexpected_keys"]}):
        raise InputError(f"{checkpoint.path} does not fit its architecture: {', '.join(odd[:3])}")
    return model.eval()


def logits(model: Any, ids: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
    """Logits fp32 [B, T, V] of `ids` [B, T], by default of `prompts`."""
    if ids is None:
        ids = prompts(int(model.config.get_text_config().vocab_size))
    with torch.inference_mode():
        return np.asarray(model(input_ids=torch.from_numpy(ids)).logits.float())


def perplexity(logits_of: Callable[[list[int]], NDArray[np.float32]], windows: NDArray[np.int64]) -> float:
    """Perplexity of the token ids `windows` [W, T]; `logits_of` gives the logits [T, V] of one window.

    The first token of a window is not predicted.
    """
    losses = []
    for window in windows.tolist():
        scores = logits_of(window)[:-1].astype(np.float64)
        scores -= scores.max(axis=-1, keepdims=True)
        losses.append(np.log(np.exp(scores).sum(axis=-1)) - scores[np.arange(len(scores)), window[1:]])
    return float(np.exp(np.mean(losses)))
