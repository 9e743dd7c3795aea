"""A run directory as the stages leave it, made of small files: 4 blocks, two sessions of block-ap, one export."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from qatcli.directory import locked

LINEARS = ("self_attn.q_proj", "mlp.down_proj")
RECIPE: dict[str, Any] = {
    "method": "qat",
    "model": {"source": "owner/model", "revision": None},
    "quant": {"bits": 2, "group_size": 64, "zero_points": "central", "init": "weighted", "overrides": []},
    "calibrate": {"data": [{"source": "owner/text"}], "samples": 8, "seq_len": 64, "seed": 2},
    "block_ap": {"epochs": 2, "batch_size": 4, "lr_units": "reach", "lr_weights": 1.0, "lr_scales": 1.0},
    "e2e_qp": {"samples": 8, "seq_len": 64, "epochs": 1, "batch_size": 4, "lr_units": "reach", "text_weight": 0.5},
    "expect": {"wiki": {"value": 20.0, "tolerance": 0.5}},
}
FACTS: dict[str, Any] = {
    "format_version": 1,
    "kind": "any",
    "recipe": RECIPE,
    "recipe_digest": "ab" * 32,
    "digest": "cd" * 32,
    "input": "runs/x/before",
    "device": "cpu",
    "machine": "NVIDIA A100-SXM4-80GB, x86_64 Linux",
    "versions": {"torch": "2.13.0", "triton": None},
    "files": {"a": "0"},
}
METRICS: dict[str, Any] = {
    "models": {
        "full_precision": {"perplexity": {"wiki": 15.0}, "divergence": {}, "samples": [" Paris."]},
        "round_to_nearest": {
            "perplexity": {"wiki": 912345.6},
            "divergence": {"wiki": {"mean_kl": 8.0, "kl_99": 12.0, "top1_agreement": 0.1}},
        },
        "quantized": {
            "perplexity": {"wiki": 20.25},
            "divergence": {"wiki": {"mean_kl": 0.31, "kl_stderr": 0.0125, "kl_99": 2.0, "top1_agreement": 0.71}},
            "zero_shot": {
                "tasks": {"piqa": {"metric": "acc", "value": 0.62, "stderr": 0.011}},
                "average": {"value": 0.62, "stderr": 0.011},
            },
            "size": {"file_bytes": 7340032, "bits_per_weight": 2.28, "bits_per_parameter": 4.9},
            "speed": {
                "prefill": 512.0,
                "decode": 31.0,
                "weight_bytes": 3145728,
                "dtype": "bfloat16",
                "peak": {"host_bytes": 5242880},
            },
            "samples": [" London."],
        },
    },
    "size": {"bits_per_weight": 2.28, "bits_per_parameter": 4.9, "bytes": {"codes": 2**20, "other": 2**20}},
    "protocol": {"wiki": {"source": "wiki.test.raw", "context": 64, "windows": 8}},
    "prompts": ["The capital of France is"],
}


def _write(directory: Path, events: list[dict[str, Any]], facts: dict[str, Any] | None = None) -> None:
    directory.mkdir(parents=True)
    (directory / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    if facts is not None:
        (directory / "stage.json").write_text(json.dumps({**copy.deepcopy(FACTS), **facts}), encoding="utf-8")


@pytest.fixture
def make_run(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """A function that writes a run: (metrics of eval or None, blocks done of 4, whether the other blocks are at work).

    One that is not at work has the lock of a process that was killed.
    """
    locks = ExitStack()

    def make(metrics: dict[str, Any] | None = METRICS, *, blocks: int = 4, at_work: bool = False) -> Path:
        run = tmp_path / "runs" / "model" / "w2g64"
        errors = [{f"model.layers.{i}.{name}": 0.01 * (i + j + 1) for j, name in enumerate(LINEARS)} for i in range(4)]
        events = [{"time": 100.0, "event": "start", "stage": "calibrate", "recipe": RECIPE}]
        events += [{"time": 101.0 + i, "event": "block", "index": i, "relative_error": errors[i]} for i in range(4)]
        _write(run / "calibrate", events, {"stage": "calibrate", "seconds": 5.0, "peak_memory": {"host_bytes": 2**30}})

        start = {"event": "start", "stage": "block-ap", "recipe": RECIPE}
        events = [{"time": 110.0, **start}]
        for i in range(blocks):
            if i == 2:  # killed an hour ago, continued: that block was worked on twice
                events += [{"time": 3730.0, **start}]
            at = (120.0 if i < 2 else 3730.0) + 10 * i
            progress = {"title": "block-ap", "count": i, "total": 4, "left": 30.0, "host_bytes": 2**29 + i}
            losses = {"before": 0.4 + i, "after": 0.2 + i, "validation": [0.3 + i, 0.2 + i], "seconds": 9.0 + i}
            trained = {"relative_error": {name: 2 * error for name, error in errors[i].items()}}
            events += [{"time": at, "event": "progress", **progress}]
            events += [{"time": at, "event": "block", "index": i, "backoffs": 0, **losses, **trained}]
        if blocks < 4:
            _write(run / "block-ap.partial", events)
            (run / "block-ap.lock").write_text("process 1 on elsewhere")
            if at_work:
                locks.enter_context(locked(run / "block-ap"))
            return run
        _write(run / "block-ap", events, {"stage": "block-ap", "seconds": 50.0, "peak_memory": {"host_bytes": 2**31}})

        events = [{"time": 4000.0, "event": "start"}, {"time": 4001.0, "event": "validation", "step": 0, "loss": 1.0}]
        for step, loss in ((1, 0.9), (2, 0.8), (2, 0.7), (3, float("nan"))):  # update 2 was made again
            events += [{"time": 4001.0 + step, "event": "step", "step": step, "loss": loss}]
        events += [{"time": 4005.0, "event": "validation", "step": 3, "loss": 0.6}]
        after = {"before": 1.0, "after": 0.6, "loss": "kl", "steps": 3}
        _write(run / "e2e-qp", events, {"stage": "e2e-qp", "seconds": 5.0, "metrics": after})
        _write(run / "pack", [{"time": 4006.0, "event": "start"}], {"stage": "pack", "seconds": 1.0})
        if metrics is not None:
            events = [{"time": 4010.0, "event": "start", "recipe": RECIPE}]
            _write(run / "eval", events, {"stage": "eval", "seconds": 20.0, "metrics": metrics})
            found = {"modules": 8, "verifier": "independent reader", "notes": [], "passed": True}
            exported = {"format": "gptq", "bytes": 2**21, "verified": True, "verification": found}
            events = [{"time": 4030.0, "event": "start", "recipe": RECIPE}]
            _write(run / "export" / "gptq", events, {"stage": "export", "seconds": 2.0, "metrics": exported})
        return run

    with locks:
        yield make


@pytest.fixture
def metrics() -> dict[str, Any]:
    """The evaluation of that run, to be changed at will."""
    return copy.deepcopy(METRICS)
