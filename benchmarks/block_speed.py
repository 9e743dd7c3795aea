"""How fast one block trains, beside EfficientQAT's published modules and loop, and what the full recipe would take.

    python benchmarks/block_speed.py --model SmolLM2-135M-Instruct.Q4_1.gguf    # on a CPU: block 0, 512-token windows
    python benchmarks/block_speed.py                                            # on a GPU: a Llama-2-7B-shaped block
    python benchmarks/block_speed.py --shape 64x192x4 --windows 4 --seq-len 32 --full     # rehearse that on a CPU

The comparison (default on a CPU) takes turns step by step on the same windows: the loop of `qatcli.blocktrain`; the
published one, re-expressed here, under bf16 autocast (fp16 on a GPU, as published) and in fp32; and the step's matrix
products alone, which nothing can beat without other arithmetic. Medians of wall-clock and of CPU seconds: on a shared
machine the latter are steadier. `--full` (default on a GPU) runs whole epochs and prints tokens per second, model FLOP
utilisation, peak memory and the extrapolated hours of the paper's budget, which took 3.3 h (Block-AP) and 1.5 h
(E2E-QP) on an A100-80GB (arXiv 2407.11062, Table 8). The next block is not looked at (`block_ap.lookahead`).
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from qatcli.activations import advance_stream, fill_streams
from qatcli.attention import NAME as TILED_ATTENTION
from qatcli.blocktrain import Objective, Windows, build_student, export_students, output_error, train_block
from qatcli.grid import initial_grid
from qatcli.linear import PackedLinear, replace_modules
from qatcli.models.blocks import open_blocks, run_block
from qatcli.models.source import open_source
from qatcli.packed import ModuleQuant, module_quant, pack_linear
from qatcli.recipe import BlockApSection
from qatcli.training import compute_dtype

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
PAPER_WINDOWS, PAPER_BLOCKS, PAPER_E2E_TOKENS = 4096, 32, 4096
PEAK_TFLOPS = {"A100": 312.0, "H100": 989.0, "H200": 989.0}  # dense bf16, from the vendor's data sheets (SXM)
PREFIX = "block"


@dataclass
class Setting:
    """One full-precision block and what it learns from: inputs and targets [S, T, H], in the compute dtype."""

    block: nn.Module
    arguments: dict[str, Any]
    windows: Windows
    bits: int
    group_size: int
    batch: int

    def student(self) -> tuple[nn.Module, dict[str, Any]]:
        """A copy whose linears train through fake quantization, and these linears."""
        block = copy.deepcopy(self.block)
        if not ON_GPU:
            attention: Any = block.get_submodule("self_attn")
            attention.config._attn_implementation = TILED_ATTENTION  # as `use_tiled_attention` for a whole model
        quants, grids = {}, {}
        for name, linear in _linears(block).items():
            full = f"{PREFIX}.{name}"
            quants[full] = ModuleQuant(self.bits, self.group_size, linear.in_features, linear.out_features)
            grids[full] = initial_grid(
                linear.weight.detach(),
                bits=self.bits,
                group_size=self.group_size,
                zero_points="any",
                method="minmax",
            )
        return block, build_student(block, PREFIX, quants, grids, zero_points="any", hessians=None)

    @property
    def grid(self) -> dict[str, int]:
        """bits and group_size."""
        return {"bits": self.bits, "group_size": self.group_size}

    def rows(self, step: int) -> slice:
        """The windows of a step."""
        return slice(step * self.batch, (step + 1) * self.batch)


@dataclass
class Clock:
    """Seconds of the steps of one contestant."""

    name: str
    step: Callable[[int], object]
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def run(self, index: int) -> None:
        """Time one step."""
        started = _now()
        self.step(index)
        self.add(started)

    def add(self, started: tuple[float, float]) -> None:
        """The step that began at `started` ends now."""
        wall, cpu = _now()
        self.wall.append(wall - started[0])
        self.cpu.append(cpu - started[1])


class ReferenceLinear(nn.Module):
    """Fake quantization as EfficientQAT publishes it: written out under autograd with straight-through estimators."""

    def __init__(self, linear: nn.Linear, *, bits: int, group_size: int) -> None:
        super().__init__()
        self.weight, self.bits, self.group_size = nn.Parameter(linear.weight.detach().clone()), bits, group_size
        scale, zero_point = initial_grid(
            self.weight.detach(), bits=bits, group_size=group_size, zero_points="any", method="minmax"
        )
        self.scale, self.zero_point = nn.Parameter(scale.float()), nn.Parameter(zero_point.float())

    def forward(self, x: Tensor) -> Tensor:
        def straight(value: Tensor, changed: Tensor) -> Tensor:
            return (changed - value).detach() + value

        qmax = 2**self.bits - 1
        scale, zero = self.scale[..., None], self.zero_point[..., None]
        scale = straight(scale, scale.clamp(1e-4, 1e4))
        zero = straight(zero, zero.round())
        zero = straight(zero, zero.clamp(0, qmax))
        ratio = self.weight.unflatten(1, (-1, self.group_size)) / scale
        codes = (straight(ratio, ratio.round()) + zero).clamp(0, qmax)
        return F.linear(x, ((codes - zero) * scale).flatten(1))


class ReferenceLoop:
    """Its loop: autocast, plain MSE, a check of the loss and a gradient norm on the host at every step, plain AdamW."""

    def __init__(self, setting: Setting, dtype: torch.dtype, steps: int) -> None:
        self.setting, self.dtype = setting, dtype
        self.block = copy.deepcopy(setting.block).float()
        names = list(_linears(self.block))
        replace_modules(self.block, names, lambda _, linear: ReferenceLinear(linear, **setting.grid))
        grids = [p for name, p in self.block.named_parameters() if name.endswith(("scale", "zero_point"))]
        weights = [p for name, p in self.block.named_parameters() if name.endswith("weight")]
        self.optimizer = torch.optim.AdamW(
            [{"params": grids, "lr": 1e-4}, {"params": weights, "lr": 2e-5}], weight_decay=0.0
        )
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)
        self.scaler = torch.amp.GradScaler(DEVICE.type, enabled=dtype == torch.float16)

    def step(self, index: int) -> None:
        """Train on the windows of one step."""
        windows, rows = self.setting.windows, self.setting.rows(index)
        inputs, targets = windows.inputs[rows].to(DEVICE), windows.targets[rows].to(DEVICE)
        autocast = nullcontext() if self.dtype == torch.float32 else torch.autocast(DEVICE.type, self.dtype)
        with autocast:
            loss = F.mse_loss(
                run_block(self.block, inputs.to(self.dtype), self.setting.arguments).float(), targets.float()
            )
        if not math.isfinite(loss.item()):
            raise FloatingPointError("the reference's loss is not finite")
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        norms = [p.grad.norm() for p in self.block.parameters() if p.grad is not None]
        float(torch.stack(norms).norm())
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()


def main(
    model: Annotated[Path | None, typer.Option(help="A checkpoint to take the block and its inputs from.")] = None,
    block: Annotated[int, typer.Option(help="Which block of it.")] = 0,
    shape: Annotated[str, typer.Option(help="Without --model: HIDDENxINTERMEDIATExHEADS of a random one.")] = (
        "4096x11008x32"
    ),
    windows: Annotated[int, typer.Option(help="Windows.")] = 128 if ON_GPU else 24,
    seq_len: Annotated[int, typer.Option(help="Tokens per window.")] = 2048 if ON_GPU else 512,
    batch: Annotated[int, typer.Option(help="Windows per step.")] = 2 if ON_GPU else 4,
    bits: int = 2,
    group_size: int = 64,
    full: Annotated[bool, typer.Option("--full/--compare", help="Whole epochs, or turns with the reference.")] = ON_GPU,
    peak_tflops: Annotated[float | None, typer.Option(help="Of the device, for the FLOP utilisation.")] = None,
) -> None:
    """Print what was measured."""
    torch.manual_seed(0)
    name = torch.cuda.get_device_name() if ON_GPU else f"cpu, {torch.get_num_threads()} threads"
    dtype = compute_dtype("auto", DEVICE)
    print(
        f"torch {torch.__version__}, {name}; {bits} bits, groups of {group_size}, batches of {batch} x {seq_len} tokens"
    )
    made = _from_model(model, block, windows, seq_len, dtype) if model else _random(shape, windows, seq_len, dtype)
    setting = Setting(*made, bits=bits, group_size=group_size, batch=batch)
    if full:
        known = [peak for card, peak in PEAK_TFLOPS.items() if card in name]
        _full(setting, peak_tflops or (known[0] if known else None))
    else:
        _compare(setting)


def _compare(setting: Setting) -> None:
    """Take turns, one step each, from the callback at the end of our loop's steps."""
    steps = len(setting.windows.inputs) // setting.batch
    half = torch.float16 if ON_GPU else torch.bfloat16
    others = [
        Clock(f"published loop, {str(dtype).removeprefix('torch.')}", ReferenceLoop(setting, dtype, steps).step)
        for dtype in (half, torch.float32)
    ]
    others.append(Clock("matrix products alone", _products(setting)))
    ours = Clock(f"qat, {str(setting.windows.inputs.dtype).removeprefix('torch.')}", lambda _: None)
    resumed = _now()
    done = 0

    def turn(*_: object, **__: object) -> None:
        nonlocal resumed, done
        ours.add(resumed)
        for other in others:
            other.run(done)
        done += 1
        resumed = _now()

    _train(setting, epochs=1, progress=turn)
    print(f"{steps} steps each, the first left out; medians")
    print(f"{'':<28}{'s/step':>9}{'CPU s/step':>12}{'to qat':>8}{'in CPU s':>10}{'s per block':>13}")
    mine = [statistics.median(seconds[1:]) for seconds in (ours.wall, ours.cpu)]
    for clock in (ours, *others):
        wall, cpu = (statistics.median(seconds[1:]) for seconds in (clock.wall, clock.cpu))
        block = 2 * 256 / setting.batch * wall
        print(f"{clock.name:<28}{wall:>9.3f}{cpu:>12.3f}{wall / mine[0]:>8.2f}{cpu / mine[1]:>10.2f}{block:>13.1f}")
    print(f"s per block: 256 windows, 2 epochs, {2 * 256 // setting.batch} steps")


