"""How a model reads its hidden states: the gain of every channel in every norm that stands in front of a layer.

A few channels hold nearly all energy of every token in some models, and the norms scale them down (Gemma-3) or up. What
an error in a channel does to the rest of the model is told by these gains, not by the energy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from qatcli.models.blocks import BlockModel, run_block

TOKENS = 8  # of the hidden states that show which modules read them


@torch.no_grad()
def stream_gains(model: BlockModel, device: torch.device) -> list[Tensor]:
    """Squared gains of the norms that read the hidden states, fp32 [R, H]: of every block, then of what follows them.

    Found by structure: a block whose linears are all zero passes its input through unchanged, and what still receives
    it is what reads it. Norms of what a layer has computed (Gemma's second ones) are none. R is 0 where there are none.
    """
    gains = []
    for index, arguments in enumerate(model.block_arguments(TOKENS, device, torch.float32)):
        block = model.load_block(index, device, torch.float32, linears=False)
        hidden = _signs(model.hidden_size, device).expand(1, TOKENS, -1)
        with _readers(block.modules(), partial(torch.equal, hidden)) as readers:
            run_block(block, hidden, arguments)
        gains.append(_gains(readers, model.hidden_size, device))
    with model.prelude(device, torch.float32) as (base, record):
        with _readers(base.modules(), lambda given: given is record.hidden) as readers:
            base(input_ids=torch.zeros(1, TOKENS, dtype=torch.long, device=device), use_cache=False)
        gains.append(_gains(readers, model.hidden_size, device))
    return gains


def gains_behind(gains: Sequence[Tensor], index: int) -> Tensor:
    """Of `stream_gains`, those behind block `index` [R, H]: how the rest of the model reads its output. At least one
    row, of ones if no norm is known."""
    behind = torch.cat(list(gains[index + 1 :]))
    return behind if len(behind) else gains[-1].new_ones(1, gains[-1].shape[1])


@contextmanager
def _readers(modules: Iterable[nn.Module], reads: Callable[[Tensor], bool]) -> Iterator[list[nn.Module]]:
    """Watch forward passes: the modules without parts, linears aside, that received what `reads` accepts and returned
    a tensor of that shape."""
    found: list[nn.Module] = []

    def watch(module: nn.Module, args: tuple[object, ...], output: object) -> None:
        given = args[0] if args else None
        if isinstance(given, Tensor) and isinstance(output, Tensor) and given.shape == output.shape and reads(given):
            found.append(module)

    watched = [m for m in modules if not isinstance(m, nn.Linear) and not any(m.children())]
    handles = [module.register_forward_hook(watch) for module in watched]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _gains(norms: list[nn.Module], hidden_size: int, device: torch.device) -> Tensor:
    """[R, H]. Signs have a mean square of one and no mean, so that any norm returns its gains and its bias."""
    signs = _signs(hidden_size, device)
    rows = [(norm(signs) - norm(torch.zeros_like(signs))).float().square().flatten() for norm in norms]
    return torch.stack(rows) if rows else signs.new_empty(0, hidden_size)


def _signs(hidden_size: int, device: torch.device) -> Tensor:
    """Alternating ones [1, 1, H]."""
    signs = torch.ones(1, 1, hidden_size, device=device)
    signs[..., 1::2] = -1
    return signs
