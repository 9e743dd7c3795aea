"""block-ap: which hidden states a block is measured against, with and without a look at the next one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qatcli.blocktrain import BlockResult, Objective, Windows, train_block
from qatcli.data import load_windows, save_windows
from qatcli.data.windows import WindowSet
from qatcli.directory import StageDirectory
from qatcli.errors import DivergedError, InputError
from qatcli.recipe import Recipe
from qatcli.runlog import RunLog
from qatcli.stages import Job, block_ap, calibrate

SEQ_LEN, VOCABULARY = 12, 61


@pytest.fixture
def stages(random_llama: Path, tmp_path: Path) -> Callable[..., tuple[Job, dict[str, Any]]]:
    """A function that calibrates on random windows and runs block-ap: (model, **block_ap) -> its job, its metrics."""

    def chain(model: Path = random_llama, **section: Any) -> tuple[Job, dict[str, Any]]:
        recipe = Recipe.model_validate(
            {
                "model": {"source": str(model)},
                "quant": {"bits": 2, "group_size": 16},
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
            out.mkdir()
        logs = [RunLog(out / "log.jsonl", verbosity=-1) for out in (first, second)]
        save_windows(first, WindowSet(train, held_out, None, None, "", {}))
        calibrate.run(Job(recipe, None, first, tmp_path, logs[0], torch.device("cpu")))
        source = StageDirectory(first, {"kind": "calibration"})
        job = Job(recipe, source, second, tmp_path, logs[1], torch.device("cpu"))
        return job, block_ap.run(job)

    return chain


def outputs(model: Any, tokens: Tensor, replaced: dict[int, Tensor] | None = None) -> list[Tensor]:
    """What every block gives for tokens; a block in `replaced` receives that instead of its predecessor's output."""
    found: list[Tensor] = []

    def replace(index: int) -> Callable[..., Any]:
        return lambda module, args: ((replaced or {}).get(index, args[0]), *args[1:])

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    handles = [block.register_forward_pre_hook(replace(i)) for i, block in enumerate(model.model.layers)]
    handles += [block.register_forward_hook(keep) for block in model.model.layers]
    with torch.no_grad():
        model(input_ids=tokens.long(), use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def downstream_error(output: Tensor, target: Tensor, readers: list[Tensor]) -> float:
    """What `block_ap.loss: downstream` is: the mean relative error of the channels as readers weigh them."""
    errors = [((output - target) * gain).square().sum(-1) / (target * gain).square().sum(-1) for gain in readers]
    return float(torch.stack(errors).mean())


def what_reads(block: nn.Module) -> list[Tensor]:
    """The norms of the columns of a block's linears, behind its own norms."""
    attention, mlp = block.self_attn, block.mlp
    linears = [(block.input_layernorm, each) for each in (attention.q_proj, attention.k_proj, attention.v_proj)]
    linears += [(block.post_attention_layernorm, each) for each in (mlp.gate_proj, mlp.up_proj)]
    return [norm.weight.detach() * linear.weight.detach().norm(dim=0) for norm, linear in linears]


@pytest.mark.parametrize("lookahead", [False, True])
@pytest.mark.parametrize(("epochs", "figure"), [(0, "before"), (2, "after")])
def test_what_blocks_are_measured_against(
    stages: Callable[..., tuple[Job, dict[str, Any]]], random_llama: Path, epochs: int, figure: str, lookahead: bool
) -> None:
    """Recomputed from the finished checkpoint: what was trained, norms included, is what was saved."""
    job, metrics = stages(lookahead=lookahead, epochs=epochs, lr_norms=0.05, keep_best=False)
    _, held_out = load_windows(job.input.path)
    model = AutoModelForCausalLM.from_pretrained(random_llama, dtype=torch.float32).eval()
    quantized = AutoModelForCausalLM.from_pretrained(job.out, dtype=torch.float32).eval()
    targets, students = outputs(model, held_out.tokens), outputs(quantized, held_out.tokens)
    readers = [each for block in model.model.layers for each in what_reads(block)] + [model.model.norm.weight.detach()]
    expected = []
    for index, (student, target) in enumerate(zip(students, targets, strict=True)):
        error = downstream_error(student, target, readers[5 * (index + 1) :])
        if lookahead and index + 1 < len(targets):
            after_next = outputs(model, held_out.tokens, {index + 1: student})[index + 1]
            error = (error + downstream_error(after_next, targets[index + 1], readers[5 * (index + 2) :])) / 2
        expected.append(error)
    assert [block[figure] for block in metrics["blocks"]] == pytest.approx(expected, rel=1e-4)
    norms = [name for name, _ in model.named_parameters() if "layernorm" in name]
    moved = [not torch.equal(model.get_parameter(name), quantized.get_parameter(name)) for name in norms]
    assert moved == [epochs > 0] * 6


@pytest.mark.parametrize("lookahead", [False, True])
def test_blocks_learn_on_training_windows_from_the_same(
    stages: Callable[..., tuple[Job, dict[str, Any]]],
    random_llama: Path,
    monkeypatch: pytest.MonkeyPatch,
    lookahead: bool,
) -> None:
    """Students receive what the quantized blocks give, targets are those of the full-precision model."""
    given: list[Windows] = []

    def train(objective: Objective, students: Any, train: Windows, *rest: Any, **options: Any) -> BlockResult:
        ahead = None if train.following is None else train.following[:].clone()
        given.append(Windows(train.inputs[:].clone(), train.targets[:].clone(), ahead))
        return train_block(objective, students, train, *rest, **options)

    monkeypatch.setattr(block_ap, "train_block", train)
    job, _ = stages(lookahead=lookahead, epochs=1)
    tokens = load_windows(job.input.path)[0].tokens
    full, quantized = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in (random_llama, job.out)
    )
    targets, students = outputs(full, tokens), outputs(quantized, tokens)
    inputs = [full.model.embed_tokens(tokens.long()).detach(), *students]
    assert len(given) == 3
    for index, windows in enumerate(given):
        torch.testing.assert_close(windows.inputs, inputs[index], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(windows.targets, targets[index], rtol=1e-4, atol=1e-5)
        if lookahead and index < 2:
            torch.testing.assert_close(windows.following, targets[index + 1], rtol=1e-4, atol=1e-5)
        else:
            assert windows.following is None


def test_looking_ahead_resumes_to_the_bit(stages: Callable[..., tuple[Job, dict[str, Any]]]) -> None:
    job, metrics = stages(lookahead=True, epochs=1)
    first, last = (job.out / f"model-block-{index:04}.safetensors" for index in (0, 2))
    kept, made = first.read_bytes(), last.read_bytes()
    for index in (1, 2):
        (job.out / f"model-block-{index:04}.safetensors").unlink()
    again = block_ap.run(job)
    assert first.read_bytes() == kept
    assert last.read_bytes() == made
    assert [block["after"] for block in again["blocks"]] == [block["after"] for block in metrics["blocks"]]


def test_a_model_that_overflows_is_refused_before_anything_is_rounded(
    stages: Callable[..., tuple[Job, dict[str, Any]]], random_llama: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(random_llama)
    model.model.layers[1].mlp.down_proj.weight.data *= 1e7
    model.save_pretrained(tmp_path / "large")
    with pytest.raises(DivergedError, match=r"model\.layers\.1 of the full-precision model"):
        stages(tmp_path / "large", amp="float16")
    written = {file.name for file in (tmp_path / "calibrate").glob("model-block-*")}
    assert written == {"model-block-0000.safetensors"}


def test_a_block_that_recovered_from_an_overflow_ends_like_any_other(
    stages: Callable[..., tuple[Job, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_ap, "train_block", overflows(where="before"))
    _, metrics = stages()
    assert [block["before"] for block in metrics["blocks"]] == [None] * 3
    assert metrics["loss_before"] is None
    assert metrics["loss_after"] > 0


def test_a_block_without_a_finite_loss_ends_the_stage(
    stages: Callable[..., tuple[Job, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(block_ap, "train_block", overflows(where="after"))
    with pytest.raises(DivergedError, match="block 0"):
        stages()
    assert not list((tmp_path / "block-ap").glob("model-block-*"))


def overflows(*, where: str) -> Callable[..., BlockResult]:
    """`train_block`, but its loss `where` ("before" or "after") is infinite."""

    def train(*args: Any, **settings: Any) -> BlockResult:
        return replace(train_block(*args, **settings), **{where: float("inf")})

    return train


@pytest.mark.parametrize(
    ("quant", "words"),
    [
        ({"bits": 3}, "at 2 bits in groups of 16, the recipe at 3 bits in groups of 16"),
        ({"group_size": 8}, "the recipe at 2 bits in groups of 8"),
        ({"skip": ["*.q_proj"]}, "the recipe at full precision"),
    ],
)
def test_a_calibration_of_another_grid_is_refused(
    stages: Callable[..., tuple[Job, dict[str, Any]]], quant: dict[str, Any], words: str
) -> None:
    job, _ = stages()
    before = {file.name: file.read_bytes() for file in job.out.iterdir()}
    section = job.recipe.quant.model_copy(update=quant)
    other = replace(job, recipe=job.recipe.model_copy(update={"quant": section}))
    with pytest.raises(InputError, match=words):
        block_ap.run(other)
    assert {file.name: file.read_bytes() for file in job.out.iterdir()} == before


def test_every_block_and_every_seed_shuffles_in_an_order_of_its_own(
    stages: Callable[..., tuple[Job, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = []

    def train(*_: Any, generator: torch.Generator, **__: Any) -> BlockResult:
        seeds.append(generator.initial_seed())
        return BlockResult(before=1.0, after=1.0)

    monkeypatch.setattr(block_ap, "train_block", train)
    job, _ = stages()
    assert seeds == [job.recipe.calibrate.seed * 1_000_003 + index for index in range(3)]


def test_errors_are_against_the_weights_as_they_were(
    stages: Callable[..., tuple[Job, dict[str, Any]]], random_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared, weight_errors = [], block_ap.weight_errors

    def errors(block: nn.Module, *rest: Any) -> Any:
        compared.append(block.get_parameter("mlp.up_proj.weight").clone())
        return weight_errors(block, *rest)

    monkeypatch.setattr(block_ap, "weight_errors", errors)
    stages(epochs=1)
    model = AutoModelForCausalLM.from_pretrained(random_llama, dtype=torch.float32)
    assert len(compared) == 3
    assert all(torch.equal(w, model.model.layers[i].mlp.up_proj.weight) for i, w in enumerate(compared))
