"""e2e-qp: what trains and what does not, what is measured, and what is written."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from qatcli.data import Windows, load_windows, save_windows
from qatcli.data.windows import WindowSet
from qatcli.directory import StageDirectory
from qatcli.errors import DivergedError
from qatcli.linear import PackedLinear
from qatcli.packed import ModuleQuant, PackedCheckpoint
from qatcli.recipe import E2eQpSection, Recipe
from qatcli.runlog import RunLog
from qatcli.stages import Job, e2e_qp
from qatcli.stages.e2e_qp import run, trained_parameters

SEQ_LEN, VOCABULARY = 12, 61
SMALL = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}


# What trains.


class Model(nn.Module):
    def __init__(self, scale_dtype: torch.dtype) -> None:
        super().__init__()
        kind: dict[str, Any] = {"bias": True, "scale_dtype": scale_dtype, "dtype": torch.float32}
        self.embed = nn.Embedding(4, 32)
        self.attention = nn.ModuleDict({"q_proj": PackedLinear(ModuleQuant(2, 32, 32, 32), **kind)})
        self.norm = nn.LayerNorm(32)
        self.down_proj = PackedLinear(ModuleQuant(3, 16, 32, 32), **kind)
        self.lm_head = nn.Linear(32, 4)


@pytest.mark.parametrize(
    ("train", "rates", "expected"),
    [
        (["scales"], {}, {"attention.q_proj.weight_scale", "down_proj.weight_scale"}),
        (["norms"], {"lr_norms": 0.1}, {"norm.weight"}),
        (
            ["scales", "norms"],
            {"lr_norms": 0.1},
            {"attention.q_proj.weight_scale", "down_proj.weight_scale", "norm.weight"},
        ),
    ],
)
def test_trained_parameters_have_the_names_of_the_checkpoint(
    train: list[str], rates: dict[str, float], expected: set[str]
) -> None:
    model = Model(torch.float32)
    found = trained_parameters(model, E2eQpSection(train=train, **rates))
    assert set(found) == expected
    named = dict(model.named_parameters())
    assert all(found[name] is named[name] for name in expected)


def test_scales_of_a_published_checkpoint_train_in_fp32() -> None:
    found = trained_parameters(Model(torch.float16), E2eQpSection())
    assert {parameter.dtype for parameter in found.values()} == {torch.float32}


# The stage.


@pytest.fixture
def stage(random_llama: Path, pack_model: Callable[..., Path], tmp_path: Path) -> Callable[..., Job]:
    """A function that prepares the stage on a packed random model with random windows: (**e2e_qp) -> its job."""
    checkpoint = pack_model(random_llama, tmp_path / "block-ap", bits=2)

    def prepare(folder: str = "out", **section: Any) -> Job:
        settings = {"samples": 8, "validation_samples": 4, "seq_len": SEQ_LEN, "batch_size": 4, "amp": "float32"}
        settings["teacher_tokens"] = VOCABULARY  # all, so that figures can be told exactly
        settings |= {"gradient_checkpointing": False, "lr_scales": 0.1, "max_step": None, "epochs": 2, **section}
        recipe = Recipe.model_validate(
            {
                "model": {"source": str(random_llama)},
                "quant": {"bits": 2, "group_size": 16},
                "calibrate": {"data": [{"source": "./not-read.txt"}]},
                "e2e_qp": settings,
            }
        )
        out = tmp_path / folder
        out.mkdir()
        generator = torch.Generator().manual_seed(5)

        def windows(count: int) -> Tensor:
            return torch.randint(0, VOCABULARY, (count, SEQ_LEN), generator=generator, dtype=torch.int32)

        mask = torch.ones(4, SEQ_LEN, dtype=torch.bool)
        mask[1, 3:] = False
        save_windows(out, WindowSet(windows(settings["samples"]), windows(4), None, mask, "", {}))
        source = StageDirectory(checkpoint, {"kind": "quantized"})
        return Job(recipe, source, out, tmp_path, RunLog(verbosity=-1), torch.device("cpu"))

    return prepare


def all_tensors(path: Path) -> dict[str, Tensor]:
    return load_file(path / "model.safetensors")


def held_out_loss(model: Any, windows: Windows, teacher: Any, text_weight: float) -> float:
    """Mean over target tokens, each computed alone."""
    losses = []
    with torch.no_grad():
        for tokens, mask in zip(windows.tokens.long(), windows.mask, strict=True):
            student = model(input_ids=tokens[None]).logits[0].double().log_softmax(-1)
            target = None if teacher is None else teacher(input_ids=tokens[None]).logits[0].double().log_softmax(-1)
            for position in range(1, SEQ_LEN):
                if not mask[position]:
                    continue
                q = student[position - 1]
                losses.append(-text_weight * float(q[tokens[position]]))
                if target is not None:
                    p = target[position - 1]
                    losses.append((1 - text_weight) * float((p.exp() * (p - q)).sum()))
    return math.fsum(losses) / int(windows.mask[:, 1:].sum())


@pytest.mark.parametrize("text_weight", [0, 0.3, 1])
def test_scales_train_and_nothing_else_changes(
    stage: Callable[..., Job], random_llama: Path, text_weight: float
) -> None:
    job = stage(text_weight=text_weight, samples=32)
    metrics = run(job)
    assert metrics["steps"] == 16
    assert metrics["after"] < metrics["before"]

    before, after = all_tensors(job.input.path), all_tensors(job.out)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith(".weight_scale")}
    assert len(changed) == 21

    load = AutoModelForCausalLM.from_pretrained
    teacher = load(random_llama, dtype=torch.float32).eval() if text_weight < 1 else None
    _, held_out = load_windows(job.out)
    for path, figure in ((job.input.path, "before"), (job.out, "after")):
        model = load(path, dtype=torch.float32).eval()
        assert metrics[figure] == pytest.approx(held_out_loss(model, held_out, teacher, text_weight), rel=1e-4)


def test_some_tokens_teach_as_all_do(stage: Callable[..., Job]) -> None:
    """Nearly: one draw is not the expectation."""
    whole, some = stage("all", teacher_tokens=VOCABULARY), stage("some", teacher_tokens=20)
    expected, found = run(whole), run(some)
    assert found["before"] != expected["before"]
    for figure in ("before", "after"):
        assert found[figure] == pytest.approx(expected[figure], rel=0.2)
    before, all_kept, few = (all_tensors(path) for path in (whole.input.path, whole.out, some.out))
    moved, other = (
        torch.cat([(tensors[name] - before[name]).flatten() for name in before if name.endswith("_scale")])
        for tensors in (all_kept, few)
    )
    assert float((other - moved).norm() / moved.norm()) < 0.5


def test_norms_that_train_are_written(stage: Callable[..., Job]) -> None:
    job = stage(train=["scales", "norms"], lr_norms=0.1, text_weight=1, samples=32)
    metrics = run(job)
    before, after = all_tensors(job.input.path), all_tensors(job.out)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    norms = {name for name in before if name.endswith("norm.weight")}
    assert changed == norms | {name for name in before if name.endswith(".weight_scale")}
    assert len(norms) == 7
    model = AutoModelForCausalLM.from_pretrained(job.out, dtype=torch.float32).eval()
    assert metrics["after"] == pytest.approx(held_out_loss(model, load_windows(job.out)[1], None, 1), rel=1e-4)


@pytest.mark.parametrize(
    ("section", "unit"),
    [
        ({"lr_scales": 10.0, "max_step": 0.02}, 0.02 / 2),  # of the scale: the outermost of 4 levels is 2 steps off
        ({"lr_units": "absolute", "lr_scales": 1e-3}, None),
    ],
)
def test_an_update_goes_as_far_as_the_recipe_says(
    stage: Callable[..., Job], section: dict[str, Any], unit: float | None
) -> None:
    """The first of Adam's is its rate, whatever the gradient."""
    job = stage(epochs=1, samples=4, warmup=0, min_lr_factor=None, keep_best=False, **section)
    assert run(job)["steps"] == 1
    before, after = all_tensors(job.input.path), all_tensors(job.out)
    for name in before:
        if name.endswith(".weight_scale"):
            moved = (after[name] - before[name]).abs() / (1e-3 if unit is None else unit * before[name])
            assert float(moved.median()) == pytest.approx(1, rel=0.02), name
            assert float(moved.max()) < 1.02


