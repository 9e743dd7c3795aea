"""What rounding single linears costs the model, estimated as `quant.average_bits` does and measured.

    python benchmarks/sensitivity.py recipes/smollm2/w3g64.yaml --every 5

Measured: one linear at a time is rounded to its searched grid at the recipe's bits, everything else stays in full
precision, and the next-token divergence (KL, nats per token) on held-out windows is taken. Printed: each linear's
figures, the correlation of their logarithms, and what an allocation at a mean of the recipe's bits would cost by the
measured figures, against the same bits everywhere. Half a forward pass for every linear: `--every` takes each n-th.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

import qatcli
from qat_kernels import quantize
from qatcli.activations import advance_stream, fill_stream
from qatcli.allocation import PER_BIT, Part, allocate
from qatcli.attention import use_tiled_attention
from qatcli.blockfiles import block_quants
from qatcli.data import Windows, sample_windows
from qatcli.grid import initial_grid
from qatcli.losses import token_loss
from qatcli.models.blocks import BlockModel, open_blocks
from qatcli.models.source import open_source
from qatcli.packed import ModuleQuant, QuantizedLinear
from qatcli.recipe import Recipe, load_recipe
from qatcli.sensitivity import WINDOWS, rounding_divergence, shared_inputs
from qatcli.training import autocast, compute_dtype

CHOICES = (2, 3, 4)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def main(
    recipe: Path,
    every: Annotated[int, typer.Option(help="Measure each n-th linear.")] = 1,
    samples: Annotated[int, typer.Option(help="Held-out windows.")] = 8,
) -> None:
    """Print what was found."""
    settings = load_recipe(recipe, [f"calibrate.samples={WINDOWS}", f"calibrate.validation_samples={samples}"])
    model = open_blocks(open_source(**settings.model.model_dump()))
    quants = {n: q for i in range(len(model)) for n, q in block_quants(model, i, settings.quant).items()}
    print(f"qat {qatcli.__version__}, torch {torch.__version__}, {DEVICE}, {torch.get_num_threads()} threads")
    tokens, group_size = settings.calibrate.seq_len, settings.quant.group_size
    print(f"{settings.quant.bits} bits, groups of {group_size}, {WINDOWS} and {samples} windows of {tokens} tokens")
    names = list(quants)[::every]
    estimated, parts = _estimate(settings, model, {name: quants[name] for name in names})
    measure = _Measure(settings, model)
    measured = {}
    for name in names:
        measured[name] = measure(name, quants[name])
        print(f"{name:50} estimated {estimated[name]:.6f}  measured {measured[name]:.6f}", flush=True)
    logs = [[torch.tensor(found[name]).log().item() for name in names] for found in (estimated, measured)]
    print(f"correlation of logarithms {statistics.correlation(*logs):.3f}")
    print(f"sums: estimated {sum(estimated.values()):.4f}, measured {sum(measured.values()):.4f}")
    bits = settings.quant.bits
    sizes = {name: quants[name].in_features * quants[name].out_features for name in names}
    for title, costs in (("estimated", estimated), ("measured", measured)):
        chosen = allocate([_part(part, sizes, costs, bits) for part in parts], choices=CHOICES, average=bits)
        total = sum(measured[name] * PER_BIT ** (bits - chosen[name]) for name in names)
        print(f"at a mean of {bits} bits by the {title} figures: {total / sum(measured.values()):.3f} of the same bits")


def _estimate(
    settings: Recipe, model: BlockModel, quants: dict[str, ModuleQuant]
) -> tuple[dict[str, float], list[tuple[str, ...]]]:
    """The estimate of every linear, and which of them share their bits."""
    train, _ = _windows(settings, model)
    network = model.source.load_model(compute_dtype("auto", DEVICE), DEVICE)
    use_tiled_attention(network, DEVICE)
    found = rounding_divergence(network, quants, train, zero_points="any", seed=settings.calibrate.seed)
    return found, shared_inputs(network, list(quants))


class _Measure:
    """The divergence with one linear rounded: full precision's hidden states before every block are kept."""

    def __init__(self, settings: Recipe, model: BlockModel) -> None:
        _, held_out = _windows(settings, model)
        self.dtype = compute_dtype("auto", DEVICE)
        self.model, self.tokens, self.mask = model, held_out.tokens.long().to(DEVICE), held_out.mask.to(DEVICE)
        use_tiled_attention(model.skeleton, DEVICE)
        self.arguments = model.block_arguments(held_out.tokens.shape[1], DEVICE, torch.float32)
        self.network = model.source.load_model(torch.float32, DEVICE)
        use_tiled_attention(self.network, DEVICE)
        hidden = model.source.config().get_text_config().hidden_size
        stream = torch.empty(*held_out.tokens.shape, hidden, dtype=self.dtype)
        fill_stream(stream, model, held_out.tokens, DEVICE, self.dtype)
        self.starts = []
        for index in range(len(model)):
            self.starts.append(stream.clone())
            self._advance(stream, index)
        self.expected = self._logits(stream)

    @torch.no_grad()
    def __call__(self, name: str, quant: ModuleQuant) -> float:
        """Nats per token with the linear `name` rounded."""
        weight = self.network.get_submodule(name).weight
        kept, shape = weight.data, {"bits": quant.bits, "group_size": quant.group_size}
        scale, zero_point = initial_grid(kept, **shape, zero_points="any", method="mse")
        codes = quantize(kept, scale, zero_point, **shape)
        weight.data = QuantizedLinear(codes, scale, zero_point.to(torch.uint8), **shape).dequantize()
        first = next(i for i in range(len(self.model)) if name.startswith(self.model.block_name(i) + "."))
        stream = self.starts[first].clone()
        for index in range(first, len(self.model)):
            self._advance(stream, index)
        weight.data = kept
        total = float(token_loss(self._logits(stream), self.expected, self.tokens, self.mask))
        return total / int(self.mask[:, 1:].sum())

    def _advance(self, stream: Tensor, index: int) -> None:
        block = self.network.get_submodule(self.model.block_name(index))
        advance_stream(stream, block, self.arguments[index], batch_size=len(stream), device=DEVICE)

    @torch.no_grad()
    def _logits(self, stream: Tensor) -> Tensor:
        with autocast(DEVICE, self.dtype):
            normed = self.network.base_model.norm(stream.to(DEVICE))
            logits: Tensor = self.network.get_output_embeddings()(normed)
        return logits


def _windows(settings: Recipe, model: BlockModel) -> tuple[Windows, Windows]:
    config = settings.calibrate
    found = sample_windows(
        config.data,
        model.source.tokenizer(),
        samples=config.samples,
        validation_samples=config.validation_samples,
        seq_len=config.seq_len,
        seed=config.seed,
    )
    train, held_out = (Windows(t, torch.ones(t.shape, dtype=torch.bool)) for t in (found.train, found.validation))
    return train, held_out


def _part(names: tuple[str, ...], sizes: dict[str, int], costs: dict[str, float], bits: int) -> Part:
    divergence = {choice: sum(costs[name] for name in names) * PER_BIT ** (bits - choice) for choice in CHOICES}
    return Part(names, sum(sizes[name] for name in names), divergence)


if __name__ == "__main__":
    typer.run(main)
