"""Time the tensor operations against plain torch in the same run; prints medians and ratios, nothing is estimated.

    python benchmarks/kernels.py                 # shapes of SmolLM2 and Llama-2-7B, 2 bits, groups of 64
    python benchmarks/kernels.py --bits 3 --shape 4096x11008

fake_quant is compared with the reference implementation's expression under autograd, packed linears with a dense
linear in the same dtype. Runs on the GPU when there is one.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from qat_kernels import dequantize, fake_quant, pack, quantize, quantized_matmul

REPEATS = 9


def main(
    shape: Annotated[list[str], typer.Option(help="OUTxIN; repeatable.")] = ["1536x576", "4096x4096"],  # noqa: B006
    bits: int = 2,
    group_size: int = 64,
    tokens: int = 2048,
) -> None:
    """Print one line per operation and shape."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {name}, {bits} bits, groups of {group_size}, median of {REPEATS}")
    print(f"{'operation':<34}{'shape':>12}{'qat ms':>10}{'torch ms':>10}{'ratio':>8}")
    for text in shape:
        rows, columns = map(int, text.split("x"))
        _one_shape(rows, columns, bits, group_size, tokens, device)


def _one_shape(rows: int, columns: int, bits: int, group_size: int, tokens: int, device: torch.device) -> None:
    torch.manual_seed(0)
    grid = {"bits": bits, "group_size": group_size}
    weight = torch.randn(rows, columns, device=device, requires_grad=True)
    spread = weight.detach().unflatten(1, (-1, group_size))
    scale = ((spread.amax(-1) - spread.amin(-1)) / (2**bits - 1)).requires_grad_()
    zero = (-spread.amin(-1) / scale.detach()).round().requires_grad_()
    seed = torch.randn(rows, columns, device=device)

    def ours() -> None:
        fake_quant(weight, scale, zero, **grid).backward(seed)

    def theirs() -> None:
        _expression(weight, scale, zero, **grid).backward(seed)

    _line("fake_quant forward + backward", rows, columns, ours, theirs, device)

    packed = pack(quantize(weight.detach(), scale.detach(), zero.detach(), **grid), bits=bits)
    integers, steps = zero.detach().to(torch.uint8), scale.detach()
    dense = dequantize(packed, steps, integers, **grid, in_features=columns, dtype=torch.bfloat16)
    for count in (1, 16, tokens):
        x = torch.randn(count, columns, device=device, dtype=torch.bfloat16)
        _line(
            f"packed linear, {count} tokens, bf16",
            rows,
            columns,
            lambda x=x: quantized_matmul(x, packed, steps, integers, **grid),
            lambda x=x: F.linear(x, dense),
            device,
        )


def _expression(weight: Tensor, scale: Tensor, zero: Tensor, *, bits: int, group_size: int) -> Tensor:
    """Learned-grid fake quantization as autograd sees it when it is written out with straight-through estimators."""

    def straight(value: Tensor, changed: Tensor) -> Tensor:
        return (changed - value).detach() + value

    qmax = 2**bits - 1
    w, s, z = weight.unflatten(1, (-1, group_size)), scale[..., None], zero[..., None]
    s = straight(s, s.clamp(1e-4, 1e4))
    z = straight(z, z.round())
    z = straight(z, z.clamp(0, qmax))
    ratio = w / s
    codes = (straight(ratio, ratio.round()) + z).clamp(0, qmax)
    return ((codes - z) * s).flatten(1)


def _line(
    name: str, rows: int, columns: int, ours: Callable[[], object], theirs: Callable[[], object], device: torch.device
) -> None:
    mine, other = _interleaved(ours, theirs, device)
    print(f"{name:<34}{f'{rows}x{columns}':>12}{mine:>10.2f}{other:>10.2f}{other / mine:>8.2f}")


def _interleaved(ours: Callable[[], object], theirs: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Median milliseconds of both, measured in turns so that a noisy machine disturbs both alike."""
    times: tuple[list[float], list[float]] = ([], [])
    for repeat in range(REPEATS + 2):
        for function, seconds in zip((ours, theirs), times, strict=True):
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repeat >= 2:
                seconds.append(time.perf_counter() - start)
    return statistics.median(times[0]) * 1e3, statistics.median(times[1]) * 1e3


if __name__ == "__main__":
    typer.run(main)
