"""How fast a model reads a prompt and continues it, one sequence at a time, and the memory that takes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from qatcli.machine import device_name


@torch.no_grad()
def speed(
    model: Any,
    *,
    device: torch.device,
    prompt_tokens: int,
    new_tokens: int,
    repeats: int,
    progress: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """Median tokens per second over `repeats` after one warm-up, with a key-value cache, batch 1, no autocast.

    prefill: tokens of the prompt read per second. decode: tokens generated per second, one at a time.
    """
    vocabulary = int(model.config.get_text_config().vocab_size)
    prompt = torch.arange(prompt_tokens, device=device)[None] * 7919 % vocabulary  # speed does not depend on the text
    prefill, decode = [], []
    _step(model, *_step(model, prompt, None))  # what is compiled, tuned or allocated once
    for _ in range(repeats):
        start = _now(device)
        token, past = _step(model, prompt, None)
        middle = _now(device)
        for _ in range(new_tokens):
            token, past = _step(model, token, past)
        prefill.append(prompt_tokens / (middle - start))
        decode.append(new_tokens / (_now(device) - middle))
        progress(1)
    return {"prefill": round(median(prefill), 2), "decode": round(median(decode), 2)}


def conditions(device: torch.device, *, prompt_tokens: int, new_tokens: int, repeats: int) -> dict[str, Any]:
    """What a speed was measured under: without it the number means nothing."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "repeats": repeats,
    }


def weight_bytes(model: Any) -> int:
    """Bytes of parameters, buffers and what modules made of them to run faster, shared ones once."""
    kept = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    tensors = {tensor.data_ptr(): tensor for tensor in [*model.parameters(), *model.buffers(), *kept]}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _step(model: Any, tokens: Tensor, past: Any) -> tuple[Tensor, Any]:
    output = model(input_ids=tokens, past_key_values=past, use_cache=True, logits_to_keep=1)
    return output.logits[:, -1:].argmax(-1), output.past_key_values


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
