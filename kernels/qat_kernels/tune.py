"""`python -m qat_kernels.tune`: time launch settings on this GPU and write them to configs/<its name>.json.

First all candidates are compiled, by as many processes as there are cores: what they leave in Triton's cache is what
takes long. Then they are timed, one weight after the other. Every candidate's result is compared with the first one's
before its time counts. Crossovers between kernels are set so that no batch is served by a kernel that was slower than
dequantize + cuBLAS at any of the shapes. In the interpreter, for a rehearsal: `TRITON_INTERPRET=1 python -m
qat_kernels.tune --shape 64x128 --bits 2 --jobs 1 --out FILE`.
"""

import argparse
import json
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import product
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
WIDTHS = (2, 3, 4, 8)
FAKE_QUANT = ("fake_quant", "fake_quant_backward")
BATCHES = {
    **dict.fromkeys(FAKE_QUANT, (0,)),
    "gemv": (1, 2, 4),
    "matmul": (16, 64, 256),
    "input_grad": (64, 256),
    "scale_grad": (4096,),
}
"""Rows of x for which each kernel is timed; fake_quant has none."""
ROUTES = {"quantized_matmul": ("gemv", "matmul"), "input_grad": ("input_grad",), "scale_grad": ("scale_grad",)}
CROSSOVERS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
REPEATS = 7
FEW_ROWS = 64  # of a weight that is only there to compile its kernels

Call = Callable[[], Tensor]
Compilation = tuple[str, int, int, int, Settings]  # kernel, bits, rows of x, columns, settings


