"""calibrate with a mean of bits: what it chooses is in its checkpoint, and block-ap trains it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from qatcli.packed import PackedCheckpoint
from qatcli.stages import Job

MIXED = {"bits": 3, "average_bits": 3.0, "overrides": [{"pattern": "*.layers.0.mlp.down_proj", "bits": 8}]}
Stages = Callable[..., tuple[Job, dict[str, Any]]]


def test_bits_of_a_mean_reach_the_trained_checkpoint(stages: Stages) -> None:
    job, _ = stages(MIXED, epochs=1)
    chosen = json.loads((job.input.path / "bits.json").read_text())
    before, after = (PackedCheckpoint.open(path).modules for path in (job.input.path, job.out))
    assert before == after
    assert {name: quant.bits for name, quant in after.items() if name in chosen} == {
        name: entry["bits"] for name, entry in chosen.items()
    }
    assert {name: after[name].bits for name in after.keys() - chosen.keys()} == {"model.layers.0.mlp.down_proj": 8}
    sizes = {name: after[name].in_features * after[name].out_features for name in chosen}
    mean = sum(after[name].bits * size for name, size in sizes.items()) / sum(sizes.values())
    assert 2.8 < mean <= 3
    assert len({after[name].bits for name in chosen}) > 1


def test_an_interrupted_run_keeps_the_bits_it_chose(stages: Stages) -> None:
    job, _ = stages(MIXED)
    file = job.input.path / "bits.json"
    chosen = json.loads(file.read_text())
    name = "model.layers.1.self_attn.o_proj"
    chosen[name]["bits"] = 2 if chosen[name]["bits"] == 4 else 4
    file.write_text(json.dumps(chosen))
    for out in (job.input.path, job.out):
        for block in out.glob("model-*.safetensors"):
            block.unlink()
    job, _ = stages(MIXED)
    assert PackedCheckpoint.open(job.out).modules[name].bits == chosen[name]["bits"]


def test_without_a_mean_nothing_is_chosen(stages: Stages) -> None:
    job, _ = stages({"bits": 3})
    assert not (job.input.path / "bits.json").exists()
    assert {quant.bits for quant in PackedCheckpoint.open(job.out).modules.values()} == {3}
