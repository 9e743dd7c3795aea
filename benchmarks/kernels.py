"""Time every tensor operation against plain torch in the same run; nothing is estimated.

    python benchmarks/kernels.py --csv kernels.csv          # every figure that issue 3 asks for, on this machine
    python benchmarks/kernels.py --bits 4 --shape 8192x8192 --batch 1

On a GPU each call is timed inside a CUDA graph, over enough packed weights to leave the L2 cache, and compared with
fp16 cuBLAS on a dense weight. On a CPU packed linears are compared with dense ones in fp32 and bf16, and fake_quant
with the expression that EfficientQAT runs under autograd. The peaks that fractions refer to are measured first: a copy
(bytes read and written) and a square matrix product. The last block compares with the targets of the project.

To rehearse the Triton path without a GPU: `TRITON_INTERPRET=1 QAT_KERNELS=triton ... --shape 8x128 --batch 1
--rounds 1 --repeats 1`.
"""

from __future__ import annotations

import csv
import datetime
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

import qat_kernels
from qat_kernels import dispatch, timing

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
SHAPES = ["4096x4096", "4096x11008", "8192x8192", "8192x28672", "16384x16384"] if ON_GPU else ["1536x576", "4096x4096"]
BATCHES = [1, 4, 16, 128, 2048] if ON_GPU else [1, 16]
ACTIVATIONS = torch.float16 if ON_GPU else torch.float32
MEMORY_BOUND = 16  # the largest batch whose fraction is of the copy bandwidth

Calls = Sequence[Callable[[], object]]


@dataclass
class Row:
    """One measurement. `fraction` is of the copy bandwidth or of the matrix product's rate, `ratio` is torch / ours."""

    operation: str
    bits: int
    shape: str
    batch: int
    us: float
    gb_s: float
    tflop_s: float
    fraction: float
    against: str
    against_us: float
    ratio: float


@dataclass(frozen=True)
class Peaks:
    """What this machine reaches, in bytes and in operations per second."""

    copy: float
    matmul: float


@dataclass(frozen=True)
class Target:
    """A figure the project set itself: `field` of the rows that match must be at least `least`."""

    device: str
    operation: str
    bits: int
    shape: str
    batch: int
    against: str
    field: str
    least: float


TARGETS = [
    Target("cuda", "fake_quant forward", 2, "4096x11008", 0, "expression", "fraction", 0.85),
    Target("cuda", "fake_quant backward", 2, "4096x11008", 0, "copy of the weight", "fraction", 0.75),
    Target("cuda", "quantized_matmul", 2, "8192x8192", 1, "dense fp16", "ratio", 4.0),
    Target("cuda", "quantized_matmul", 2, "16384x16384", 1, "dense fp16", "ratio", 5.5),
    Target("cuda", "quantized_matmul", 3, "8192x8192", 1, "dense fp16", "ratio", 3.0),
    Target("cuda", "quantized_matmul", 4, "8192x8192", 1, "dense fp16", "ratio", 2.8),
    *(
        Target("cuda", "quantized_matmul", bits, shape, batch, "dequantize + dense", "ratio", 1.0)
        for bits in (2, 3, 4)
        for shape in ("4096x4096", "4096x11008", "8192x8192", "8192x28672", "16384x16384")
        for batch in (1, 4, 16, 128, 2048)
    ),
    Target("cpu", "fake_quant forward + backward", 2, "1536x576", 0, "expression", "ratio", 4.0),
    Target("cpu", "fake_quant forward + backward", 2, "4096x4096", 0, "expression", "ratio", 4.0),
    Target("cpu", "quantized_matmul", 4, "1536x576", 1, "dense bf16", "ratio", 1.0),
    Target("cpu", "quantized_matmul", 4, "4096x4096", 1, "dense bf16", "ratio", 1.0),
]


