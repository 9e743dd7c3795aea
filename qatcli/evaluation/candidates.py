"""The models that are measured side by side, each loaded only while it is measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qat_kernels import quantize
from qatcli.grid import ZeroPoints, initial_grid
from qatcli.hf import load_packed
from qatcli.models.source import ModelSource, load_tokenizer
from qatcli.packed import QuantizedLinear
from qatcli.recipe.schema import QuantSection


@dataclass(frozen=True)
class Candidate:
    """A name for tables, how to load the model and its tokenizer, and how that was done.

    path: the directory that is loaded; None for a model that exists in memory only. files: what its size on disk is
    that of, if it is not `path` (the GGUF file that was converted). keep: keep its figures from run to run
    (`qatcli.evaluation.cache`).
    """

    name: str
    load: Callable[[], Any]
    tokenizer: Callable[[], Any]
    path: Path | None
    loaded_as: str
    files: Path | None = None
    keep: bool = False


def full_precision(source: ModelSource, device: torch.device, *, keep: bool) -> Candidate:
    """The recipe's model, in the dtype of its checkpoint."""
    return Candidate(
        "full_precision",
        lambda: source.load_model("auto", device),
        source.tokenizer,
        source.path,
        "weights as stored",
        keep=keep,
    )


def round_to_nearest(source: ModelSource, quant: QuantSection, device: torch.device) -> Candidate:
    """The model rounded to asymmetric min-max grids at the recipe's bits and groups: what no calibration gives."""

    def load() -> Any:
        model = source.load_model(torch.float32, device)
        for name, module in model.named_modules():
            choice = quant.for_module(name) if isinstance(module, nn.Linear) else None
            if choice is not None:
                module.weight.data = _rounded(module.weight.data, *choice, zero_points=quant.zero_points)
        return model

    return Candidate("round_to_nearest", load, source.tokenizer, None, "rounded weights, fp32")


def packed(
    name: str,
    path: Path,
    device: torch.device,
    *,
    tokenizer: Callable[[], Any] | None = None,
    trust_remote_code: bool = False,
) -> Candidate:
    """A packed checkpoint of any stage."""
    return Candidate(
        name,
        lambda: load_packed(path, dtype="auto", device=device, trust_remote_code=trust_remote_code),
        tokenizer or (lambda: load_tokenizer(path, trust_remote_code=trust_remote_code)),
        path,
        "packed codes",
    )


def _rounded(weight: torch.Tensor, bits: int, group_size: int, *, zero_points: ZeroPoints) -> torch.Tensor:
    scale, zero_point = initial_grid(weight, bits=bits, group_size=group_size, zero_points=zero_points, method="minmax")
    codes = quantize(weight, scale, zero_point, bits=bits, group_size=group_size)
    linear = QuantizedLinear(codes, scale, zero_point.to(torch.uint8), bits, group_size)
    return linear.dequantize(weight.dtype)