def _full(setting: Setting, peak_tflops: float | None) -> None:
    """Whole epochs as block-ap runs them, its two sweeps, and the packed block as e2e-qp runs it."""
    count, tokens, hidden = setting.windows.inputs.shape
    weights = sum(linear.weight.numel() for linear in _linears(setting.block).values())
    warm = Setting(**{**vars(setting), "windows": Windows(*(t[: 2 * setting.batch] for t in setting.windows.streams))})
    _train(warm, epochs=1)
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    block, students, seconds = _train(setting, epochs=2)
    seen = 2 * count * tokens
    work = (6 * weights + 6 * tokens * hidden) * seen  # attention's products are causal: half of 12 T H
    print(
        f"block-ap: {seen / seconds:,.0f} tokens/s, {seconds * setting.batch * tokens / seen:.4f} s a step of training"
    )
    rate = work / seconds / 1e12
    share = f", {rate / peak_tflops:.1%} of {peak_tflops:g}" if peak_tflops else ""
    print(f"model FLOP rate {rate:.3g} TFLOP/s{share}")
    if ON_GPU:
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB, the windows' streams included")
    stream = setting.windows.inputs.clone()
    sweep = _timed(lambda: advance_stream(stream, block, setting.arguments, batch_size=setting.batch, device=DEVICE))
    hours = PAPER_BLOCKS * PAPER_WINDOWS / count * (seconds + 2 * sweep) / 3600
    print(
        f"the paper's Block-AP budget ({PAPER_WINDOWS} windows, {PAPER_BLOCKS} blocks, 2 epochs, two sweeps): "
        f"{hours:.2f} h extrapolated; published 3.3 h on an A100"
    )

    quantized = {name.removeprefix(PREFIX + "."): linear for name, linear in export_students(students).items()}

    def packed(name: str, _: nn.Module) -> nn.Module:
        linear = quantized[name]
        module = PackedLinear(module_quant(linear), bias=False, scale_dtype=torch.float32, dtype=torch.float32)
        tensors = pack_linear("x", linear).items()
        module.load_state_dict({key.removeprefix("x."): tensor for key, tensor in tensors})
        module.to(DEVICE).weight_scale.requires_grad_(True)
        return module

    replace_modules(block, list(quantized), packed)
    window = setting.windows.inputs[:1].to(DEVICE).requires_grad_()
    passes = [_timed(lambda: _packed_pass(block, window, setting.arguments)) for _ in range(4)]
    each = statistics.median(passes[1:])
    print(f"e2e-qp: {each:.4f} s for a window of {tokens} tokens through the packed block, recomputed")
    hours = PAPER_BLOCKS * PAPER_WINDOWS * PAPER_E2E_TOKENS / tokens * each / 3600
    print(
        f"the paper's E2E-QP budget ({PAPER_WINDOWS} windows of {PAPER_E2E_TOKENS}, blocks alone, attention as at "
        f"{tokens}): {hours:.2f} h extrapolated; published 1.5 h on an A100"
    )


