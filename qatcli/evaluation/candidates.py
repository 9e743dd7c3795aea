"""The models that are measured side by side, each loaded only while it is measured."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qat_kernels import fake_quant
from qatcli.activations import StreamBudget, stream_budget
from qatcli.blockfiles import block_quants
from qatcli.casting import dtype_name
from qatcli.errors import InputError
from qatcli.grid import ZeroPoints, initial_grid
from qatcli.hf import load_packed
from qatcli.machine import fits
from qatcli.memory import release_memory
from qatcli.models.blocks import open_blocks
from qatcli.models.source import ModelSource, load_tokenizer
from qatcli.recipe.schema import CacheSection, QuantSection
from qatcli.streaming import StreamedModel
from qatcli.training import compute_dtype


@dataclass(frozen=True)
class Candidate:
    """A name for tables, how to load the model and its tokenizer, and how that was done.

    path: the directory that is loaded; None for a model that exists in memory only. files: what its size on disk is
    that of, if it is not `path` (the GGUF file that was converted). keep: keep its figures from run to run
    (`qatcli.evaluation.cache`). streamed: how to read a model block by block that does not fit.
    """

    name: str
    load: Callable[[], Any]
    tokenizer: Callable[[], Any]
    path: Path | None
    loaded_as: str
    files: Path | None = None
    keep: bool = False
    streamed: Callable[[], StreamedModel] | None = None


def full_precision(
    source: ModelSource,
    device: torch.device,
    *,
    keep: bool,
    name: str = "full_precision",
    budget: Callable[[], StreamBudget] | None = None,
) -> Candidate:
    """A model that transformers loads by itself, in the dtype of its checkpoint, or block by block where it does not
    fit: then `budget` says where the activations may be. A GGUF file's size is the file's."""
    loaded_as = "GGUF, dequantized to fp32" if source.gguf else "weights as stored"
    load, streamed = partial(source.load_model, "auto", device), None
    dtype = compute_dtype("auto", device)
    if not source.quantized and not fits(source.bytes(fp32=dtype == torch.float32), device):
        with suppress(InputError):  # a family that is not read so is loaded as a whole, if it can be
            budget = budget or partial(stream_budget, device, CacheSection(), Path(tempfile.gettempdir()))
            streamed = partial(StreamedModel, open_blocks(source), budget)
            loaded_as = f"block by block, in {dtype_name(dtype)}"
    return Candidate(name, load, source.tokenizer, source.path, loaded_as, source.gguf, keep, streamed)


def round_to_nearest(source: ModelSource, quant: QuantSection, device: torch.device) -> Candidate:
    """The model rounded to min-max grids at the recipe's bits and groups: what no calibration gives.

    Rounded is what the stages quantize: linears of the decoder blocks, never an output layer outside of them.
    """

    def load() -> Any:
        # As full precision is: in fp32 only where it is measured in fp32, elsewhere that were twice the memory.
        fp32 = compute_dtype("auto", device) == torch.float32
        model = source.load_model(torch.float32 if fp32 else "auto", device)
        blocks = open_blocks(source)
        for index in range(len(blocks)):
            for name, chosen in block_quants(blocks, index, quant).items():
                weight = model.get_submodule(name).weight
                rounded = _rounded(weight.data.float(), chosen.bits, chosen.group_size, zero_points=quant.zero_points)
                weight.data = rounded.to(weight.dtype)
        release_memory()  # the search of its grids leaves the heap with holes
        return model

    return Candidate("round_to_nearest", load, source.tokenizer, None, "rounded weights")


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
    return fake_quant(weight, scale, zero_point, bits=bits, group_size=group_size)
