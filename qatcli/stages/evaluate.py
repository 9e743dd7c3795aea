"""eval: perplexity, divergence from full precision, zero-shot accuracy, speed, size and text samples.

Reads:  any packed checkpoint (packed, quantized or calibration) and the full-precision model.
Writes: metrics (eval.json), of the result and of the recipe's baselines. Every figure carries its protocol.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from qatcli.activations import stream_budget
from qatcli.directory import BASELINE, open_stage, write_json
from qatcli.evaluation.candidates import Candidate, full_precision, packed, round_to_nearest
from qatcli.evaluation.measure import measure
from qatcli.models.source import ModelSource
from qatcli.packed import PackedCheckpoint
from qatcli.sizes import packed_size
from qatcli.stages import Job, open_model

SAMPLED = ("full_precision", "quantized")
MADE_BY_STAGES = {"calibrate": "calibrate", "gptq": BASELINE, "block_ap": "block-ap"}
"""Baseline -> where the run directory has it, if it was made."""


def run(job: Job) -> dict[str, Any]:
    """Measure the result and its baselines."""
    config = job.recipe.eval
    source = open_model(job)
    budget = partial(stream_budget, job.device, job.recipe.block_ap.cache, job.out)
    reference = full_precision(source, job.device, keep=True, budget=budget)
    baselines = [reference] if "full_precision" in config.baselines else []
    metrics = measure(
        [*baselines, *_others(job, source)],
        config,
        reference=reference if config.kl else None,
        sampled=lambda name: name in SAMPLED,
        device=job.device,
        log=job.log,
    )
    metrics["size"] = packed_size(PackedCheckpoint.open(job.input.path))
    write_json(job.out / "eval.json", metrics)
    return metrics


def _others(job: Job, source: ModelSource) -> list[Candidate]:
    recipe, found = job.recipe, []
    trust = recipe.model.trust_remote_code
    if "round_to_nearest" in recipe.eval.baselines:
        found.append(round_to_nearest(source, recipe.quant, job.device))
    for name, stage in MADE_BY_STAGES.items():
        path = job.run_dir / stage
        if name in recipe.eval.baselines and path.is_dir():
            made = open_stage(path).path  # which compares digests
            found.append(packed(name, made, job.device, tokenizer=source.tokenizer, trust_remote_code=trust))
    path = job.input.path
    return [*found, packed("quantized", path, job.device, tokenizer=source.tokenizer, trust_remote_code=trust)]
