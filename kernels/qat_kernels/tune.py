"""`python -m qat_kernels.tune`: time launch settings on this GPU and write them to configs/<its name>.json.

Every candidate's result is compared with the first one's before its time counts. Crossovers between kernels are set so
that no batch is served by a kernel that was slower than dequantize + cuBLAS at any of the shapes. Takes some minutes,
most of them compiling. In the interpreter, for a rehearsal: `TRITON_INTERPRET=1 python -m qat_kernels.tune --shape
64x128 --bits 2 --out FILE`.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat_kernels import (
    bitstream,
    interleave,
    reference,
    timing,
    triton_dequantize,
    triton_fake_quant,
    triton_gemv,
    triton_linear,
    triton_matmul,
    triton_scale_grad,
    tuning,
)
from qat_kernels.candidates import Settings, candidates

SHAPES = ["4096x4096", "4096x11008", "8192x8192", "8192x28672", "16384x16384"]
GROUP_SIZE = 64
BATCHES = {"gemv": (1, 2, 4), "matmul": (16, 64, 256), "input_grad": (64, 256), "scale_grad": (4096,)}
ROUTES = {"quantized_matmul": ("gemv", "matmul"), "input_grad": ("input_grad",), "scale_grad": ("scale_grad",)}
CROSSOVERS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)


class Problem:
    """Random tensors of one shape, as many weights as it takes to leave the cache, and every kernel on them."""

    def __init__(self, device: torch.device, bits: int, m: int, n: int, k: int) -> None:
        self.device, self.m, self.n, self.k = device, m, n, k
        self.grid: dict[str, Any] = {"bits": bits, "group_size": GROUP_SIZE}
        shape = (n, bitstream.words_per_row(k, bits))
        numbers = torch.randint(-(2**31), 2**31 - 1, shape, device=device, dtype=torch.int64).to(torch.int32)
        self.packed = [numbers.clone() for _ in range(timing.copies(device, numbers.nbytes))]
        self.words = [interleave.interleave(packed, bits=bits, in_features=k) for packed in self.packed]
        groups = (n, k // GROUP_SIZE)
        self.scale = torch.rand(groups, device=device).to(torch.float16) + 0.5
        self.zero_point = torch.randint(0, 2**bits, groups, device=device, dtype=torch.uint8)
        self.x = torch.randn(m, k, device=device).to(torch.bfloat16)
        self.grad_out = torch.randn(m, n, device=device).to(torch.bfloat16)

    def calls(self, kernel: str, use: Settings) -> list[Callable[[], Tensor]]:
        """The kernel on every weight."""
        return [self._call(kernel, use, place) for place in range(len(self.packed))]

    def _call(self, kernel: str, use: Settings, place: int) -> Callable[[], Tensor]:
        x, grad_out, packed, words = self.x, self.grad_out, self.packed[place], self.words[place]
        scale, zero_point, grid = self.scale, self.zero_point, self.grid
        return {
            "gemv": lambda: triton_gemv.gemv(x, words, scale, zero_point, **grid, **use),
            "matmul": lambda: triton_matmul.matmul(x, packed, scale, zero_point, **grid, **use),
            "input_grad": lambda: triton_matmul.input_grad(
                grad_out, packed, scale, zero_point, **grid, in_features=self.k, **use
            ),
            "scale_grad": lambda: triton_scale_grad.scale_grad(grad_out, x, packed, zero_point, **grid, **use),
            "dense quantized_matmul": lambda: triton_linear._dense_matmul(x, packed, scale, zero_point, **grid),
            "dense input_grad": lambda: triton_linear._dense_input_grad(
                grad_out, packed, scale, zero_point, **grid, in_features=self.k
            ),
            "dense scale_grad": lambda: reference.scale_grad(
                grad_out, x, packed, zero_point, **grid, dequantize=triton_dequantize.dequantize
            ),
        }[kernel]


def main(arguments: list[str] | None = None) -> None:
    """Tune and write."""
    parser = argparse.ArgumentParser(prog="python -m qat_kernels.tune", description=__doc__)
    parser.add_argument("--shape", action="append", help=f"OUTxIN, repeatable; default {' '.join(SHAPES)}")
    parser.add_argument("--bits", action="append", type=int, choices=(2, 3, 4, 8), help="repeatable; default all")
    parser.add_argument("--out", type=Path, help="default: beside the other settings, under the name of the GPU")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "interpreter"
    shapes = [(int(n), int(k)) for n, k in (text.split("x") for text in options.shape or SHAPES)]
    table = tune(device, name, shapes, options.bits or [2, 3, 4, 8])
    path = options.out or tuning.CONFIGS / f"{re.sub('[^a-z0-9]+', '-', name.lower())}.json"
    path.write_text(as_text(table), encoding="utf-8")
    print(path)


def tune(device: torch.device, name: str, shapes: list[tuple[int, int]], widths: list[int]) -> dict[str, Any]:
    """The contents of a file of settings."""
    settings: dict[str, list[dict[str, Any]]] = {kernel: [] for kernel in ("fake_quant", "fake_quant_backward")}
    for kernel, (n, k) in ((kernel, shape) for kernel in settings for shape in shapes):
        settings[kernel].append({"n": n, "k": k, **_best_fake_quant(device, kernel, n, k)})
    for kernel, batches in BATCHES.items():
        settings[kernel] = []
        for place, m in enumerate(batches):
            limit = {} if place == len(batches) - 1 else {"up_to_m": m}
            for bits, (n, k) in ((bits, shape) for bits in widths for shape in shapes):
                best = _best(kernel, Problem(device, bits, m, n, k))
                settings[kernel].append({**limit, "bits": [bits], "n": n, "k": k, **best})
    known = tuning.Table(Path(name), (name,), True, {}, settings)
    routes = {operation: _crossovers(device, known, operation, shapes, widths) for operation in ROUTES}
    head = {"format_version": tuning.FORMAT_VERSION, "devices": [name], "timed": True}
    note = f"Timed by qat_kernels.tune with torch {torch.__version__}, groups of {GROUP_SIZE}, bf16; us is per call."
    return {**head, "note": note, "routes": routes, "settings": settings}


def as_text(table: dict[str, Any]) -> str:
    """JSON with one rule to a line, so that two tunings can be compared line by line."""
    text = json.dumps(table, indent=2)
    rule = re.compile(r"\{\n(?: {8,}.*\n)+ {6}\}")
    return rule.sub(lambda found: re.sub(r"\s*\n\s*", " ", found[0]), text) + "\n"


def _best(kernel: str, problem: Problem) -> dict[str, Any]:
    tried = candidates(kernel, bits=problem.grid["bits"], m=problem.m, n=problem.n, k=problem.k)
    what = f"{kernel} {problem.grid['bits']} bits {problem.m}x{problem.n}x{problem.k}"
    return _fastest(what, problem.device, [(use, problem.calls(kernel, use)) for use in tried])


def _best_fake_quant(device: torch.device, kernel: str, n: int, k: int) -> dict[str, Any]:
    weight, grad_out = (torch.randn(n, k, device=device) for _ in range(2))
    scale = torch.rand(n, k // GROUP_SIZE, device=device) + 0.5
    inputs = (weight, scale, torch.ones_like(scale))
    tried: list[tuple[Settings, list[timing.Call]]] = []
    for use in candidates(kernel, bits=2, m=0, n=n, k=k):
        if kernel == "fake_quant":

            def call(use: Settings = use) -> Tensor:
                return triton_fake_quant.fake_quant(
                    *inputs, bits=2, group_size=GROUP_SIZE, out_dtype=torch.bfloat16, use=use
                )
        else:

            def call(use: Settings = use) -> Tensor:
                return triton_fake_quant.fake_quant_backward(grad_out, *inputs, bits=2, group_size=GROUP_SIZE, use=use)[
                    0
                ]

        tried.append((use, [call]))
    return _fastest(f"{kernel} {n}x{k}", device, tried)


def _fastest(what: str, device: torch.device, tried: list[tuple[Settings, Any]]) -> dict[str, Any]:
    """The settings with the shortest time; those that do not launch are passed over, wrong results are an error."""
    best: tuple[float, Settings] | None = None
    expected: Tensor | None = None
    for use, calls in tried:
        try:
            result = calls[0]().float()
            taken = timing.seconds(device, calls)
        except Exception as error:  # too much shared memory or too many registers for this device
            print(f"{what}: {use} does not run: {type(error).__name__}", file=sys.stderr)
            continue
        expected = result if expected is None else expected
        torch.testing.assert_close(result, expected, rtol=0, atol=2**-6 * expected.abs().max().item())
        if best is None or taken < best[0]:
            best = taken, use
    if best is None:
        raise RuntimeError(f"{what}: no candidate runs on this device")
    print(f"{what}: {best[0] * 1e6:.1f} us with {best[1]}", file=sys.stderr)
    return {"use": best[1], "us": round(best[0] * 1e6, 2)}


def _crossovers(
    device: torch.device, table: tuning.Table, operation: str, shapes: list[tuple[int, int]], widths: list[int]
) -> dict[str, int]:
    """Up to which batch each kernel of an operation is the fastest for every shape and width."""
    limits = dict.fromkeys(ROUTES[operation], 0)
    kernels = list(ROUTES[operation])
    for m in CROSSOVERS:
        while kernels and not all(
            _wins(Problem(device, bits, m, n, k), table, operation, kernels) for bits in widths for n, k in shapes
        ):
            kernels.pop(0)
        if not kernels:
            break
        limits[kernels[0]] = m
    return limits


def _wins(problem: Problem, table: tuning.Table, operation: str, kernels: list[str]) -> bool:
    """Whether the first of the kernels is faster than the others and than the dense way."""
    bits, m, n, k = problem.grid["bits"], problem.m, problem.n, problem.k
    times = []
    for kernel in [*kernels, f"dense {operation}"]:
        use = {} if kernel.startswith("dense") else table.pick(kernel, bits=bits, m=m, n=n, k=k)
        times.append(timing.seconds(problem.device, problem.calls(kernel, use)))
    return times[0] == min(times)


if __name__ == "__main__":
    main()