def test_rates_warm_up_and_decay(stage: Callable[..., Job], monkeypatch: pytest.MonkeyPatch) -> None:
    rates, update = [], e2e_qp._Trainer._update

    def kept(trainer: Any, stepper: Any, *rest: Any) -> float:
        loss = update(trainer, stepper, *rest)
        rates.append(stepper.optimizer.param_groups[0]["lr"])
        return loss

    monkeypatch.setattr(e2e_qp._Trainer, "_update", kept)
    run(stage(epochs=2, samples=8, warmup=0.25, min_lr_factor=10))
    assert [rate / max(rates) for rate in rates] == pytest.approx([0.5, 1, 0.775, 0.325])  # half, then a cosine to 0.1


def test_no_scale_is_driven_through_zero(stage: Callable[..., Job]) -> None:
    """Not even one that is far smaller than the others of its linear: it moves in units of its own."""
    job = stage(keep_best=False, lr_scales=0.5)
    tensors = all_tensors(job.input.path)
    for name in tensors:
        if name.endswith(".weight_scale"):
            tensors[name][::2] *= 1e-3
    save_file(tensors, job.input.path / "model.safetensors", metadata={"format": "pt"})
    run(job)
    after = all_tensors(job.out)
    for name, start in tensors.items():
        if name.endswith(".weight_scale"):
            ratio = after[name] / start
            assert bool((ratio != 1).any())
            assert 0.7 < float(ratio.min()) < float(ratio.max()) < 1.3, name  # 0.5 steps of 2 bits: a quarter


