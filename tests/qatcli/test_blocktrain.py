"""Training a block: it learns, never ends worse than it began, and survives what is not finite."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qatcli.blocktrain import (
    BlockResult,
    Objective,
    Windows,
    build_student,
    export_students,
    input_hessians,
    output_error,
    train_block,
    validation_loss,
)
from qatcli.grid import ZeroPoints, initial_grid
from qatcli.linear import FakeQuantLinear
from qatcli.packed import ModuleQuant
from qatcli.recipe import BlockApSection
from qatcli.stepper import Stepper

CPU = torch.device("cpu")
HIDDEN, INNER, TOKENS = 32, 64, 6
PREFIX = "model.layers.0"
READERS = torch.linspace(0.1, 3, 2 * HIDDEN).view(2, HIDDEN)  # of two linears behind the block


class Block(nn.Module):
    """A normed two-layer perceptron with a residual: what a decoder block is without attention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(HIDDEN)
        self.up = nn.Linear(HIDDEN, INNER)
        self.down = nn.Linear(INNER, HIDDEN, bias=False)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return x + scale * self.down(F.silu(self.up(self.norm(x))))


def make_windows(count: int, teacher: nn.Module) -> Windows:
    inputs = torch.randn(count, TOKENS, HIDDEN)
    with torch.no_grad():
        return Windows(inputs, teacher(inputs))


def error(output: Tensor, target: Tensor, kind: str = "downstream") -> float:
    """The loss of an output, by its definition."""
    squares, powers = (output - target).square(), target.square()
    if kind == "mse":
        return float(squares.mean())
    readers = READERS if kind == "downstream" else torch.ones_like(READERS)
    return float(((squares @ readers.T) / (powers @ readers.T)).mean())


class Setting:
    """A student rounded to few bits, and what it learns from."""

    def __init__(self, *, zero_points: ZeroPoints = "any", bits: int = 2) -> None:
        torch.manual_seed(3)
        self.block = Block()
        self.train = make_windows(16, self.block)
        self.held_out = make_windows(6, self.block)
        self.zero_points = zero_points
        self.following: tuple[nn.Module, dict[str, Any]] | None = None
        quants = {
            f"{PREFIX}.up": ModuleQuant(bits, 16, HIDDEN, INNER),
            f"{PREFIX}.down": ModuleQuant(bits, 16, INNER, HIDDEN),
        }
        grids = {}
        for name in quants:
            weight = self.block.get_submodule(name.removeprefix(PREFIX + ".")).weight
            grids[name] = initial_grid(weight, bits=bits, group_size=16, zero_points=zero_points, method="mse")
        self.students = build_student(self.block, PREFIX, quants, grids, zero_points=zero_points, hessians=None)

    def run(self, *, seed: int = 0, **config: Any) -> BlockResult:
        settings = {"epochs": 3, "batch_size": 4, "amp": "float32", **config}
        return train_block(
            self.objective(settings.get("loss", "downstream")),
            self.students,
            self.train,
            self.held_out,
            BlockApSection(**settings),
            zero_points=self.zero_points,
            generator=torch.Generator().manual_seed(seed),
            device=CPU,
        )

    def objective(self, kind: str = "downstream") -> Objective:
        return Objective(self.block, {}, [output_error(kind, READERS)] * 2, self.following)

    def loss(self, kind: str = "downstream") -> float:
        """The loss on held-out windows, measured here."""
        with torch.no_grad():
            output = self.block(self.held_out.inputs)
        return error(output, self.held_out.targets, kind)

    def state(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.block.state_dict().items()}


@pytest.mark.parametrize("kind", ["downstream", "relative", "mse"])
@pytest.mark.parametrize("zero_points", ["any", "central", "middle"])
def test_training_lowers_the_loss(kind: str, zero_points: ZeroPoints) -> None:
    setting = Setting(zero_points=zero_points)
    start = setting.loss(kind)
    result = setting.run(loss=kind, epochs=6)
    assert result.before == pytest.approx(start, rel=1e-4)
    assert result.after == pytest.approx(setting.loss(kind), rel=1e-4)
    assert result.after < 0.8 * result.before
    assert len(result.epochs) == len(result.validation) == 6
    assert result.epochs[-1] < result.epochs[0]
    assert result.backoffs == 0