def _train(
    setting: Setting, *, epochs: int, progress: Callable[..., None] = lambda *_, **__: None
) -> tuple[nn.Module, dict[str, Any], float]:
    """Train a fresh student with the real loop: the block, its linears, seconds."""
    block, students = setting.student()
    held_out = Windows(setting.windows.inputs[:1], setting.windows.targets[:1])
    config = BlockApSection(epochs=epochs, batch_size=setting.batch, shuffle=False)
    readers = torch.ones(5 * PAPER_BLOCKS + 1, held_out.inputs.shape[-1], device=DEVICE)  # a whole model's linears
    objective = Objective(block, setting.arguments, [output_error(config.loss, readers)])

    def train() -> None:
        train_block(
            objective,
            students,
            setting.windows,
            held_out,
            config,
            zero_points="any",
            generator=torch.Generator(),
            device=DEVICE,
            progress=progress,
        )

    return block, students, _timed(train)


def _packed_pass(block: nn.Module, window: Tensor, arguments: dict[str, Any]) -> None:
    with torch.autocast(DEVICE.type, window.dtype, enabled=window.dtype != torch.float32):
        output = checkpoint(run_block, block, window, arguments, use_reentrant=False)
    output.float().square().mean().backward()


def _products(setting: Setting) -> Callable[[int], None]:
    """The matrix products of a step in the compute dtype: output, input gradient and weight gradient of each linear."""
    dtype, tokens = setting.windows.inputs.dtype, setting.batch * setting.windows.inputs.shape[1]
    operands = []
    for linear in _linears(setting.block).values():
        rows = (
            torch.randn(tokens, size, device=DEVICE, dtype=dtype) for size in (linear.in_features, linear.out_features)
        )
        operands.append((linear.weight.detach().to(dtype), *rows))

    def run(_: int) -> None:
        for weight, x, grad in operands:
            F.linear(x, weight)
            grad @ weight
            grad.T @ x

    return run