class Problem:
    """Random weights of one shape, as many as it takes to leave the cache, and every kernel on them."""

    def __init__(self, device: torch.device, bits: int, n: int, k: int, *, copies: int | None = None) -> None:
        self.device, self.bits, self.n, self.k = device, bits, n, k
        self.grid: dict[str, Any] = {"bits": bits, "group_size": GROUP_SIZE}
        shape = (n, bitstream.words_per_row(k, bits))
        numbers = torch.randint(-(2**31), 2**31 - 1, shape, device=device, dtype=torch.int64).to(torch.int32)
        self.packed = [numbers.clone() for _ in range(copies or timing.copies(device, numbers.nbytes))]
        self.words = [interleave.interleave(packed, bits=bits, in_features=k) for packed in self.packed]
        groups = (n, k // GROUP_SIZE)
        self.scale = torch.rand(groups, device=device).to(torch.float16) + 0.5
        self.zero_point = torch.randint(0, 2**bits, groups, device=device, dtype=torch.uint8)
        self._batches: dict[int, tuple[Tensor, Tensor]] = {}

    def __str__(self) -> str:
        return f"{self.bits} bits {self.n}x{self.k}"

    def candidates(self, kernel: str, m: int) -> list[Settings]:
        """What is worth timing for m rows of activations."""
        return candidates(kernel, bits=self.bits, m=m, n=self.n, k=self.k)

    def calls(self, kernel: str, m: int, use: Settings) -> list[Call]:
        """The kernel on every weight with m rows of activations or gradients; fake_quant has one weight of its own."""
        if kernel in FAKE_QUANT:
            return [self._fake_quant(kernel, use)]
        x, grad_out = self._batch(m)
        return [
            self._call(kernel, x, grad_out, packed, words, use)
            for packed, words in zip(self.packed, self.words, strict=True)
        ]

    def _batch(self, m: int) -> tuple[Tensor, Tensor]:
        if m not in self._batches:
            x, grad_out = (torch.randn(m, width, device=self.device).to(torch.bfloat16) for width in (self.k, self.n))
            self._batches[m] = x, grad_out
        return self._batches[m]

    def _call(self, kernel: str, x: Tensor, grad_out: Tensor, packed: Tensor, words: Tensor, use: Settings) -> Call:
        scale, zero_point, grid = self.scale, self.zero_point, self.grid
        calls: dict[str, Call] = {
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
        }
        return calls[kernel]

    def _fake_quant(self, kernel: str, use: Settings) -> Call:
        weight, grad_out = self._weight
        inputs, grid = (weight, self.scale.float(), self.zero_point.float()), {**self.grid, "use": use}
        if kernel == "fake_quant":
            return lambda: triton_fake_quant.fake_quant(*inputs, **grid, out_dtype=torch.bfloat16)
        return lambda: triton_fake_quant.fake_quant_backward(grad_out, *inputs, **grid)[0]

    @cached_property
    def _weight(self) -> tuple[Tensor, Tensor]:
        weight = torch.randn(self.n, self.k, device=self.device)
        return weight, weight.bfloat16()


class Tuning:
    """What was measured so far; `known` is the table that stands where nothing was."""

    def __init__(self, name: str, known: tuning.Table, kernels: Sequence[str], widths: Sequence[int]) -> None:
        self.name, self.known, self.kernels, self.widths = name, known, kernels, widths
        self.failed = False
        self._rules: dict[str, dict[int, list[dict[str, Any]]]] = {
            kernel: {m: [] for m in BATCHES[kernel]} for kernel in kernels
        }
        self._times: dict[tuple[str, int], list[dict[str, float]]] = {}  # operation and batch -> a time per kernel

    def measure(self, problem: Problem) -> None:
        """Find the settings of every kernel for this weight, and time the kernels against each other with them."""
        measured = set()
        for kernel in self.kernels:
            if kernel in FAKE_QUANT and problem.bits != self.widths[0]:
                continue  # the width is a number in its arithmetic
            for m in BATCHES[kernel]:
                try:
                    use, seconds = _fastest(problem, kernel, m)
                except (AssertionError, RuntimeError) as error:
                    self.failed = True
                    print(f"{kernel} {problem}, {m} rows: {error}", file=sys.stderr)
                    continue
                measured.add(kernel)
                bits = {} if kernel in FAKE_QUANT else {"bits": [problem.bits]}
                rule = {**bits, "n": problem.n, "k": problem.k, "use": use, "us": round(seconds * 1e6, 2)}
                self._rules[kernel][m].append(rule)
        for operation, kernels in ROUTES.items():
            if measured.issuperset(kernels):
                self._compare(problem, operation, kernels)

    def _compare(self, problem: Problem, operation: str, kernels: Sequence[str]) -> None:
        """Time the kernels of an operation, and the dense way, with the settings that the file will name."""
        settings = {kernel: self._settings(kernel) for kernel in kernels}
        found = tuning.Table(Path(self.name), (self.name,), True, {}, settings)
        for m in CROSSOVERS:
            uses = {kernel: found.pick(kernel, bits=problem.bits, m=m, n=problem.n, k=problem.k) for kernel in kernels}
            times = {
                kernel: timing.seconds(problem.device, problem.calls(kernel, m, use), repeats=REPEATS)
                for kernel, use in {**uses, f"dense {operation}": {}}.items()
            }
            self._times.setdefault((operation, m), []).append(times)

    def table(self) -> dict[str, Any]:
        """The contents of a file of settings."""
        settings = {kernel: self._settings(kernel) for kernel in self.known.settings}
        routes = {operation: self._crossovers(operation) for operation in ROUTES}
        head = {"format_version": tuning.FORMAT_VERSION, "devices": [self.name], "timed": True}
        note = (
            f"Timed by qat_kernels.tune with torch {torch.__version__}, groups of {GROUP_SIZE}, bf16; us is per call."
        )
        return {**head, "note": note, "routes": routes, "settings": settings}

    def _settings(self, kernel: str) -> list[dict[str, Any]]:
        """Rules by batch, the last for any; what is known stays for widths that were not measured to the last batch."""
        measured = self._rules.get(kernel, {})
        rules = []
        for place, m in enumerate(measured):
            limit = {} if place == len(measured) - 1 else {"up_to_m": m}
            rules += [{**limit, **rule} for rule in measured[m]]
        done = {bits for rule in rules if "up_to_m" not in rule for bits in rule.get("bits", WIDTHS)}
        rules = [rule for rule in rules if done.issuperset(rule.get("bits", WIDTHS))]
        for rule in self.known.settings[kernel]:
            known = rule.get("bits", WIDTHS)
            others = [bits for bits in known if bits not in done]
            if others:
                rules.append(rule if len(others) == len(known) else {**rule, "bits": others})
        return rules

    def _crossovers(self, operation: str) -> dict[str, int]:
        """Up to which batch each kernel of an operation is the fastest for every weight."""
        if (operation, CROSSOVERS[0]) not in self._times:
            return self.known.routes[operation]
        limits, kernels = dict.fromkeys(ROUTES[operation], 0), list(ROUTES[operation])
        for m in CROSSOVERS:
            for times in self._times[operation, m]:
                while kernels and times[kernels[0]] > min(times[k] for k in [*kernels, f"dense {operation}"]):
                    kernels.pop(0)
            if not kernels:
                break
            limits[kernels[0]] = m
        return limits


def main(arguments: list[str] | None = None) -> None:
    """Tune and write, after every weight: what was measured is kept if the rest is interrupted."""
    parser = argparse.ArgumentParser(prog="python -m qat_kernels.tune", description=__doc__)
    parser.add_argument("--shape", action="append", help=f"OUTxIN, repeatable; default {' '.join(SHAPES)}")
    parser.add_argument("--bits", action="append", type=int, choices=WIDTHS, help="repeatable; default all")
    parser.add_argument("--kernel", action="append", choices=list(BATCHES), help="repeatable; default all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile; default: cores")
    parser.add_argument("--out", type=Path, help="default: beside the other settings, under the name of the GPU")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "interpreter"
    shapes = [(int(n), int(k)) for n, k in (text.split("x") for text in options.shape or SHAPES)]
    widths, kernels = options.bits or list(WIDTHS), options.kernel or list(BATCHES)
    path = options.out or tuning.CONFIGS / f"{re.sub('[^a-z0-9]+', '-', name.lower())}.json"
    if not os.access(path.parent, os.W_OK):
        parser.error(f"cannot write into {path.parent}: name a file elsewhere with --out")
    if options.jobs > 1 and device.type == "cuda":
        _compile_all(list(_compilations(shapes, widths, kernels)), options.jobs)
    found = Tuning(name, tuning.load(path) if path.exists() else tuning.default(), kernels, widths)
    for bits in widths:
        for n, k in shapes:
            found.measure(Problem(device, bits, n, k))
            written = path.with_name(path.name + ".partial")
            written.write_text(as_text(found.table()), encoding="utf-8")
            written.replace(path)  # an interruption must not leave half of a file
    print(path)
    if found.failed:
        sys.exit(1)


def as_text(table: dict[str, Any]) -> str:
    """JSON with one rule to a line, so that two tunings can be compared line by line."""
    text = json.dumps(table, indent=2)
    rule = re.compile(r"\{\n(?: {8,}.*\n)+ {6}\}")
    return rule.sub(lambda found: re.sub(r"\s*\n\s*", " ", found[0]), text) + "\n"


def _fastest(problem: Problem, kernel: str, m: int) -> tuple[Settings, float]:
    """The settings with the shortest time, in seconds; those that do not launch are passed over.

    AssertionError when results differ, RuntimeError when nothing launches.
    """
    best: tuple[Settings, float] | None = None
    expected: Tensor | None = None
    what = f"{kernel} {problem}, {m} rows"
    for use in problem.candidates(kernel, m):
        calls = problem.calls(kernel, m, use)
        try:
            result = calls[0]().float()
            taken = timing.seconds(problem.device, calls, repeats=REPEATS)
        except Exception as error:  # too much shared memory or too many registers for this device
            print(f"{what}: {use} does not run: {type(error).__name__}", file=sys.stderr)
            continue
        expected = result if expected is None else expected
        torch.testing.assert_close(result, expected, rtol=0, atol=2**-6 * expected.abs().max().item())
        if best is None or taken < best[1]:
            best = use, taken
    if best is None:
        raise RuntimeError("no candidate runs on this device")
    print(f"{what}: {best[1] * 1e6:.1f} us with {best[0]}", file=sys.stderr)
    return best


def _compilations(shapes: list[tuple[int, int]], widths: list[int], kernels: list[str]) -> Iterator[Compilation]:
    """Every binary that will be asked for, once, with a weight for which it is asked."""
    seen = set()
    for kernel, bits, (n, k) in product(kernels, widths, shapes):
        # Triton makes a binary of its own where a size is not a multiple of 16.
        sizes = () if kernel in (*FAKE_QUANT, "gemv") else (bitstream.words_per_row(k, bits) % 16, k // GROUP_SIZE % 16)
        for m in BATCHES[kernel]:
            for use in candidates(kernel, bits=bits, m=m, n=n, k=k):
                own = tuple(value for name, value in use.items() if name != "splits")
                key = (kernel, 0 if kernel in FAKE_QUANT else bits, own, *(size == 0 for size in sizes))
                if key not in seen:
                    seen.add(key)
                    yield kernel, bits, m, k, use


def _compile_all(compilations: list[Compilation], jobs: int) -> None:
    start = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        for done, _ in enumerate(pool.imap_unordered(_compile, compilations), start=1):
            if done % 50 == 0 or done == len(compilations):
                print(f"compiled {done} of {len(compilations)}, {time.monotonic() - start:.0f} s", file=sys.stderr)


def _compile(compilation: Compilation) -> None:
    kernel, bits, m, k, use = compilation
    problem = Problem(torch.device("cuda"), bits, FEW_ROWS, k, copies=1)
    with suppress(Exception):  # the one that does not compile is reported where it would be timed
        problem.calls(kernel, m, use)[0]()


if __name__ == "__main__":
    main()