def test_windows_that_do_not_fill_a_batch_train_too(stage: Callable[..., Job]) -> None:
    assert run(stage(samples=7, epochs=1))["steps"] == 2


def test_the_stage_leaves_its_files_and_what_a_resume_needs_until_the_commit(stage: Callable[..., Job]) -> None:
    job = stage(checkpoint_every=1)
    run(job)
    assert {file.name for file in job.out.iterdir()} == {
        *("config.json", "data.json", "generation_config.json", "model.safetensors", "windows.safetensors"),
        "resume.safetensors",
        *(f"resume.teacher-{split}-00000.safetensors" for split in ("train", "validation")),
    }
    assert PackedCheckpoint.open(job.out).modules == PackedCheckpoint.open(job.input.path).modules


@pytest.mark.parametrize("section", [{"epochs": 0}, {"lr_scales": 0.0}])
def test_without_epochs_or_rates_scales_are_measured_and_not_changed(
    stage: Callable[..., Job], section: dict[str, Any]
) -> None:
    job = stage(**section)
    metrics = run(job)
    assert metrics["steps"] == 0
    assert metrics["before"] == metrics["after"] > 0
    before, after = all_tensors(job.input.path), all_tensors(job.out)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_absurd_rate_ends_no_worse_than_it_began(stage: Callable[..., Job]) -> None:
    job = stage(lr_scales=50.0, max_step=None, grad_clip=None)
    metrics = run(job)
    assert metrics["after"] <= metrics["before"]
    before, after = all_tensors(job.input.path), all_tensors(job.out)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_without_keep_best_the_last_iterate_is_written(stage: Callable[..., Job]) -> None:
    job = stage(lr_scales=50.0, max_step=None, grad_clip=None, keep_best=False)
    metrics = run(job)
    assert metrics["after"] > metrics["before"]
    before, after = all_tensors(job.input.path), all_tensors(job.out)
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_without_keep_best_an_iterate_that_is_not_finite_is_not_the_last(
    stage: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = stage(keep_best=False, checkpoint_every=1)
    losses = iter([1.0, 0.5, *[float("nan")] * 100])
    monkeypatch.setattr(e2e_qp._Trainer, "validate", lambda *_: next(losses))
    metrics = run(job)
    assert metrics["after"] == 0.5
    assert metrics["steps"] > 1


def test_memory_settings_do_not_change_the_result(stage: Callable[..., Job]) -> None:
    plain, lean = stage("plain", micro_batch_size=4), stage("lean", micro_batch_size=1, gradient_checkpointing=True)
    run(plain)
    run(lean)
    expected, found = all_tensors(plain.out), all_tensors(lean.out)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)


