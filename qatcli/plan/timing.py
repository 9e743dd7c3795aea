"""How long the stages take, roughly: operations over the rate at which this machine multiplies matrices.

The rate is measured for a moment, in the dtype that the stages compute in. What is not matrix products (searches,
optimizers, loading) counts by the memory it moves. A figure for choosing a budget, never a promise.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from qatcli.evaluation.perplexity import divergence_windows
from qatcli.plan.model import PlannedModel
from qatcli.plan.needs import FP32, Setting
from qatcli.recipe.schema import PerplexityText

MATMUL = {"cpu": 1024, "cuda": 8192}  # side of the matrices that are timed
SEARCH_PASSES = 800  # over a weight in fp32, by the grid search: 105 candidates of seven to eight passes each
QUESTIONS = {  # rows, and tokens that are read for one: the context once, every choice
    "winogrande": (1267, 50),
    "piqa": (1838, 60),
    "hellaswag": (10042, 170),
    "arc_easy": (2376, 60),
    "arc_challenge": (1172, 70),
}
WIKITEXT2 = 1_290_000  # bytes of its test split
STEP_PASSES = 30  # over a block's parameters, by fake quantization both ways, gradients and Adam


@dataclass(frozen=True)
class Rates:
    """Floating-point operations, and bytes, per second."""

    operations: float
    bytes: float


@dataclass(frozen=True)
class Work:
    """Floating-point operations, and bytes moved besides."""

    operations: float
    bytes: float = 0.0

    def seconds(self, rates: Rates) -> float:
        """On a machine with these rates."""
        return self.operations / rates.operations + self.bytes / rates.bytes


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Time a product of matrices and a copy on the device, the best of three."""
    side = MATMUL[device.type]
    a = torch.ones(side, side, dtype=dtype, device=device)
    source = torch.ones(2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product = min(_timed(lambda: a @ a, device) for _ in range(3))
    copy = min(_timed(lambda: target.copy_(source), device) for _ in range(3))
    return Rates(2 * side**3 / product, 2 * source.numel() / copy)


def work(s: Setting) -> dict[str, Work]:
    """What each stage of the chain has to compute."""
    recipe, model = s.recipe, s.model
    calibrate, block, end = recipe.calibrate, recipe.block_ap, recipe.e2e_qp
    inside = sum(model.block_sizes)
    search = SEARCH_PASSES * FP32 * inside
    moments = min(calibrate.moment_samples, calibrate.samples)
    train, held_out = calibrate.samples, calibrate.validation_samples
    step, check = (5, 2) if s.looks_ahead else (3, 1)  # forward and both gradients; of a next block no weights'
    sweeps = 2 * (train + held_out) + step * block.epochs * train + check * (block.epochs + 1) * held_out
    blocks = _forward(model, inside, sweeps, calibrate.seq_len)
    if block.rounding == "gptq":
        blocks += _forward(model, inside, moments, calibrate.seq_len)
        squares = sum(q.in_features**2 for q in model.linears.values())
        blocks += 2.0 * moments * calibrate.seq_len * squares
    steps = block.epochs * -(-train // block.batch_size)
    backward = 3 if end.gradient_checkpointing else 2
    checks = 1 + end.epochs * end.samples // (end.batch_size * end.checkpoint_every)
    windows = end.epochs * end.samples * (1 + backward) + end.validation_samples * checks
    windows += (end.samples * (end.epochs > 0) + end.validation_samples) * s.has_teacher
    return {
        "calibrate": Work(_forward(model, inside, moments, calibrate.seq_len), search),
        "block-ap": Work(blocks, (search if block.rounding == "gptq" else 0) + STEP_PASSES * FP32 * steps * inside),
        "e2e-qp": Work(_forward(model, model.total, windows, end.seq_len)),
        "pack": Work(0, 4 * FP32 * model.total),
        "eval": _evaluation(s),
    }


def _windows(text: PerplexityText) -> int:
    """About how many windows the whole of a text has, at four bytes for a token; c4 has 256 by its protocol."""
    if text.source == "c4":
        return 256
    file = text.file or text.source
    size = Path(file).stat().st_size if Path(file).is_file() else WIKITEXT2
    return max(1, size // 4 // text.seq_len)


def _evaluation(s: Setting) -> Work:
    """Passes over texts, twice more where divergence is measured, over questions and prompts; one token at a time, as
    in generation, what a pass takes is to read the weights. Tasks other than the paper's five are not counted."""
    config, model = s.recipe.eval, s.model
    tokens, generated = 0, 0
    for text in config.perplexity:
        windows = text.windows or _windows(text)
        compared = min(windows, divergence_windows(text.seq_len)) if config.kl else 0
        tokens += text.seq_len * (windows + 2 * compared)
    if config.zero_shot is not None:
        for rows, length in (QUESTIONS[task] for task in config.zero_shot.tasks if task in QUESTIONS):
            tokens += min(rows, config.zero_shot.limit or rows) * length
    if config.speed is not None:
        tokens += config.speed.prompt_tokens * (config.speed.repeats + 1)
        generated += config.speed.new_tokens * config.speed.repeats
    models = len(config.baselines) + 1
    everywhere = FP32 if s.on_cpu else model.dtype.itemsize  # bytes of a weight as it is read
    sampled = 2 * len(config.prompts) * config.max_new_tokens  # by full precision and the result
    return Work(2.0 * tokens * model.total * models, float(everywhere * model.total * (generated * models + sampled)))


def _forward(model: PlannedModel, parameters: int, windows: int, seq_len: int) -> float:
    """Operations of passes through linears and causal attention."""
    attention = 2.0 * len(model) * seq_len * model.hidden
    return windows * seq_len * (2.0 * parameters + attention)


def _timed(run: object, device: torch.device) -> float:
    assert callable(run)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