def _from_model(
    path: Path, index: int, windows: int, seq_len: int, dtype: torch.dtype
) -> tuple[nn.Module, dict[str, Any], Windows]:
    """Block `index` of a checkpoint with what reaches it, and what it makes of that, for windows of random tokens."""
    model = open_blocks(open_source(str(path)))
    config = model.source.config().get_text_config()
    arguments = model.block_arguments(seq_len, DEVICE, torch.float32)
    stream = torch.empty(windows, seq_len, config.hidden_size, dtype=dtype, device=DEVICE)
    fill_streams([stream], model, torch.randint(0, config.vocab_size, (windows, seq_len)), DEVICE, dtype)
    for earlier in range(index):
        block = model.load_block(earlier, DEVICE, torch.float32)
        advance_stream(stream, block, arguments[earlier], batch_size=4, device=DEVICE)
    block = model.load_block(index, DEVICE, torch.float32)
    return block, arguments[index], _with_targets(block, arguments[index], stream)


def _random(shape: str, windows: int, seq_len: int, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Any], Windows]:
    """A Llama block of random weights on random inputs."""
    hidden, intermediate, heads = map(int, shape.split("x"))
    config = LlamaConfig(hidden_size=hidden, intermediate_size=intermediate, num_attention_heads=heads)
    config._attn_implementation = "sdpa"
    block = LlamaDecoderLayer(config, 0).to(DEVICE).eval()
    position_ids = torch.arange(seq_len, device=DEVICE)[None]
    rotary = LlamaRotaryEmbedding(config).to(DEVICE)
    stream = torch.randn(windows, seq_len, hidden, dtype=dtype, device=DEVICE)
    arguments = {
        "position_embeddings": rotary(stream[:1].float(), position_ids),
        "position_ids": position_ids,
        "attention_mask": None,
    }
    return block, arguments, _with_targets(block, arguments, stream)


def _with_targets(block: nn.Module, arguments: dict[str, Any], inputs: Tensor) -> Windows:
    targets = inputs.clone()
    advance_stream(targets, block, arguments, batch_size=2, device=DEVICE)
    return Windows(inputs, targets)


def _linears(block: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


def _now() -> tuple[float, float]:
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def _timed(function: Callable[[], object]) -> float:
    started = _now()[0]
    function()
    return _now()[0] - started


if __name__ == "__main__":
    typer.run(main)
