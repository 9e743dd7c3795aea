"""A model that is never whole in memory: windows go through its blocks together, which are read once for all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qatcli.activations import (
    SWEEP_BATCH,
    StreamBudget,
    advance_stream,
    fill_streams,
    in_order,
    read_batches,
)
from qatcli.models.blocks import BlockModel
from qatcli.progress import Bar
from qatcli.training import autocast

PART = 256  # windows that go through the blocks together: so often all weights are read, so large is the stream


@dataclass(frozen=True)
class StreamedModel:
    """Logits of a causal LM, one block of which is in memory at a time; `budget` says where the activations may be."""

    model: BlockModel
    budget: Callable[[], StreamBudget]

    def steps(self, windows: Tensor) -> int:
        """Units of `logits` for windows int [S, T]: each goes through every block."""
        return len(self.model) * len(windows)

    @torch.no_grad()
    def logits(self, windows: Tensor, dtype: torch.dtype, bar: Bar) -> Iterator[Tensor]:
        """Logits [T, V] of each of windows int [S, T], on the budget's device.

        `bar` advances after each block by the windows that went through it.
        """
        budget, model, (count, seq_len) = self.budget(), self.model, windows.shape
        device = budget.device
        stream = budget.allocate("full-precision", (min(PART, count), seq_len, model.hidden_size), dtype)
        arguments = model.block_arguments(seq_len, device, torch.float32)
        for tokens in windows.split(PART):
            hidden = stream[: len(tokens)]
            fill_streams([hidden], model, tokens, device, dtype)
            for index, given in enumerate(arguments):
                block = model.load_block(index, device, dtype)
                advance_stream(hidden, block, given, batch_size=SWEEP_BATCH, device=device)
                del block  # before the next is there
                bar.advance(len(tokens), tokens=tokens.numel())
            with model.head(device, dtype) as head:
                for (window,) in read_batches([hidden], in_order(len(hidden), 1), device):
                    with autocast(device, dtype):
                        logits = head(window)[0]
                    yield logits
                    bar.note()
