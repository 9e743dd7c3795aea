"""eval: perplexity, divergence from full precision, size and text samples of a result and of its baselines.

Reads:  any packed checkpoint (packed, quantized or calibration) and the full-precision model.
Writes: metrics (eval.json). Every figure carries its protocol: text, context length, number of windows.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from qatcli.data import c4_windows, evaluation_windows, text_tokens
from qatcli.directory import write_json
from qatcli.evaluation.candidates import Candidate, full_precision, packed, round_to_nearest
from qatcli.evaluation.perplexity import divergence, perplexity
from qatcli.models.source import ModelSource, open_source
from qatcli.packed import PackedCheckpoint
from qatcli.recipe.schema import EvalSection, PerplexityText
from qatcli.sizes import bits_per_weight
from qatcli.stages import Job
from qatcli.training import compute_dtype

BATCH_TOKENS = 4096  # tokens per forward pass


def run(job: Job) -> dict[str, Any]:
    """Measure every candidate on every text."""
    recipe, config = job.recipe, job.recipe.eval
    source = open_source(**recipe.model.model_dump())
    tokenizer = source.tokenizer()
    texts = {text.name: _windows(text, tokenizer) for text in config.perplexity}
    candidates = _candidates(job, source)
    dtype = compute_dtype("auto", job.device)
    reference = source.load_model("auto", job.device) if config.kl and texts else None
    results: dict[str, dict[str, Any]] = {}
    total = len(candidates) * sum(len(windows) for windows in texts.values())
    with job.log.progress("eval", total) as bar:
        for candidate in candidates:
            model = reference if candidate.name == "full_precision" and reference is not None else candidate.load()
            started = time.monotonic()
            result: dict[str, Any] = {"perplexity": {}, "divergence": {}}
            for name, windows in texts.items():
                result["perplexity"][name] = perplexity(
                    model,
                    windows,
                    batch_size=max(1, BATCH_TOKENS // windows.shape[1]),
                    device=job.device,
                    dtype=dtype,
                    progress=lambda count, at=candidate.name: bar.advance(count, detail=at),  # type: ignore[misc]
                )
                if reference is not None and model is not reference:
                    result["divergence"][name] = asdict(
                        divergence(model, reference, windows, device=job.device, dtype=dtype)
                    )
            if candidate.name in ("full_precision", "quantized"):
                result["samples"] = [
                    _continue(model, tokenizer, prompt, config, job.device) for prompt in config.prompts
                ]
            result["seconds"] = round(time.monotonic() - started, 2)
            results[candidate.name] = result
            job.log.event("measured", model=candidate.name, perplexity=result["perplexity"])
    metrics = {
        "models": results,
        "size": bits_per_weight(PackedCheckpoint.open(job.input.path)),
        "protocol": {text.name: _protocol(text, texts[text.name], dtype) for text in config.perplexity},
        "prompts": list(config.prompts),
    }
    write_json(job.out / "eval.json", metrics)
    return metrics


def _candidates(job: Job, source: ModelSource) -> list[Candidate]:
    recipe, found = job.recipe, []
    trust = recipe.model.trust_remote_code
    if "full_precision" in recipe.eval.baselines:
        found.append(full_precision(source, job.device))
    if "round_to_nearest" in recipe.eval.baselines:
        found.append(round_to_nearest(source, recipe.quant, job.device))
    block_ap = job.run_dir / "block-ap"
    if "block_ap" in recipe.eval.baselines and block_ap.is_dir():
        found.append(packed("block_ap", block_ap, job.device, trust_remote_code=trust))
    return [*found, packed("quantized", job.input.path, job.device, trust_remote_code=trust)]


def _windows(text: PerplexityText, tokenizer: Any) -> Tensor:
    if text.source == "c4":
        return torch.as_tensor(c4_windows(tokenizer, text.seq_len))[: text.windows]
    return torch.as_tensor(evaluation_windows(text_tokens(text.source, tokenizer), text.seq_len, text.windows))


def _protocol(text: PerplexityText, windows: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    compute = str(dtype).removeprefix("torch.")
    return {"source": text.source, "context": windows.shape[1], "windows": len(windows), "compute": compute}


@torch.no_grad()
def _continue(model: Any, tokenizer: Any, prompt: str, config: EvalSection, device: torch.device) -> str:
    """Greedy continuation of a prompt."""
    inputs = tokenizer(prompt, return_tensors="pt").to(device)
    output = model.generate(
        **inputs,
        max_new_tokens=config.max_new_tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=tokenizer.eos_token_id,
    )
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
