"""The first two stages on a random model, without their lifecycle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qatcli.data import save_windows
from qatcli.data.windows import WindowSet
from qatcli.directory import StageDirectory
from qatcli.recipe import Recipe
from qatcli.runlog import RunLog
from qatcli.stages import Job, block_ap, calibrate

SEQ_LEN, VOCABULARY = 12, 61


@pytest.fixture
def stages(random_llama: Path, tmp_path: Path) -> Callable[..., tuple[Job, dict[str, Any]]]:
    """A function that calibrates on random windows and runs block-ap: (quant, **block_ap) -> job and metrics."""

    def chain(quant: dict[str, Any] | None = None, **section: Any) -> tuple[Job, dict[str, Any]]:
        recipe = Recipe.model_validate(
            {
                "model": {"source": str(random_llama)},
                "quant": {"bits": 2, "group_size": 16, **(quant or {})},
                "calibrate": {"data": [{"source": "./not-read.txt"}], "samples": 8, "validation_samples": 4}
                | {"seq_len": SEQ_LEN, "moment_samples": 4},
                "block_ap": {"epochs": 0, "batch_size": 4, "amp": "float32", **section},
            }
        )
        generator = torch.Generator().manual_seed(5)
        train, held_out = (
            torch.randint(0, VOCABULARY, (count, SEQ_LEN), generator=generator, dtype=torch.int32) for count in (8, 4)
        )
        first, second = tmp_path / "calibrate", tmp_path / "block-ap"
        for out in (first, second):
            out.mkdir(exist_ok=True)
        logs = [RunLog(out / "log.jsonl", verbosity=-1) for out in (first, second)]
        save_windows(first, WindowSet(train, held_out, None, None, "", {}))
        calibrate.run(Job(recipe, None, first, tmp_path, logs[0], torch.device("cpu")))
        source = StageDirectory(first, {"kind": "calibration"})
        job = Job(recipe, source, second, tmp_path, logs[1], torch.device("cpu"))
        return job, block_ap.run(job)

    return chain
