"""The shapes of a recipe's model, from its configuration alone: no weight is read.

The skeleton on meta is the one that the stages build; what they would read from the checkpoint is answered with
tensors that have shapes and no data.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from qatcli.blockfiles import block_quants
from qatcli.linear import replace_modules
from qatcli.models.blocks import BlockModel, open_blocks
from qatcli.models.gguf import converted
from qatcli.models.refusal import refused
from qatcli.models.source import ModelSource, check_config, fetching
from qatcli.packed import ModuleQuant
from qatcli.plan.tracing import CPU, LINEARS, Passes, trace, without_data
from qatcli.recipe.schema import ModelSection, QuantSection


@dataclass
class _Configuration:
    """What `open_blocks` and `BlockModel` ask of a source, answered from a configuration."""

    section: ModelSection
    shapes: dict[str, torch.Size] = field(default_factory=dict)

    @property
    def path(self) -> str:
        return self.section.source

    @property
    def trust_remote_code(self) -> bool:
        return self.section.trust_remote_code

    @cached_property
    def kept(self) -> Path | None:
        """Where the converted form of a local GGUF file is, or will be."""
        file = Path(self.section.source, self.section.gguf_file or "")
        return converted(file) if file.is_file() else None

    @cached_property
    def _config(self) -> Any:
        source, options = self.section.source, {"trust_remote_code": self.trust_remote_code}
        if Path(source).is_dir() and not self.section.gguf_file:
            check_config(Path(source), trust_remote_code=self.trust_remote_code)
        with refused(f"model.source {source}: transformers does not accept its configuration"):
            if self.kept is not None and self.kept.is_dir():  # without the minutes that a long vocabulary takes
                return AutoConfig.from_pretrained(self.kept, **options)
            if Path(source).is_file():
                return AutoConfig.from_pretrained(Path(source).parent, gguf_file=Path(source).name, **options)
            named = {key: value for key in ("revision", "gguf_file") if (value := getattr(self.section, key))}
            with nullcontext() if Path(source).is_dir() else fetching(source):
                return AutoConfig.from_pretrained(source, **named, **options)

    def config(self) -> Any:
        return self._config

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: torch.empty(self.shapes[name]) for name in names}


class PlannedModel:
    """Sizes of a model under a recipe's `quant` section."""

    def __init__(self, section: ModelSection, quant: QuantSection) -> None:
        source = _Configuration(section)
        self._blocks: BlockModel = open_blocks(cast(ModelSource, source))
        self.config = source.config()
        skeleton = self._blocks.skeleton
        source.shapes = {name: tensor.shape for name, tensor in skeleton.state_dict().items()}
        self.names = tuple(source.shapes)
        sizes = {name: parameter.numel() for name, parameter in skeleton.named_parameters()}  # tied ones once
        prefix = self._blocks.prefix + "."
        self.outside = sum(size for name, size in sizes.items() if not name.startswith(prefix))
        self.total = sum(sizes.values())
        text = self.config.get_text_config()
        self.hidden: int = text.hidden_size
        self.vocabulary: int = text.vocab_size
        self.tied = skeleton.get_input_embeddings().weight is getattr(skeleton.get_output_embeddings(), "weight", None)
        gguf = section.gguf_file is not None or section.source.endswith(".gguf")
        self._gguf, self._converted = gguf, source.kept
        self.dtype: torch.dtype = torch.float32 if gguf else (getattr(self.config, "dtype", None) or torch.float32)
        count = range(len(self._blocks))
        self.in_blocks = [name for index in count for name in self._blocks.linears(index)]
        self.other_linears = self._blocks.other_linears()
        self.context: int | None = getattr(text, "max_position_embeddings", None)
        self.quants = [block_quants(self._blocks, index, quant) for index in count]
        self.block_sizes = [
            sum(size for name, size in sizes.items() if name.startswith(self._blocks.block_name(index) + "."))
            for index in count
        ]
        self.largest = max(count, key=self.block_sizes.__getitem__)
        self._traced: dict[Any, Passes] = {}

    def __len__(self) -> int:
        return len(self.quants)

    @property
    def to_convert(self) -> bool:
        """Whether the model is a GGUF file that is still to be converted."""
        return self._gguf and not (self._converted is not None and self._converted.is_dir())

    @property
    def linears(self) -> dict[str, ModuleQuant]:
        """Every quantized linear."""
        return {name: quant for block in self.quants for name, quant in block.items()}

    @property
    def embedding(self) -> int:
        """Parameters outside the blocks that stand before them: all but an untied head."""
        return self.outside - (0 if self.tied else self.vocabulary * self.hidden)

    def passes(self, kind: str, batch: int, seq_len: int, stream_dtype: torch.dtype, dtype: torch.dtype) -> Passes:
        """Memory of the largest block with `kind` of linears: "dense", "fake_quant" or "packed"."""
        key = (kind, batch, seq_len, stream_dtype, dtype)
        if key not in self._traced:
            name = self._blocks.block_name(self.largest)
            # Before the mode is on: tensors that a module keeps besides parameters and buffers (GPT-J) have data.
            block = copy.deepcopy(self._blocks.skeleton.get_submodule(name))
            with without_data() as live:
                arguments = self._blocks.block_arguments(seq_len, CPU, torch.float32)[self.largest]
                shape = (batch, seq_len, self.hidden)
                self._prepare(block, name + ".", kind)
                self._traced[key] = trace(live, block, arguments, shape=shape, stream_dtype=stream_dtype, dtype=dtype)
        return self._traced[key]

    def _prepare(self, block: nn.Module, prefix: str, kind: str) -> None:
        """Give the largest block tensors without data, and the `kind` of linears."""
        block.load_state_dict({name: torch.empty(t.shape) for name, t in block.state_dict().items()}, assign=True)
        if kind != "dense":
            quants = {name.removeprefix(prefix): quant for name, quant in self.quants[self.largest].items()}
            block.requires_grad_(kind == "fake_quant")
            replace_modules(block, list(quants), lambda name, linear: LINEARS[kind](linear, quants[name]))
        block.eval()


def packed_bytes(quant: ModuleQuant, *, scale: int) -> int:
    """Bytes of a quantized linear in a packed checkpoint whose scales have `scale` bytes."""
    codes = quant.out_features * math.ceil(quant.in_features * quant.bits / 32)
    zero_points = math.ceil(quant.out_features * quant.bits / 32) * quant.groups
    return 4 * (codes + zero_points) + scale * quant.out_features * quant.groups


def groups_of(quants: Iterable[ModuleQuant]) -> int:
    """Groups, and so scales, of some linears."""
    return sum(q.out_features * q.groups for q in quants)
