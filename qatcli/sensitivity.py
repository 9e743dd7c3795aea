"""What rounding each linear would cost the whole model, estimated before anything is trained.

Rounding errors e change the next-token distribution by a divergence of e F e / 2 to second order, F the Fisher matrix.
They are as good as independent, so its diagonal tells what they add up to: half of the sum of F_ii e_i^2. F_ii is the
mean square of the gradient of log p(y) with y drawn from the model's own distribution; here the mean over a group, in
which errors do not depend on it. Against the divergence measured with one linear of SmolLM2 rounded at a time (3 bits,
210 linears) the logarithms correlate with 0.92, and the sums are 1.10 and 1.21 (LOG.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat_kernels import quantize
from qatcli.allocation import PER_BIT, Part, allocate
from qatcli.data import Windows
from qatcli.grid import ZeroPoints, grouped, initial_grid
from qatcli.losses import token_loss
from qatcli.packed import ModuleQuant
from qatcli.recipe.quant import QuantSection
from qatcli.training import recompute_activations

WINDOWS = 16  # of the training text, from which the figures above are
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
    one tensor share their bits. `progress` is called for every window and every linear.
    """
    free = {name: q for name, q in quants.items() if not quant.sets_bits(name)}
    fisher = group_fisher(network, free, windows, seed=seed, progress=progress)
    divergence: dict[str, float] = {}
    for name, q in free.items():
        if name in fisher:
            weight = network.get_submodule(name).weight
            divergence[name] = rounding_divergence(weight, fisher[name], q, zero_points=quant.zero_points)
        progress()

    def at(name: str, bits: int) -> float:
        return divergence[name] * PER_BIT ** (free[name].bits - bits)

    parts = []
    for names in shared_inputs(network, list(divergence)):
        weights = sum(free[name].in_features * free[name].out_features for name in names)
        costs: dict[int, float] = {bits: sum(at(name, bits) for name in names) for bits in quant.choices}
        parts.append(Part(names, weights, costs))
    assert quant.average_bits is not None
    chosen = allocate(parts, choices=quant.choices, average=quant.average_bits)
    return {name: {"bits": bits, "divergence": at(name, bits)} for name, bits in chosen.items()}


def group_fisher(
    network: Any,
    quants: Mapping[str, ModuleQuant],
    windows: Windows,
    *,
    seed: int,
    progress: Callable[[], object] = lambda: None,
) -> dict[str, Tensor]:
    """Per linear, the mean over each group of the Fisher matrix's diagonal, per token: fp32 [N, G].

    network: a causal LM in full precision; a window is a forward and a backward pass. Linears that no token reaches
    (experts) are missing. The gradients of one linear exist at a time.
    """
    device = network.device
    generator = torch.Generator(device).manual_seed(seed)
    squares: dict[str, Tensor] = {}

    def collect(name: str, group_size: int) -> Callable[[Tensor], None]:
        def hook(weight: Tensor) -> None:
            assert weight.grad is not None
            power = grouped(weight.grad.float().square(), group_size).mean(-1)
            squares[name] = squares[name] + power if name in squares else power
            weight.grad = None

        return hook

    network.requires_grad_(False)
    handles = []
    for name, quant in quants.items():
        weight = network.get_submodule(name).weight.requires_grad_(True)
        handles.append(weight.register_post_accumulate_grad_hook(collect(name, quant.group_size)))
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
    return {name: power / max(1, windows.targets) for name, power in squares.items()}


@torch.no_grad()
def rounding_divergence(weight: Tensor, fisher: Tensor, quant: ModuleQuant, *, zero_points: ZeroPoints) -> float:
    """Nats per token that rounding `weight` [N, K] to its nearest grid costs; `fisher` [N, G] as of `group_fisher`."""
    weight, bits, group_size = weight.float(), quant.bits, quant.group_size
    scale, zero_point = initial_grid(weight, bits=bits, group_size=group_size, zero_points=zero_points, method="mse")
    codes = quantize(weight, scale, zero_point, bits=bits, group_size=group_size)
    level = grouped(codes.float(), group_size) - zero_point[..., None]
    error = level * scale[..., None] - grouped(weight, group_size)
    return float((error.square().sum(-1) * fisher).sum()) / 2


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
