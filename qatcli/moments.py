"""Mean squares of what the linears of a block receive, and the errors of weights that they weigh.

An error in a column of a weight costs what the input of that column makes of it, so both the search of grids and the
figures of damage weigh columns by the mean square of their input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from qatcli.grid import approximation_error
from qatcli.packed import QuantizedLinear


@contextmanager
def input_moments(block: nn.Module, prefix: str) -> Iterator[dict[str, Tensor]]:
    """Watch the block's forward passes: full name of a linear -> mean square of its inputs, fp32 [K].

    The means are there once the context is left; a linear that received nothing is missing.
    """
    moments: dict[str, Tensor] = {}
    tokens: dict[str, int] = {}

    def collect(name: str, x: Tensor) -> None:
        squares = x.float().square().flatten(0, -2)
        power = squares.sum(0)
        moments[name] = moments[name] + power if name in moments else power
        tokens[name] = tokens.get(name, 0) + len(squares)

    linears = {f"{prefix}.{name}": module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    try:
        with watched_inputs(linears, collect):
            yield moments
    finally:
        for name, count in tokens.items():
            moments[name] = moments[name] / count


@contextmanager
def watched_inputs(modules: Mapping[str, nn.Module], collect: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call `collect` with the name of every one of these modules that runs, and with what it receives."""

    def hook(name: str, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        collect(name, inputs[0])

    handles = [module.register_forward_pre_hook(partial(hook, name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def weight_errors(
    block: nn.Module, prefix: str, quantized: Mapping[str, QuantizedLinear], moments: Mapping[str, Tensor]
) -> dict[str, float]:
    """Relative error of every quantized linear against the weight that `block` has in its place, by full name.

    Columns are weighted by `moments`, equally where a linear has none.
    """
    return {
        name: approximation_error(
            block.get_parameter(f"{name.removeprefix(f'{prefix}.')}.weight"),
            linear.dequantize(torch.float32),
            moment=moments.get(name),
        )
        for name, linear in quantized.items()
    }