def test_looking_ahead_lowers_the_error_after_the_next_block() -> None:
    """Half of the loss is the error after the next block, whose weights stay as they are."""
    after_next = {}
    for ahead in (False, True):
        setting = Setting()
        following = Block().requires_grad_(False)
        following.norm.weight[: HIDDEN // 2] = 0
        arguments = {"scale": 8.0}
        windows = {}
        for name in ("train", "held_out"):
            given: Windows = getattr(setting, name)
            windows[name] = Windows(given.inputs, given.targets, following(given.targets, **arguments))
        if ahead:
            setting.train, setting.held_out = windows["train"], windows["held_out"]
            setting.following = following, arguments
        frozen = {name: tensor.clone() for name, tensor in following.state_dict().items()}
        result = setting.run(epochs=6, loss="relative")
        assert all(torch.equal(tensor, frozen[name]) for name, tensor in following.state_dict().items())
        assert all(parameter.grad is None for parameter in following.parameters())
        with torch.no_grad():
            output = setting.block(setting.held_out.inputs)
            later, target = following(output, **arguments), windows["held_out"].following
            assert target is not None
            after_next[ahead] = error(later, target, "relative")
            own = error(output, setting.held_out.targets, "relative")
        expected = (own + after_next[ahead]) / 2 if ahead else own
        assert result.after == pytest.approx(expected, rel=1e-4)
    assert after_next[True] < after_next[False]


def test_what_is_exported_is_what_was_trained() -> None:
    setting = Setting()
    setting.run()
    trained = setting.loss()
    exported = export_students(setting.students)
    assert set(exported) == {f"{PREFIX}.up", f"{PREFIX}.down"}
    for name, linear in exported.items():
        dense = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
        dense.weight.data = linear.dequantize()
        if linear.bias is not None:
            dense.bias.data = linear.bias
        setattr(setting.block, name.removeprefix(PREFIX + "."), dense)
    assert setting.loss() == pytest.approx(trained, rel=1e-5)


@pytest.mark.parametrize("units", [{}, {"lr_units": "absolute", "lr_weights": 0.1, "lr_scales": 0.1}])
def test_an_absurd_rate_never_leaves_a_block_worse_than_it_began(units: dict[str, Any]) -> None:
    setting = Setting()
    absurd = {"lr_weights": 1e4, "lr_scales": 1e4, "lr_norms": 1e4, "lr_zero_points": 1e3, **units}
    if units:
        absurd |= {"lr_norms": 0.1, "lr_zero_points": 0.1}
    start = setting.loss()
    result = setting.run(**absurd)
    assert max(result.validation, default=float("inf")) > start, "the rate is absurd"
    assert setting.loss() <= start * (1 + 1e-6)
    assert result.after <= result.before


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("units", ["reach", "absolute"])
def test_every_rate_is_that_of_the_recipe_at_every_update(
    monkeypatch: pytest.MonkeyPatch, bits: int, units: str
) -> None:
    """A reach is what rates add up to: in steps for weights, in steps of the outermost level for scales, as a fraction
    for norms. They fall along a cosine to a twentieth."""
    rates: dict[int, list[float]] = {}
    begin = Stepper.begin

    def kept(stepper: Stepper, step: int) -> None:
        begin(stepper, step)
        for group in stepper.optimizer.param_groups:
            rates.setdefault(id(group["params"][0]), []).append(group["lr"])
        assert {group["betas"] for group in stepper.optimizer.param_groups} == {(0.9, 0.999)}
        assert {group["weight_decay"] for group in stepper.optimizer.param_groups} == {0.0}

    monkeypatch.setattr(Stepper, "begin", kept)
    setting = Setting(bits=bits)
    norm = setting.block.norm.weight
    expected = {id(norm): (0.1, float(norm.detach().mean()))}  # rate and natural step
    for student in setting.students.values():
        step = float(student.scale.detach().mean())
        expected[id(student.weight)] = 0.5, step
        expected[id(student.scale)] = 0.3, step / 2 ** (bits - 1)
        expected[id(student.zero_point)] = 0.2, 1.0
    asked = {"lr_weights": 0.5, "lr_scales": 0.3, "lr_zero_points": 0.2, "lr_norms": 0.1}
    setting.run(epochs=2, lr_units=units, min_lr_factor=20, **asked)
    falling = [0.05 + 0.95 * (1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)]
    assert rates.keys() == expected.keys()
    for name, (rate, unit) in expected.items():
        peak = rate * unit / sum(falling) if units == "reach" else rate
        assert rates[name] == pytest.approx([peak * factor for factor in falling], rel=1e-5)


def test_without_keep_best_the_last_iterate_stays() -> None:
    setting = Setting()
    result = setting.run(keep_best=False, lr_weights=30.0, lr_scales=30.0)
    assert result.after == result.validation[-1]
    assert result.after == pytest.approx(setting.loss(), rel=1e-4)
    assert result.after > result.before


def test_the_best_epoch_is_kept_not_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting()
    losses, states = [5.0, 4.0, 1.0, 3.0, 2.0], []

    def scripted(*_: object) -> float:
        states.append(setting.state())
        return losses[len(states) - 1]

    monkeypatch.setattr("qatcli.blocktrain.validation_loss", scripted)
    result = setting.run(epochs=4)
    assert (result.before, result.validation, result.after) == (5.0, [4.0, 1.0, 3.0, 2.0], 1.0)
    assert all(torch.equal(tensor, states[2][name]) for name, tensor in setting.state().items())
    assert not torch.equal(states[2]["up.weight"], states[4]["up.weight"])


@pytest.fixture(params=[0, 1])
def lag(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Verdicts over updates are read at once, or one update late as on a GPU."""
    monkeypatch.setattr("qatcli.blocktrain.Stepper", partial(Stepper, lag=request.param))
    return request.param


@pytest.mark.usefixtures("lag")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_window_that_is_not_finite_is_left_behind(bad: float) -> None:
    setting = Setting()
    setting.train.targets[5, 2, 7] = bad
    result = setting.run(epochs=2)
    assert result.backoffs == 2, "once in each epoch"
    assert result.after <= result.before
    assert all(bool(torch.isfinite(tensor).all()) for tensor in setting.state().values())
    assert setting.loss() == pytest.approx(result.after, rel=1e-4)


@pytest.mark.usefixtures("lag")
def test_after_three_failures_the_block_stays_at_its_best() -> None:
    setting = Setting()
    setting.train.inputs[:] = float("nan")
    before = setting.state()
    result = setting.run(epochs=4)
    assert result.backoffs == 3
    assert result.after == result.before
    assert all(torch.equal(tensor, before[name]) for name, tensor in setting.state().items())


def test_a_failure_halves_the_rate() -> None:
    """The windows after the bad one are trained with half the rate: less far from the start than without it."""
    distances = []
    for bad in (False, True):
        setting = Setting()
        start = setting.students[f"{PREFIX}.up"].weight.detach().clone()
        if bad:
            setting.train.targets[0] = float("nan")  # the first window: the rest of the epoch is trained
        setting.run(epochs=1, shuffle=False, keep_best=False, lr_weights=0.5)
        distances.append(float((setting.students[f"{PREFIX}.up"].weight.detach() - start).abs().mean()))
    assert 0 < distances[1] < 0.6 * distances[0]


@pytest.mark.slow
def test_a_compiled_block_trains_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the tracer and the automatic differentiation of torch.compile; its code generator is not ours to test."""
    graphs: list[str] = []

    def backend(module: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(module.print_readable(print_output=False))
        return module

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: real(function, backend=backend, **options))
    results = []
    for choice in (None, True):
        setting = Setting()
        results.append(setting.run(compile=choice))
        assert bool(graphs) == (choice is True), "by itself nothing is compiled on a CPU"
    assert any("qat_kernels.fake_quant" in graph for graph in graphs), "one node of the graph, whatever serves it"
    assert results[1].validation == pytest.approx(results[0].validation, rel=1e-5)


@pytest.mark.slow
def test_no_kind_of_block_comes_too_late_to_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten sizes of batches stand for ten kinds of blocks: what is compiled must not depend on what was before."""
    calls = 0

    def backend(module: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        def run(*inputs: Tensor) -> Any:
            nonlocal calls
            calls += 1
            return module.forward(*inputs)

        return run

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: real(function, backend=backend, **options))
    torch._dynamo.reset()
    for size in range(1, 11):
        calls = 0
        setting = Setting()
        setting.train = Windows(*(stream[:size] for stream in setting.train.streams))
        setting.run(epochs=1, batch_size=size, compile=True)
        assert calls == 1, size
    torch._dynamo.reset()


def test_reading_verdicts_late_changes_no_bit() -> None:
    states = []
    for late in (0, 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("qatcli.blocktrain.Stepper", partial(Stepper, lag=late))
            setting = Setting()
            setting.run()
        states.append(setting.state())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_the_same_seed_gives_the_same_bits_and_another_does_not() -> None:
    states, results = [], []
    for seed in (7, 7, 8):
        setting = Setting()
        results.append(setting.run(seed=seed, keep_best=False))
        states.append(setting.state())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    assert results[0] == results[1]
    assert any(not torch.equal(tensor, states[2][name]) for name, tensor in states[0].items())


def test_without_shuffling_the_seed_does_not_matter() -> None:
    states = []
    for seed in (7, 8):
        setting = Setting()
        setting.run(seed=seed, shuffle=False, keep_best=False)
        states.append(setting.state())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


@pytest.mark.parametrize(
    ("key", "part"),
    [
        ("lr_weights", "up.weight"),
        ("lr_scales", "up.scale"),
        ("lr_zero_points", "up.zero_point"),
        ("lr_norms", "norm.weight"),
    ],
)
def test_each_rate_moves_its_own_parameters(key: str, part: str) -> None:
    setting = Setting()
    before = setting.state()
    rates = {"lr_weights": 0.0, "lr_scales": 0.0, "lr_zero_points": 0.0, "lr_norms": 0.0, key: 0.5}
    setting.run(epochs=1, keep_best=False, **rates)
    moved = {name for name, tensor in setting.state().items() if not torch.equal(tensor, before[name])}
    assert moved == ({part} if part == "norm.weight" else {part, part.replace("up", "down")})


def test_zero_points_of_a_symmetric_grid_do_not_move() -> None:
    setting = Setting(zero_points="middle")
    setting.run(keep_best=False, lr_zero_points=5.0)
    assert all(bool((student.zero_point == 2).all()) for student in setting.students.values())


def test_a_linear_that_is_not_quantized_does_not_train() -> None:
    setting = Setting()
    skipped = setting.students.pop(f"{PREFIX}.down")
    setting.block.down = nn.Linear(INNER, HIDDEN, bias=False)
    with torch.no_grad():
        setting.block.down.weight.copy_(skipped.weight)
    before = setting.state()
    setting.run(keep_best=False)
    moved = {name for name, tensor in setting.state().items() if not torch.equal(tensor, before[name])}
    assert moved == {"up.weight", "up.scale", "norm.weight"}


@pytest.mark.parametrize("config", [{"epochs": 0}, dict.fromkeys(("lr_weights", "lr_scales", "lr_norms"), 0.0)])
def test_without_epochs_or_rates_a_block_is_measured_and_not_changed(config: dict[str, Any]) -> None:
    setting = Setting()
    before = setting.state()
    result = setting.run(**config)
    assert result.before == result.after == pytest.approx(setting.loss(), rel=1e-4)
    assert result.epochs == []
    assert all(torch.equal(tensor, before[name]) for name, tensor in setting.state().items())


# The loss.


@pytest.mark.parametrize("batch_size", [1, 4, 6])
def test_validation_is_the_mean_over_windows_whatever_the_batch(batch_size: int) -> None:
    setting = Setting()
    loss = validation_loss(setting.objective(), setting.held_out, batch_size, CPU)
    assert loss == pytest.approx(setting.loss(), rel=1e-5)


# The start.


def test_the_student_starts_rounded_to_its_grid() -> None:
    torch.manual_seed(3)
    teacher = Block()
    setting = Setting()
    student = setting.students[f"{PREFIX}.up"]
    assert isinstance(setting.block.up, FakeQuantLinear)
    assert setting.block.up is student
    assert torch.equal(student.weight, teacher.up.weight)
    assert torch.equal(student.bias, teacher.up.bias)
    codes = student.export()
    torch.testing.assert_close(codes.dequantize(), (student(torch.eye(HIDDEN)) - student.bias).T, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hessians_are_sums_over_tokens_of_what_each_linear_receives(dtype: torch.dtype) -> None:
    block = Block()
    inputs = torch.randn(5, TOKENS, HIDDEN).to(dtype)
    names = [f"{PREFIX}.up", f"{PREFIX}.down"]
    hessians = input_hessians(block, PREFIX, names, inputs, {"scale": 0.5}, CPU)
    with torch.no_grad():
        normed = block.norm(inputs.float())
        inner = F.silu(block.up(normed))
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    for name, x in zip(names, (normed, inner), strict=True):
        rows = x.reshape(-1, x.shape[-1]).double()
        expected = rows.T @ rows
        assert hessians[name].dtype == torch.float32
        assert float((hessians[name] - expected).norm() / expected.norm()) < tolerance
    output = block(inputs[:1].float())
    assert output.shape == (1, TOKENS, HIDDEN), "the hooks are gone and the block still runs"


def test_shared_inputs_are_counted_once_for_each_linear() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.q(x) + self.k(x) + self.k(2 * x)

    inputs = torch.randn(3, 4, 8)
    hessians = input_hessians(Attention(), "a", ["a.q", "a.k"], inputs, {}, CPU)
    rows = inputs.reshape(-1, 8)
    torch.testing.assert_close(hessians["a.q"], rows.T @ rows)
    torch.testing.assert_close(hessians["a.k"], 5 * rows.T @ rows)


def test_error_feedback_starts_closer_than_rounding_to_nearest() -> None:
    losses = []
    for feedback in (False, True):
        torch.manual_seed(3)
        block = Block()
        mixing = torch.randn(HIDDEN, HIDDEN) @ torch.diag(torch.exp(torch.randn(HIDDEN)))
        inputs = torch.randn(24, TOKENS, HIDDEN) @ mixing
        windows = Windows(inputs, block(inputs).detach())
        quants = {f"{PREFIX}.up": ModuleQuant(2, 16, HIDDEN, INNER)}
        grids = {f"{PREFIX}.up": initial_grid(block.up.weight, bits=2, group_size=16, zero_points="any", method="mse")}
        hessians = input_hessians(block, PREFIX, list(quants), inputs, {}, CPU) if feedback else None
        build_student(block, PREFIX, quants, grids, zero_points="any", hessians=hessians)
        losses.append(validation_loss(Objective(block, {}, [output_error("mse", READERS)]), windows, 8, CPU))
    assert losses[1] < 0.9 * losses[0]


def test_without_keep_best_a_last_iterate_that_is_not_finite_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([1.0, 0.5, float("nan")])
    monkeypatch.setattr("qatcli.blocktrain.validation_loss", lambda *_: next(losses))
    assert Setting().run(epochs=2, keep_best=False).after == 0.5
