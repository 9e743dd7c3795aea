"""What rounding each linear would cost the whole model, estimated before anything is trained.

Rounding errors e change the next-token distribution by a divergence of e F e / 2 to second order, F the Fisher matrix.
They are as good as independent, so its diagonal tells what they add up to: half of the sum of F_ii e_i^2. F_ii is the
mean square of the gradient of log p(y) with y drawn from the model's own distribution. The sum is taken weight by
weight: with means of F over groups of 64 in its place q came out half and v three times as large.
`python benchmarks/sensitivity.py` compares the estimate with the divergence measured with one linear rounded at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat_kernels import fake_quant
from qatcli.allocation import PER_BIT, Part, allocate
from qatcli.data import Windows
from qatcli.grid import ZeroPoints, initial_grid
from qatcli.losses import token_loss
from qatcli.packed import ModuleQuant
from qatcli.recipe.quant import QuantSection
from qatcli.training import recompute_activations

WINDOWS = 16  # of the training text
PROBE = 8  # tokens that show which linears receive the same tensor


def choose_bits(
    network: Any,
    quant: QuantSection,
    quants: Mapping[str, ModuleQuant],
    windows: Windows,
    *,
    seed: int,
    progress: Callable[[], object] = lambda: None,
) -> dict[str, dict[str, float]]:
    """Name -> `bits` of every linear whose bits no override sets, and the `divergence` that rounding it to them costs.

    `quants` are the linears at `quant.bits`. The mean is `quant.average_bits` or a little less; linears that receive
    one tensor share their bits. `progress` is called for every linear and every window.
    """
    assert quant.average_bits is not None
    free = {name: q for name, q in quants.items() if not quant.sets_bits(name)}
    divergence = rounding_divergence(
        network, free, windows, zero_points=quant.zero_points, seed=seed, progress=progress
    )

    def at(name: str, bits: int) -> float:
        return divergence[name] * PER_BIT ** (free[name].bits - bits)

    parts = []
    for names in shared_inputs(network, list(divergence)):
        weights = sum(free[name].in_features * free[name].out_features for name in names)
        costs: dict[int, float] = {bits: sum(at(name, bits) for name in names) for bits in quant.choices}
        parts.append(Part(names, weights, costs))
    chosen = allocate(parts, choices=quant.choices, average=quant.average_bits)
    return {name: {"bits": bits, "divergence": at(name, bits)} for name, bits in chosen.items()}


def rounding_divergence(
    network: Any,
    quants: Mapping[str, ModuleQuant],
    windows: Windows,
    *,
    zero_points: ZeroPoints,
    seed: int,
    progress: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """Per linear, the divergence in nats per token that rounding it to the nearest points of its grid would cost.

    network: a causal LM in full precision; a window is a forward and a backward pass. The gradient of one linear exists
    at a time. Linears that no token reaches (experts) are missing. `progress` is called for every linear and window.
    """
    device = network.device
    generator = torch.Generator(device).manual_seed(seed)
    total: dict[str, Tensor] = {}

    def collect(name: str, quant: ModuleQuant, grid: tuple[Tensor, Tensor]) -> Callable[[Tensor], None]:
        @torch.no_grad()
        def hook(weight: Tensor) -> None:
            assert weight.grad is not None
            exact = weight.float()
            error = fake_quant(exact, *grid, bits=quant.bits, group_size=quant.group_size) - exact
            cost = error.mul_(weight.grad).square_().sum() / 2
            total[name] = total[name] + cost if name in total else cost
            weight.grad = None

        return hook

    network.requires_grad_(False)
    handles = []
    for name, q in quants.items():
        weight = network.get_submodule(name).weight
        grid = initial_grid(
            weight.detach(), bits=q.bits, group_size=q.group_size, zero_points=zero_points, method="mse"
        )
        handles.append(weight.requires_grad_(True).register_post_accumulate_grad_hook(collect(name, q, grid)))
        progress()
    recompute_activations(network)
    network.train()  # what recomputing activations needs
    try:
        for tokens, mask in zip(windows.tokens.long(), windows.mask, strict=True):
            logits = network(input_ids=tokens[None].to(device), use_cache=False).logits
            drawn = torch.multinomial(logits[0].detach().float().softmax(-1), 1, generator=generator)
            labels = F.pad(drawn[:-1, 0], (1, 0))[None]  # of each token, by the logits before it
            token_loss(logits, None, labels, mask[None].to(device)).backward()
            progress()
    finally:
        for handle in handles:
            handle.remove()
        network.requires_grad_(False).eval()
    return {name: float(cost) / max(1, windows.targets) for name, cost in total.items()}


@torch.no_grad()
def shared_inputs(network: Any, names: list[str]) -> list[tuple[str, ...]]:
    """`names` of linears in parts that receive one tensor, as q, k and v do: those that serving runs as one product."""
    received: dict[str, Tensor] = {}  # kept, so that an id stays its own

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            received[name] = args[0]

        return hook

    handles = [network.get_submodule(name).register_forward_pre_hook(keep(name)) for name in names]
    try:
        network(input_ids=torch.arange(PROBE, device=network.device)[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    parts: dict[Any, list[str]] = {}
    for name in names:
        parts.setdefault(id(received[name]) if name in received else name, []).append(name)
    return [tuple(part) for part in parts.values()]