def main(
    shape: Annotated[list[str], typer.Option(help="OUTxIN; repeatable.")] = SHAPES,
    bits: Annotated[list[int], typer.Option(help="2, 3, 4 or 8; repeatable.")] = [2, 3, 4],  # noqa: B006
    batch: Annotated[list[int], typer.Option(help="Rows of x; repeatable.")] = BATCHES,
    group_size: int = 64,
    rounds: Annotated[int, typer.Option(help="Times that ours and the others take turns; the best counts.")] = 3,
    repeats: Annotated[int, typer.Option(help="Graph replays per turn, or least calls on a CPU.")] = 7,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Append the rows to this file.")] = None,
) -> None:
    """Print one line per operation, shape and batch."""
    torch.manual_seed(0)
    name = torch.cuda.get_device_name() if ON_GPU else f"CPU, {torch.get_num_threads()} threads"
    peaks = _peaks(rounds, repeats)
    served = dispatch.backend_for(torch.empty(0, device=DEVICE)).fake_quant.__module__.rpartition(".")[2]
    print(f"{name}, torch {torch.__version__}, groups of {group_size}, {ACTIVATIONS}, served by {served}")
    print(f"measured peaks: copy {peaks.copy / 1e9:.1f} GB/s, matrix product {peaks.matmul / 1e12:.3f} TFLOP/s")
    print(
        f"{'operation':<30}{'bits':>5}{'shape':>13}{'batch':>6}{'us':>10}{'GB/s':>8}{'TFLOP/s':>9}{'of peak':>8}",
        end="",
    )
    print(f"  {'against':<20}{'us':>10}{'ratio':>7}")
    rows: list[Row] = []
    for text in shape:
        out_features, in_features = map(int, text.split("x"))
        measured = len(rows)
        case = Case(out_features, in_features, group_size, peaks, rows, rounds, repeats)
        case.fake_quant(bits[0])
        for width in bits:
            case.linear(width, batch)
        if csv_file is not None:
            _append(csv_file, rows[measured:], name, peaks)
    _targets(rows)