def test_the_output_layer_is_stored_as_it_is_computed(
    stage: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which changes nothing but memory: autocast makes the same of it in every pass."""
    stored = []
    update = e2e_qp._Trainer._update

    def seen(trainer: Any, *rest: Any) -> Any:
        stored.append(trainer.student.lm_head.weight.dtype)
        return update(trainer, *rest)

    monkeypatch.setattr(e2e_qp._Trainer, "_update", seen)
    lean, plain = (stage(name, amp="bfloat16") for name in ("lean", "plain"))
    run(lean)
    monkeypatch.setattr(e2e_qp, "_store_as_computed", lambda *_: None)
    run(plain)
    assert len(stored) == 8
    assert stored == [torch.bfloat16] * 4 + [torch.float32] * 4
    expected, found = all_tensors(plain.out), all_tensors(lean.out)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_embeddings_that_are_the_output_layer_stay_in_fp32() -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, tie_word_embeddings=True))
    e2e_qp._store_as_computed(model, torch.bfloat16)
    assert model.get_input_embeddings().weight.dtype == model.lm_head.weight.dtype == torch.float32


def interrupted_after(step: int, monkeypatch: pytest.MonkeyPatch, job: Job) -> None:
    """Run the stage until it has saved its state after `step` updates."""
    save = e2e_qp._Trainer._save

    def save_and_stop(trainer: Any, stepper: Any, made: int, before: float) -> None:
        save(trainer, stepper, made, before)
        if made == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(e2e_qp._Trainer, "_save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            run(job)


def test_a_resumed_run_draws_the_numbers_of_an_uninterrupted_one(
    stage: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout, which is at work where gradient checkpointing needs the model in training mode."""
    settings = {"gradient_checkpointing": True, "checkpoint_every": 1}
    plain, whole, cut = (stage(name, **settings) for name in ("plain", "whole", "cut"))
    run(plain)
    config = json.loads((cut.input.path / "config.json").read_text())
    (cut.input.path / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.5}))
    run(whole)
    torch.rand(3)  # a process of its own has other numbers behind it
    interrupted_after(2, monkeypatch, cut)
    run(cut)
    without, expected, found = (all_tensors(job.out) for job in (plain, whole, cut))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert any(not torch.equal(without[name], expected[name]) for name in expected)


def test_a_resumed_run_still_has_the_best_iterate(stage: Callable[..., Job], monkeypatch: pytest.MonkeyPatch) -> None:
    """Which was long before the interruption."""
    results = []
    for name in ("whole", "cut"):
        job, losses = stage(name, checkpoint_every=1), iter([5.0, 1.0, *[3.0] * 10])
        monkeypatch.setattr(e2e_qp._Trainer, "validate", lambda *_, losses=losses: next(losses))
        if name == "cut":
            interrupted_after(3, monkeypatch, job)
        results.append((run(job)["after"], all_tensors(job.out)))
    (best, expected), (after, found) = results
    assert best == after == 1.0
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_resumed_run_keeps_the_scale_of_its_loss(stage: Callable[..., Job], monkeypatch: pytest.MonkeyPatch) -> None:
    """In float16 it falls until gradients do not overflow, and updates until then are not taken."""
    loss, scales = e2e_qp._Trainer._loss, []
    monkeypatch.setattr(e2e_qp._Trainer, "_loss", lambda *arguments: loss(*arguments) * 1000)
    whole, cut = (stage(name, checkpoint_every=1, amp="float16", keep_best=False) for name in ("whole", "cut"))
    save = e2e_qp._Trainer._save

    def kept(trainer: Any, stepper: Any, *rest: Any) -> None:
        scales.append(stepper.scaler.get_scale())
        save(trainer, stepper, *rest)

    monkeypatch.setattr(e2e_qp._Trainer, "_save", kept)
    run(whole)
    assert scales[-1] < scales[0] < 65536
    interrupted_after(3, monkeypatch, cut)
    run(cut)
    assert scales[4:] == scales[:4]
    expected, found = (all_tensors(job.out) for job in (whole, cut))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("amp", ["float32", "bfloat16"])
