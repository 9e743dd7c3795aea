"""The decoder blocks of any Hugging Face causal LM: found by structure, loaded and run one at a time.

Only the embeddings (and whatever else stands outside the blocks) are ever resident together with one block.
What each block receives besides the hidden states (position embeddings, masks, per-layer variants of them) is
recorded from the model's own forward pass, so no family needs code of ours.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from qatcli.errors import InputError
from qatcli.models.refusal import refused
from qatcli.models.source import ModelSource


@dataclass(frozen=True)
class BlockModel:
    """A model whose decoder blocks are on the meta device and are materialized one at a time."""

    source: ModelSource
    skeleton: PreTrainedModel
    prefix: str  # name of the block list, e.g. "model.layers"

    def __len__(self) -> int:
        return len(self._blocks())

    @property
    def hidden_size(self) -> int:
        """Channels of the hidden states."""
        return int(self.source.config().get_text_config().hidden_size)

    def linears(self, index: int) -> dict[str, nn.Linear]:
        """Full name -> linear of one block (on meta)."""
        modules = self._blocks()[index].named_modules()
        return {f"{self.block_name(index)}.{name}": m for name, m in modules if isinstance(m, nn.Linear)}

    def other_linears(self) -> list[str]:
        """Full names of the linears that stand in no block, such as the output layer."""
        modules = self.skeleton.named_modules()
        return [name for name, m in modules if isinstance(m, nn.Linear) and not name.startswith(self.prefix + ".")]

    def block_name(self, index: int) -> str:
        """Full module name of one block."""
        return f"{self.prefix}.{index}"

    def load_block(self, index: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """A fresh copy of one block with its full-precision weights."""
        prefix = self.block_name(index) + "."
        tensors = self.source.tensors(prefix + name for name in self._blocks()[index].state_dict())
        return self.make_block(index, {name: tensor.to(device, dtype) for name, tensor in tensors.items()}, device)

    def make_block(self, index: int, tensors: Mapping[str, Tensor], device: torch.device) -> nn.Module:
        """A fresh copy of one block of these tensors, all that it has, by their full names."""
        block = copy.deepcopy(self._blocks()[index])
        prefix = self.block_name(index) + "."
        block.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in tensors.items()}, assign=True)
        return block.to(device).eval()

    def outside_names(self) -> list[str]:
        """Names of the checkpoint's tensors that belong to no block."""
        return [name for name in self.source.shards if not name.startswith(self.prefix + ".")]

    @torch.no_grad()
    def first_inputs(self, windows: Tensor, device: torch.device, dtype: torch.dtype) -> Iterator[Tensor]:
        """Hidden states [1, T, H] that the first block receives, window by window. `windows` is int [S, T].

        InputError when a window holds a token that the model has no embedding for.
        """
        tokens = self.skeleton.get_input_embeddings().weight.shape[0]
        if windows.numel() and int(windows.max()) >= tokens:
            raise InputError(
                f"{self.source.path}: the tokenizer makes token {int(windows.max())}, the model has {tokens}",
                hint="tokenizer and weights are of different models; copy the tokenizer files of this one",
            )
        with self.prelude(device, dtype) as (base, record):
            for window in windows:
                base(input_ids=window[None].to(device, torch.long), use_cache=False)
                yield record.hidden

    @torch.no_grad()
    def block_arguments(self, seq_len: int, device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
        """Per block, the keyword arguments that the model passes along with hidden states of length `seq_len`."""
        with self.prelude(device, dtype) as (base, record):
            base(input_ids=torch.zeros(1, seq_len, dtype=torch.long, device=device), use_cache=False)
            return [record.arguments[i] for i in range(len(self))]

    @contextmanager
    def head(self, device: torch.device, dtype: torch.dtype) -> Iterator[Callable[[Tensor], Tensor]]:
        """A function from the last block's outputs [B, T, H] to logits [B, T, V]: all that follows the blocks.

        InputError when the model has no output layer, or the checkpoint none that this could be.
        """
        model = self.skeleton
        output = model.get_output_embeddings()
        names = [name for name, module in model.named_modules() if module is output]
        if output is None or not names:
            raise InputError(f"{self.source.path}: {type(model).__name__} has no output layer; unsupported model")
        tied = bool(model.config.get_text_config().tie_word_embeddings)
        with self.prelude(device, dtype) as (_, record):
            for each in (f"{names[0]}.{parameter}" for parameter, _ in output.named_parameters()):
                if tied and each.endswith(".weight") and each not in self.source.shards:
                    value = model.get_input_embeddings().weight
                else:
                    stored = self._stored_name(each)
                    value = self.source.tensors([stored])[stored].to(device, dtype)
                _set_parameter(model, each, value)

            def logits(hidden: Tensor) -> Tensor:
                record.passed_on = hidden
                found = model(input_ids=torch.zeros(hidden.shape[:2], dtype=torch.long, device=device), use_cache=False)
                return torch.as_tensor(found.logits)

            yield logits

    def _stored_name(self, name: str) -> str:
        """What the checkpoint calls a parameter of the output layer: as the model does, or else (GPT-NeoX) the one
        tensor of its kind and shape that the model has no parameter for."""
        if name in self.source.shards:
            return name
        model, kind = self.skeleton, name.rpartition(".")[2]
        known, shape = {each for each, _ in model.named_parameters()}, tuple(model.get_parameter(name).shape)
        left = [each for each in self.outside_names() if each not in known and each.endswith(f".{kind}")]
        left = [each for each in left if self.source.shapes[each] == shape]
        if len(left) != 1:
            raise InputError(
                f"{self.source.path} has no tensor `{name}`, the model's output layer",
                hint="copy the checkpoint again; if it is complete, its family is not read block by block",
            )
        return left[0]

    def _blocks(self) -> nn.ModuleList:
        return self.skeleton.get_submodule(self.prefix)

    @contextmanager
    def prelude(self, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[nn.Module, Record]]:
        """The base model with everything but the blocks loaded and the blocks replaced by recorders."""
        base = self.skeleton.base_model
        record = Record()
        blocks = self._blocks()
        for index, block in enumerate(blocks):
            block.forward = record.forward_of(index)
        try:
            for name in _without_head(self.skeleton):
                if not name.startswith(self.prefix + "."):
                    _set_parameter(self.skeleton, name, self.source.tensors([name])[name].to(device, dtype))
            for module in base.modules():
                for name, buffer in module.named_buffers(recurse=False):
                    setattr(module, name, buffer.to(device))
            with refused(f"{self.source.path}: its blocks cannot be run one at a time"):
                record.learn(base, device)
            yield base, record
        finally:
            for block in blocks:
                del block.forward
            for name, parameter in list(self.skeleton.named_parameters()):
                if not name.startswith(self.prefix + ".") and not parameter.is_meta:
                    _set_parameter(self.skeleton, name, torch.empty_like(parameter, device="meta"))


class Record:
    """Stands in for the blocks during a forward pass and keeps what they were given."""

    def __init__(self) -> None:
        self.hidden: Tensor = torch.empty(0)
        self.arguments: dict[int, dict[str, Any]] = {}
        self.passed_on: Tensor | None = None  # in place of what was given, if it is set
        self._tuples = False  # whether the model takes the first of what a block returns (GPT-J, Falcon)

    def forward_of(self, index: int) -> Any:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
            if args:
                raise InputError(
                    f"block {index} takes positional arguments besides the hidden states; unsupported model"
                )
            if index == 0:
                self.hidden = hidden_states
            elif hidden_states.shape != self.hidden.shape:
                raise _TakesTheFirst
            self.arguments[index] = {k: v for k, v in kwargs.items() if k not in ("past_key_values", "use_cache")}
            output = hidden_states if self.passed_on is None else self.passed_on
            return (output,) if self._tuples else output

        return forward

    @torch.no_grad()
    def learn(self, base: nn.Module, device: torch.device) -> None:
        """Find out, on two tokens, what the model takes for a block's output. InputError when what it passes to blocks
        for one sequence cannot be passed for several, or for another one, or is what blocks fill for each other."""
        one, two = (torch.zeros(count, 2, dtype=torch.long, device=device) for count in (1, 2))
        try:
            base(input_ids=one, use_cache=False)
        except _TakesTheFirst:
            self._tuples = True
            base(input_ids=one, use_cache=False)
        alone = self._tensors()
        base(input_ids=one + 1, use_cache=False)
        other = self._tensors()
        base(input_ids=two, use_cache=False)
        together = self._tensors()
        for place in alone.keys() & together.keys():
            rows = len(alone[place]), len(together[place])
            if rows != (1, 2) and rows[0] != rows[1]:
                raise InputError(
                    f"blocks receive `{place[1]}` with {rows[0]} rows for one sequence and {rows[1]} for two; "
                    "unsupported model"
                )
            known = type(alone[place]) is Tensor and not alone[place].is_meta  # a plan traces tensors without values
            if known and not torch.equal(alone[place], other[place]):
                raise InputError(f"blocks receive `{place[1]}`, which depends on the tokens; unsupported model")
        for name, value in self.arguments[0].items():
            if isinstance(value, Mapping) and not value:
                raise InputError(f"blocks pass `{name}` on to later ones; unsupported model")

    def _tensors(self) -> dict[tuple[int, str, int], Tensor]:
        """Every tensor that was passed to blocks, by block, name and place in a tuple of them."""
        return {
            (index, name, place): part
            for index, arguments in self.arguments.items()
            for name, value in arguments.items()
            for place, part in enumerate(value if isinstance(value, tuple) else (value,))
            if isinstance(part, Tensor) and part.ndim
        }


class _TakesTheFirst(Exception):
    """A block received the first row of the hidden states instead of all."""


def open_blocks(source: ModelSource) -> BlockModel:
    """Build the skeleton on meta and find its decoder blocks.

    InputError when no ModuleList has as many entries as the config has hidden layers, or when the checkpoint's tensors
    have other names or shapes than the model's parameters. `source.shapes` is empty where only a config is known.
    """
    config = source.config()
    with refused(f"{source.path}: transformers cannot build this model"), init_empty_weights(include_buffers=False):
        # In fp32, as students are loaded: tables that no checkpoint has are computed in this type.
        trust = source.trust_remote_code
        own = copy.deepcopy(config)  # the type is written into it
        skeleton = AutoModelForCausalLM.from_config(own, dtype=torch.float32, trust_remote_code=trust)
    skeleton.tie_weights()
    missing = [name for name in _without_head(skeleton) if name not in source.shapes]
    if missing and source.shapes:
        raise InputError(
            f"{source.path} has no tensor `{missing[0]}`, which {type(skeleton).__name__} consists of",
            hint="the checkpoint is incomplete, or of a family whose tensors transformers renames or fuses when it "
            "loads them (mixtures of experts, models that also see), which qat does not read",
        )
    for name, parameter in skeleton.named_parameters():
        implied, found = list(parameter.shape), list(source.shapes.get(name, parameter.shape))
        if found != implied:
            raise InputError(
                f"{source.path}: {name} is {found}, but config.json implies {implied}",
                hint="weights and config.json are of different models; copy the checkpoint again",
            )
    layers = config.get_text_config().num_hidden_layers
    candidates = {
        name: sum(p.numel() for p in module.parameters())
        for name, module in skeleton.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == layers
    }
    if not candidates:
        raise InputError(
            f"{source.path}: no list of {layers} decoder blocks in {type(skeleton).__name__}",
            hint="qat quantizes decoder-only models whose blocks stand in one list",
        )
    return BlockModel(source, skeleton.eval(), max(candidates, key=lambda name: candidates[name]))


def run_block(block: nn.Module, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
    """One block's output hidden states [B, T, H]."""
    output = block(hidden, **arguments)
    return output[0] if isinstance(output, tuple) else output


def _without_head(model: PreTrainedModel) -> list[str]:
    """Names of the parameters that are read one at a time: all but those of an untied output layer, which `head`
    reads, and which some families' checkpoints call otherwise (GPT-NeoX)."""
    head, own = model.get_output_embeddings(), set()
    if head is not None:
        own = {id(p) for p in head.parameters()} - {id(p) for p in model.get_input_embeddings().parameters()}
    return [name for name, parameter in model.named_parameters() if id(parameter) not in own]


def _set_parameter(model: nn.Module, name: str, value: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, nn.Parameter(value, requires_grad=False))