class Case:
    """One shape; adds rows as it measures."""

    def __init__(
        self,
        out_features: int,
        in_features: int,
        group_size: int,
        peaks: Peaks,
        rows: list[Row],
        rounds: int,
        repeats: int,
    ) -> None:
        self.n, self.k, self.group_size, self.peaks, self.rows = out_features, in_features, group_size, peaks, rows
        self.rounds, self.repeats = rounds, repeats

    def fake_quant(self, bits: int) -> None:
        """Training: fp32 weights, and the dtype that the matrix product takes."""
        dtype = torch.bfloat16 if ON_GPU else torch.float32
        grid = self._grid(bits)
        weight = torch.randn(self.n, self.k, device=DEVICE)
        spread = weight.unflatten(1, (-1, self.group_size))
        scale = (spread.amax(-1) - spread.amin(-1)) / (2**bits - 1)
        zero = (-spread.amin(-1) / scale).round()
        inputs = [tensor.requires_grad_() for tensor in (weight, scale, zero)]
        seed = torch.randn(self.n, self.k, device=DEVICE).to(dtype)

        def ours() -> Tensor:
            return qat_kernels.fake_quant(*inputs, **grid, out_dtype=dtype)

        def theirs() -> Tensor:
            return _expression(*inputs, **grid).to(dtype)

        weights, groups = weight.numel(), scale.numel()
        forward = weights * (4 + dtype.itemsize) + groups * 8
        backward = weights * (8 + dtype.itemsize) + groups * 16
        with torch.no_grad():
            self._row("fake_quant forward", bits, 0, [ours], forward, 0, {"expression": [theirs]})
        if ON_GPU:  # a graph holds kernels only; elsewhere autograd's own work is part of the time
            backend = dispatch.backend_for(weight)
            detached = [tensor.detach() for tensor in inputs]
            alone = partial(backend.fake_quant_backward, seed, *detached, **grid)
            copied = {"copy of the weight": [weight.detach().clone]}
            self._row("fake_quant backward", bits, 0, [alone], backward, 0, copied)

        def trained(forward: Callable[[], Tensor]) -> Callable[[], object]:
            return lambda: torch.autograd.grad(forward(), inputs, seed)

        both = {"expression": [trained(theirs)]}
        self._row("fake_quant forward + backward", bits, 0, [trained(ours)], forward + backward, 0, both)

    def linear(self, bits: int, batches: list[int]) -> None:
        """A packed weight: dequantized, multiplied, differentiated."""
        grid = self._grid(bits)
        codes = torch.randint(0, 2**bits, (self.n, self.k), dtype=torch.uint8, device=DEVICE)
        packed = qat_kernels.pack(codes, bits=bits)
        groups = (self.n, self.k // self.group_size)
        scale = (torch.rand(groups, device=DEVICE) + 0.5).div(2**bits).to(torch.float16)
        zero_point = torch.randint(0, 2**bits, groups, dtype=torch.uint8, device=DEVICE)
        del codes
        weights = [(packed.clone(), scale, zero_point) for _ in range(timing.copies(DEVICE, packed.nbytes))]
        prepared = [qat_kernels.prepare(w[0], **grid, in_features=self.k) for w in weights]
        shape = {**grid, "in_features": self.k, "dtype": ACTIVATIONS}
        dense = [qat_kernels.dequantize(*weights[0], **shape)]
        dense += [dense[0].clone() for _ in range(timing.copies(DEVICE, dense[0].nbytes) - 1)]
        size = packed.nbytes + scale.nbytes + zero_point.nbytes

        copied = {"copy of the dense weight": [d.clone for d in dense]}
        calls = [partial(qat_kernels.dequantize, *w, **shape) for w in weights]
        self._row("dequantize", bits, 0, calls, size + dense[0].nbytes, 0, copied)
        for count in batches:
            self._batch(bits, count, weights, prepared, dense)
        self._gradients(bits, max(batches), weights, dense)

    def _batch(
        self,
        bits: int,
        count: int,
        weights: Sequence[tuple[Tensor, ...]],
        prepared: Sequence[Tensor | None],
        dense: list[Tensor],
    ) -> None:
        grid = self._grid(bits)
        shape = {**grid, "in_features": self.k, "dtype": ACTIVATIONS}
        x = torch.randn(count, self.k, device=DEVICE).to(ACTIVATIONS)
        size = sum(tensor.nbytes for tensor in weights[0]) + x.nbytes + count * self.n * x.itemsize
        against: dict[str, Calls] = {f"dense {_short(ACTIVATIONS)}": [partial(F.linear, x, d) for d in dense]}
        if not ON_GPU:
            against["dense bf16"] = [partial(F.linear, x.bfloat16(), dense[0].bfloat16())]

        def in_two(packed: tuple[Tensor, ...]) -> Tensor:
            return F.linear(x, qat_kernels.dequantize(*packed, **shape))

        against["dequantize + dense"] = [partial(in_two, w) for w in weights]
        calls = [
            partial(qat_kernels.quantized_matmul, x, *w, **grid, prepared=p)
            for w, p in zip(weights, prepared, strict=True)
        ]
        with torch.no_grad():
            self._row("quantized_matmul", bits, count, calls, size, 2 * count * self.n * self.k, against)

    def _gradients(self, bits: int, count: int, weights: Sequence[tuple[Tensor, ...]], dense: list[Tensor]) -> None:
        grid = self._grid(bits)
        x = torch.randn(count, self.k, device=DEVICE).to(ACTIVATIONS)
        grad_out = torch.randn(count, self.n, device=DEVICE).to(ACTIVATIONS)
        packed, scale, zero_point = weights[0]
        backend = dispatch.backend_for(x)
        flops, size = 2 * count * self.n * self.k, packed.nbytes + scale.nbytes + zero_point.nbytes
        moved = size + x.nbytes + grad_out.nbytes
        name = _short(ACTIVATIONS)
        calls = [partial(backend.input_grad, grad_out, *w, **grid, in_features=self.k) for w in weights]
        against = {f"dense {name}": [partial(torch.matmul, grad_out, d) for d in dense]}
        self._row("input_grad", bits, count, calls, moved, flops, against)
        calls = [partial(backend.scale_grad, grad_out, x, codes, zeros, **grid) for codes, _, zeros in weights]
        against = {f"weight gradient {name}": [partial(torch.matmul, grad_out.t(), x)]}
        self._row("scale_grad", bits, count, calls, moved, flops, against)

    def _grid(self, bits: int) -> dict[str, Any]:
        return {"bits": bits, "group_size": self.group_size}

    def _row(
        self, operation: str, bits: int, batch: int, ours: Calls, size: int, flops: int, against: Mapping[str, Calls]
    ) -> None:
        """Measure ours and the others in turns, so that a noisy machine disturbs all alike, and print."""
        best = dict.fromkeys(["ours", *against], float("inf"))
        for _ in range(self.rounds):
            for name, calls in {"ours": ours, **against}.items():
                best[name] = min(best[name], timing.seconds(DEVICE, calls, repeats=self.repeats))
        mine = best.pop("ours")
        bound_by_memory = batch <= MEMORY_BOUND
        fraction = size / mine / self.peaks.copy if bound_by_memory else flops / mine / self.peaks.matmul
        shape = f"{self.n}x{self.k}"
        for place, (name, other) in enumerate(best.items()):
            row = Row(
                operation, bits, shape, batch, mine * 1e6, size / mine / 1e9, flops / mine / 1e12, fraction,
                name, other * 1e6, other / mine,
            )  # fmt: skip
            self.rows.append(row)
            head = (
                f"{operation:<30}{bits:>5}{shape:>13}{batch or '':>6}{row.us:>10.1f}{row.gb_s:>8.1f}{row.tflop_s:>9.3f}"
            )
            head += f"{fraction:>8.1%}" if place == 0 else ""
            print(f"{head if place == 0 else '':<89}  {name:<20}{row.against_us:>10.1f}{row.ratio:>7.2f}", flush=True)


def _peaks(rounds: int, repeats: int) -> Peaks:
    source = torch.zeros(2**29 if ON_GPU else 2**25, dtype=torch.float16, device=DEVICE)
    target = torch.empty_like(source)
    a = torch.randn(2 * [8192 if ON_GPU else 1024], device=DEVICE).to(ACTIVATIONS)

    def best(call: Callable[[], object]) -> float:
        return min(timing.seconds(DEVICE, [call], repeats=repeats) for _ in range(rounds))

    # On a GPU a kernel copies faster than the memcpy that copy_ is.
    copies = (lambda: target.copy_(source)), (lambda: torch.mul(source, 1, out=target))
    copy = 2 * source.nbytes / min(map(best, copies))
    matmul = 2 * a.shape[0] ** 3 / best(lambda: a @ a)
    return Peaks(copy, matmul)


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


def _targets(rows: list[Row]) -> None:
    """Print every target of this device that was measured."""
    print("targets")
    for target in TARGETS:
        place = (target.operation, target.bits, target.shape, target.batch, target.against)
        for row in rows:
            if target.device == DEVICE.type and place == (row.operation, row.bits, row.shape, row.batch, row.against):
                value = getattr(row, target.field)
                what = f"{row.operation}, {row.bits} bits, {row.shape}, batch {row.batch}, {target.field}"
                what += f" against {row.against}" if target.field == "ratio" else " of the copy bandwidth"
                print(f"  {'met' if value >= target.least else 'MISSED':<7}{value:>6.2f} >= {target.least:<5} {what}")


def _append(path: Path, rows: list[Row], device: str, peaks: Peaks) -> None:
    """Add the rows to a CSV file, with what they were measured on."""
    head = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "device": device,
        "torch": torch.__version__,
        "copy_gb_s": round(peaks.copy / 1e9, 1),
        "matmul_tflop_s": round(peaks.matmul / 1e12, 3),
    }
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*head, *Row.__dataclass_fields__])
        if new:
            writer.writeheader()
        for row in rows:
            values = {key: round(value, 4) if isinstance(value, float) else value for key, value in asdict(row).items()}
            writer.writerow(head | values)


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except FileNotFoundError:  # no git here
        return "unknown"
    return done.stdout.strip() or "unknown"


def _short(dtype: torch.dtype) -> str:
    return {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]


if __name__ == "__main__":
    typer.run(main)