def test_a_resumed_run_knows_of_its_failures(
    stage: Callable[..., Job], monkeypatch: pytest.MonkeyPatch, amp: str
) -> None:
    """Each halves the rates, and the first goes over to fp32."""
    loss, update = e2e_qp._Trainer._loss, e2e_qp._Trainer._update
    failing = False

    def failed(*arguments: Any) -> Tensor:
        return loss(*arguments) * (math.nan if failing else 1)

    def second_fails(trainer: Any, stepper: Any, step: int, *rest: Any) -> float:
        nonlocal failing
        failing = step == 1
        try:
            return update(trainer, stepper, step, *rest)
        finally:
            failing = False

    monkeypatch.setattr(e2e_qp._Trainer, "_loss", failed)
    monkeypatch.setattr(e2e_qp._Trainer, "_update", second_fails)
    whole, cut = (stage(name, checkpoint_every=1, keep_best=False, amp=amp) for name in ("whole", "cut"))
    backoffs = run(whole)["backoffs"]
    interrupted_after(3, monkeypatch, cut)
    assert run(cut)["backoffs"] == backoffs == 1
    expected, found = all_tensors(whole.out), all_tensors(cut.out)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("seconds", [0, 600])
def test_an_interruption_costs_no_more_than_some_minutes(
    stage: Callable[..., Job], monkeypatch: pytest.MonkeyPatch, seconds: int
) -> None:
    """However many updates lie between two validations: a state is as good as one of these."""
    whole, cut = stage("whole", checkpoint_every=100), stage("cut", checkpoint_every=100)
    steps = run(whole)["steps"]
    assert steps > 3
    update, made = e2e_qp._Trainer._update, list[int]()

    def counted(trainer: Any, stepper: Any, step: int, *rest: Any) -> float:
        made.append(step)
        if len(made) == 4:
            raise KeyboardInterrupt
        return update(trainer, stepper, step, *rest)

    monkeypatch.setattr(e2e_qp, "SAVE_SECONDS", seconds)
    monkeypatch.setattr(e2e_qp._Trainer, "_update", counted)
    with pytest.raises(KeyboardInterrupt):
        run(cut)
    run(cut)
    again = 3 if seconds == 0 else 0
    assert made == [0, 1, 2, 3, *range(again, steps)]
    expected, found = (all_tensors(job.out) for job in (whole, cut))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("amp", ["float32", "bfloat16"])
def test_a_model_that_is_not_finite_is_refused(stage: Callable[..., Job], amp: str) -> None:
    job = stage(epochs=4, amp=amp)
    tensors = all_tensors(job.input.path)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, job.input.path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DivergedError, match="starts from is not finite") as caught:
        run(job)
    assert caught.value.hint is not None
    assert "e2e_qp.amp" in caught.value.hint


