"""The likeliest tokens of full precision: those of the whole model, made once, in whatever parts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qatcli import teacher
from qatcli.activations import StreamBudget
from qatcli.errors import InputError
from qatcli.models.blocks import open_blocks
from qatcli.models.source import open_source
from qatcli.progress import Bar
from qatcli.teacher import Beside, KeptTeacher

CPU, FP32, TOP_K = torch.device("cpu"), torch.float32, 5
Make = Callable[[KeptTeacher], Bar]


@pytest.fixture
def windows() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    made = (torch.randint(0, 61, (count, 9), generator=generator, dtype=torch.int32) for count in (7, 2, 0))
    return dict(zip(("train", "validation", "none"), made, strict=True))


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher, "PART", 3)


@pytest.fixture
def make(random_llama: Path, tmp_path: Path) -> Make:
    """A function that makes a teacher's files; the bar that it showed."""

    def made(kept: KeptTeacher) -> Bar:
        model = open_blocks(open_source(str(random_llama)))
        bar = Bar("", len(model) * len(kept.parts()), 0, lambda _: None)
        kept.make(model, StreamBudget(CPU, 0, 2**20, tmp_path), FP32, bar)
        return bar

    return made


@pytest.mark.parametrize("split", ["train", "validation"])
def test_they_are_those_of_the_whole_model(
    windows: dict[str, Tensor], random_llama: Path, make: Make, tmp_path: Path, split: str
) -> None:
    kept = KeptTeacher(tmp_path, windows, TOP_K, CPU)
    bar = make(kept)
    assert bar.count == bar.total == 3 * 4  # blocks, parts: three of the training windows, one of the others
    whole = open_source(str(random_llama)).load_model(FP32, CPU)
    rows = torch.randperm(len(windows[split]))
    expected = Beside(whole, windows, CPU, FP32)(split, rows).flatten(0, 1).log_softmax(-1).topk(TOP_K)
    found = kept(split, rows)
    torch.testing.assert_close(found.log_probabilities.float(), expected.values, rtol=1e-3, atol=1e-4)
    assert (found.tokens == expected.indices).float().mean() > 0.95  # but where two are as likely
    assert found.log_probabilities.dtype == torch.float16


def test_of_a_small_vocabulary_all_are_kept(windows: dict[str, Tensor], make: Make, tmp_path: Path) -> None:
    kept = KeptTeacher(tmp_path, windows, 1000, CPU)
    make(kept)
    found = kept("validation", torch.tensor([1]))
    assert found.tokens.shape == (9, 61)
    assert torch.equal(found.tokens.sort().values, torch.arange(61, dtype=torch.int32).expand(9, -1))
    torch.testing.assert_close(found.log_probabilities.float().exp().sum(-1), torch.ones(9), rtol=0, atol=1e-3)


def test_what_an_interrupted_run_made_is_kept(windows: dict[str, Tensor], make: Make, tmp_path: Path) -> None:
    kept = KeptTeacher(tmp_path, windows, TOP_K, CPU)
    make(kept)
    files = sorted(tmp_path.glob("resume.*"))
    assert [file.name for file in files] == [
        *(f"resume.teacher-train-0000{index}.safetensors" for index in range(3)),
        "resume.teacher-validation-00000.safetensors",
    ]
    before = [file.read_bytes() for file in files]
    files[1].unlink()
    times = {file: file.stat().st_mtime_ns for file in (files[0], *files[2:])}
    bar = make(kept)
    assert bar.count == bar.total
    assert {file: file.stat().st_mtime_ns for file in times} == times
    assert [file.read_bytes() for file in files] == before


def test_a_damaged_file_is_not_learned_from(windows: dict[str, Tensor], make: Make, tmp_path: Path) -> None:
    kept = KeptTeacher(tmp_path, windows, TOP_K, CPU)
    make(kept)
    file = min(tmp_path.glob("resume.*"))
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match=f"{file.name} is damaged"):
        make(kept)
