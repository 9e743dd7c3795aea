"""What is kept of full precision: that of the whole model, made once, in whatever parts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qatcli import streaming, teacher
from qatcli.activations import StreamBudget
from qatcli.errors import DivergedError, InputError
from qatcli.models.blocks import open_blocks
from qatcli.models.source import open_source
from qatcli.progress import Bar
from qatcli.streaming import StreamedModel
from qatcli.teacher import Teacher, keep_tokens

CPU, FP32, KEPT, VOCABULARY = torch.device("cpu"), torch.float32, 8, 61
Make = Callable[[Teacher], Bar]


@pytest.fixture
def windows() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    made = (torch.randint(0, 61, (count, 9), generator=generator, dtype=torch.int32) for count in (7, 2, 0))
    return dict(zip(("train", "validation", "none"), made, strict=True))


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (teacher, streaming):
        monkeypatch.setattr(module, "PART", 3)


@pytest.fixture
def make(random_llama: Path, tmp_path: Path) -> Make:
    """A function that makes a teacher's files; the bar that it showed."""

    def made(kept: Teacher) -> Bar:
        blocks = open_blocks(open_source(str(random_llama)))
        model = StreamedModel(blocks, lambda: StreamBudget(CPU, 0, 2**20, tmp_path))
        bar = Bar("", sum(map(model.steps, kept.windows.values())), 0, lambda _: None)
        kept.make(model, FP32, bar)
        return bar

    return made


@pytest.mark.parametrize("split", ["train", "validation"])
def test_they_are_those_of_the_whole_model(
    windows: dict[str, Tensor], random_llama: Path, make: Make, tmp_path: Path, split: str
) -> None:
    kept = Teacher(tmp_path, windows, VOCABULARY, KEPT, 2, CPU)
    bar = make(kept)
    assert bar.count == bar.total == 3 * (7 + 2)  # blocks, windows
    whole = open_source(str(random_llama)).load_model(FP32, CPU)
    rows = torch.randperm(len(windows[split]))
    p = whole(input_ids=windows[split][rows].long()).logits.detach().flatten(0, 1).softmax(-1)
    found = kept(split, rows)
    assert found.tokens.shape == found.weights.shape == (9 * len(rows), KEPT)
    likeliest, half = p.topk(KEPT // 2), KEPT // 2
    torch.testing.assert_close(found.weights[:, :half], likeliest.values, rtol=2e-3, atol=1e-4)
    assert (found.tokens[:, :half] == likeliest.indices).float().mean() > 0.95  # but where two are as likely
    share = (1 - likeliest.values.sum(-1, keepdim=True)) / half
    torch.testing.assert_close(found.weights[:, half:], share.expand(-1, half), rtol=5e-3, atol=1e-4)
    torch.testing.assert_close(found.entropy, -(p * p.log()).sum(-1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.weights.sum(-1), torch.ones(len(p)))


def test_the_expected_weights_are_the_distribution() -> None:
    """Also of tokens that are rarely among those kept."""
    logits, count = torch.randn(30).mul(2), 20_000
    found = keep_tokens(logits.expand(count, -1), 6, torch.Generator().manual_seed(1))
    weights = torch.zeros(count, 30).scatter_add_(1, found.tokens.long(), found.weights.float())
    p = logits.softmax(-1)
    error = weights.std(0) / count**0.5
    assert ((weights.mean(0) - p).abs() < 4 * error + 1e-4).all()
    assert (weights.std(0)[p.topk(3).indices] < 1e-6).all()
    assert (weights.amax(1) <= p.max() + 1e-3).all()


def test_a_token_that_is_certain_leaves_nothing_to_the_others() -> None:
    logits = torch.full((5, 30), -100.0)
    logits[:, 7] = 100
    found = keep_tokens(logits, 4, torch.Generator().manual_seed(1))
    assert (found.tokens[:, 0] == 7).all()
    assert torch.equal(found.weights, torch.tensor([1, 0, 0, 0], dtype=torch.float16).expand(5, -1))
    assert torch.equal(found.entropy, torch.zeros(5))


def test_logits_that_are_not_finite_are_not_learned_from() -> None:
    logits = torch.randn(5, 30)
    logits[3, 2] = float("nan")
    with pytest.raises(DivergedError, match="not finite"):
        keep_tokens(logits, 4, torch.Generator().manual_seed(1))


def test_draws_depend_on_the_seed_and_not_on_what_was_there_before(
    windows: dict[str, Tensor], make: Make, tmp_path: Path
) -> None:
    found = []
    for name, seed in (("a", 2), ("b", 2), ("c", 3)):
        (tmp_path / name).mkdir()
        kept = Teacher(tmp_path / name, windows, VOCABULARY, KEPT, seed, CPU)
        make(kept)
        found.append(kept("train", torch.arange(7)).tokens)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_of_a_small_vocabulary_all_are_kept(windows: dict[str, Tensor], make: Make, tmp_path: Path) -> None:
    kept = Teacher(tmp_path, windows, VOCABULARY, 1000, 2, CPU)
    make(kept)
    found = kept("validation", torch.tensor([1]))
    assert found.tokens.shape == (9, 61)
    assert torch.equal(found.tokens.sort().values, torch.arange(61, dtype=torch.int32).expand(9, -1))
    torch.testing.assert_close(found.weights.sum(-1), torch.ones(9))


def test_only_what_the_student_knows_is_kept(windows: dict[str, Tensor], make: Make, tmp_path: Path) -> None:
    """A checkpoint of another tool may have fewer rows of embeddings than the model it was made from."""
    kept = Teacher(tmp_path, windows, 40, KEPT, 2, CPU)
    make(kept)
    found = kept("train", torch.arange(7))
    assert found.tokens.max() < 40
    torch.testing.assert_close(found.weights.sum(-1), torch.ones(7 * 9))


def test_what_an_interrupted_run_made_is_kept(windows: dict[str, Tensor], make: Make, tmp_path: Path) -> None:
    kept = Teacher(tmp_path, windows, VOCABULARY, KEPT, 2, CPU)
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
    kept = Teacher(tmp_path, windows, VOCABULARY, KEPT, 2, CPU)
    make(kept)
    file = min(tmp_path.glob("resume.*"))
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match=f"{file.name} is damaged"):
        make(kept)