def test_instructions_make_it_fine_tuning(tiny_llama: Path, pack_model: Callable[..., Path], tmp_path: Path) -> None:
    """From rows to held-out answers: only they count in the loss before and after, and they are learnt."""
    checkpoint = pack_model(tiny_llama, tmp_path / "block-ap", bits=3)
    for file in tiny_llama.glob("tokenizer*"):
        shutil.copy(file, checkpoint)
    rows = [{"instruction": f"{n} times {m}", "input": "", "output": "yes"} for n in range(20) for m in range(10)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    recipe = Recipe.model_validate(
        {
            "model": {"source": str(tiny_llama)},
            "quant": {"bits": 3, "group_size": 16},
            "calibrate": {"data": [{"source": "./not-read.txt"}]},
            "e2e_qp": {
                "data": [{"source": str(tmp_path / "rows.json"), "packing": False}],
                "text_weight": 1,
                "samples": 32,
                "validation_samples": 4,
                "seq_len": 180,
                "batch_size": 8,
                "epochs": 4,
                "lr_scales": 0.2,
                "amp": "float32",
                "gradient_checkpointing": False,
            },
        }
    )
    out = tmp_path / "out"
    out.mkdir()
    source = StageDirectory(checkpoint, {"kind": "quantized"})
    metrics = run(Job(recipe, source, out, tmp_path, RunLog(verbosity=-1), torch.device("cpu")))
    _, held_out = load_windows(out)
    assert held_out.targets == 4 * len("yes.")  # one token for each byte, and the end of the text
    assert json.loads((out / "data.json").read_text())["targets"] == {"train": 32 * 4, "validation": 4 * 4}
    assert metrics["after"] < 0.7 * metrics["before"]
    for path, figure in ((checkpoint, "before"), (out, "after")):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        losses = []
        for tokens, mask in zip(held_out.tokens.long(), held_out.mask, strict=True):
            answer = int(mask.nonzero()[-1]) + 1  # the padding behind it changes nothing
            with torch.no_grad():
                logits = model(input_ids=tokens[None, :answer]).logits[0].double().log_softmax(-1)
            losses += [-float(logits[place - 1, tokens[place]]) for place in range(answer - 4, answer)]
        assert metrics[figure] == pytest.approx(math.fsum(losses) / len(losses), rel=1e-4)


def batches(recipe: Recipe, steps: int) -> list[list[int]]:
    """The windows of the first updates, of 4 each out of 16."""
    trainer: Any = SimpleNamespace(job=SimpleNamespace(recipe=recipe), config=recipe.e2e_qp)
    return [e2e_qp._Trainer._batch(trainer, step, 4, 16).tolist() for step in range(steps)]


def test_every_epoch_and_every_seed_has_an_order_of_its_own(stage: Callable[..., Job]) -> None:
    recipe = stage(batch_size=4).recipe
    first = batches(recipe, 8)
    for epoch in (first[:4], first[4:]):
        assert sorted(itertools.chain(*epoch)) == list(range(16))
    assert first[:4] != first[4:]
    other = recipe.model_copy(update={"calibrate": recipe.calibrate.model_copy(update={"seed": 3})})
    assert recipe.calibrate.seed != 3
    assert batches(other, 4) != first[:4]


def test_the_loss_of_an_update_is_the_mean_over_all_of_its_windows(
    stage: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, update = [], e2e_qp._Trainer._update

    def kept(*arguments: Any) -> float:
        losses.append(update(*arguments))
        return losses[-1]

    monkeypatch.setattr(e2e_qp._Trainer, "_update", kept)
    for size in (4, 1):
        run(stage(f"micro-{size}", micro_batch_size=size))
    half = len(losses) // 2
    assert losses[half:] == pytest.approx(losses[:half], rel=1e-4)


def test_the_loss_of_an_update_is_that_of_its_answers(
    stage: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = stage(samples=4, epochs=1, text_weight=1, micro_batch_size=2)
    train, held_out = load_windows(job.out)
    mask = torch.zeros(4, SEQ_LEN, dtype=torch.bool)
    mask[0, 5:], mask[2, 1:3] = True, True
    save_windows(job.out, WindowSet(train.tokens, held_out.tokens, mask, held_out.mask, "", {}))
    losses, update = [], e2e_qp._Trainer._update

    def kept(*arguments: Any) -> float:
        losses.append(update(*arguments))
        return losses[-1]

    monkeypatch.setattr(e2e_qp._Trainer, "_update", kept)
    run(job)
    model = AutoModelForCausalLM.from_pretrained(job.input.path, dtype=torch.float32).eval()
    assert losses == pytest.approx([held_out_loss(model, Windows(train.tokens, mask), None, 1)], rel=1e-4)


def test_the_configuration_says_that_scales_are_fp32_again(stage: Callable[..., Job]) -> None:
    job = stage(epochs=0)
    assert job.input is not None
    file = job.input.path / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["scale_dtype"] = "float16"
    file.write_text(json.dumps(config))
    run(job)
    assert json.loads((job.out / "config.json").read_text())["quantization_config"]["scale_dtype"] == "float32"


def test_validation_drops_nothing_out(stage: Callable[..., Job]) -> None:
    plain, dropping = (stage(name, gradient_checkpointing=True) for name in ("plain", "dropping"))
    before = run(plain)["before"]
    assert dropping.input is not None
    file = dropping.input.path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "attention_dropout": 0.5}))
    assert run(dropping)["before"] == pytest.approx(before, rel=1e-5)


def test_windows_are_not_those_of_the_calibration(stage: Callable[..., Job], monkeypatch: pytest.MonkeyPatch) -> None:
    job, asked = stage(), []
    (job.out / e2e_qp.WINDOWS).unlink()

    def sample(*_: Any, **options: Any) -> None:
        asked.append(options.get("purpose"))
        raise KeyboardInterrupt

    monkeypatch.setattr(e2e_qp, "load_tokenizer", lambda *_, **__: None)
    monkeypatch.setattr(e2e_qp, "sample_windows", sample)
    with pytest.raises(KeyboardInterrupt):
        run(job)
    assert asked == ["e2e-qp"]
