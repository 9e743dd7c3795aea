"""How a model reads its hidden states: the weight that every channel has in every linear behind them.

In some models a few channels hold nearly all energy of every token. Queries, keys and gates read them much like a bias;
values hardly see them, because norms and columns scale them down. So what an error in a channel does to the rest of the
model is told by what reads the channel, not by the energy in it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qatcli.models.blocks import BlockModel, run_block

TOKENS = 8  # of the hidden states that show what reads them


@torch.no_grad()
def stream_readers(
    model: BlockModel, device: torch.device, *, progress: Callable[[], None] = lambda: None
) -> list[Tensor]:
    """What reads the hidden states, fp32 [R, H]: of every block its linears, then of what follows them the last norm.

    A row holds what a unit of one channel adds to the squares of all outputs: the squared gain of the norm in front, if
    there is one, times the sum of the squares of the linear's column. R is 0 where nothing is found. All weights are
    read for it, block by block; `progress` is called after each.
    """
    probes = _probes(model.hidden_size, device)
    readers = []
    for index, arguments in enumerate(model.block_arguments(TOKENS, device, torch.float32)):
        received = _received(model.load_block(index, device, torch.float32), arguments, probes)
        rows = [_gains(given) * linear.weight.square().sum(0) for linear, given in received.items()]
        readers.append(_stack(rows, probes[0]))
        progress()
    with model.prelude(device, torch.float32) as (base, record):
        outputs = []
        for probe in probes:
            record.passed_on = probe
            outputs.append(base(input_ids=torch.zeros(1, TOKENS, dtype=torch.long, device=device), use_cache=False)[0])
    readers.append(_stack([_gains(outputs)] if outputs[0].shape == probes[0].shape else [], probes[0]))
    return readers


def readers_behind(readers: Sequence[Tensor]) -> list[Tensor]:
    """Of `stream_readers`, those behind every block [R, H]: how the rest of the model reads its output. At least one
    row, of ones if no reader is known. All share one memory: of a large model they are half a gigabyte otherwise."""
    rows = torch.cat(list(readers))
    firsts = itertools.accumulate(len(own) for own in readers[:-1])
    return [rows[first:] if first < len(rows) else rows.new_ones(1, rows.shape[1]) for first in firsts]


def _probes(hidden_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Hidden states [1, TOKENS, H] of alternating ones, and of nothing. Ones have a mean square of one and no mean, so
    that any norm returns its gains and its bias, and of nothing its bias."""
    signs = torch.ones(1, TOKENS, hidden_size, device=device)
    signs[..., 1::2] = -1
    return signs, torch.zeros_like(signs)


def _received(block: nn.Module, arguments: dict[str, Any], probes: Sequence[Tensor]) -> dict[nn.Linear, list[Tensor]]:
    """The linears that read the block's input, by themselves or through a norm, and what they receive of each probe.

    Found by structure: where no linear returns anything, nothing is added to the hidden states on their way, and one
    receives something else for another input only if it reads it.
    """
    received: dict[nn.Linear, list[Tensor]] = {m: [] for m in block.modules() if isinstance(m, nn.Linear)}

    def silence(linear: nn.Linear, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        received[linear].append(args[0])
        return torch.zeros_like(output)

    for linear in received:
        linear.register_forward_hook(silence)  # of the block's own copy, dropped with it
    for hidden in probes:
        run_block(block, hidden, arguments)
    return {linear: given for linear, given in received.items() if not all(torch.equal(given[0], x) for x in given)}


def _gains(received: Sequence[Tensor]) -> Tensor:
    """Squared gains [H] of what stands between the probes and what was received of the first and the last of them."""
    signs, nothing = (received[at].flatten(0, -2)[-1] for at in (0, -1))
    return (signs - nothing).square()


def _stack(rows: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(rows) if rows else like.new_empty(0, like.shape[-1])
