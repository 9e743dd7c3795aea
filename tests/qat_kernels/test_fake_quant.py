"""fake_quant against the autograd expression of EfficientQAT's UniformAffineQuantizer, forwards and backwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import qat_kernels
from qat_kernels import reference

BothBackends = Callable[[Callable[[], Any]], tuple[Any, Any]]

SHAPES = [(1, 64, 64), (1, 8, -1), (5, 96, 32), (3, 100, -1), (40, 24, 24), (3, 192, 96), (2, 2100, -1)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}  # relative to the largest element


def straight_through(value: Tensor, x: Tensor) -> Tensor:
    """value with the gradient of x. The usual (value - x).detach() + x would round value."""
    return value.detach() + (x - x.detach())


def round_ste(x: Tensor) -> Tensor:
    return straight_through(x.round(), x)


def clamp_ste(x: Tensor, low: float, high: float) -> Tensor:
    return straight_through(x.clamp(low, high), x)


def expected_fake_quant(weight: Tensor, scale: Tensor, zero_point: Tensor, bits: int, group_size: int) -> Tensor:
    group_size = weight.shape[1] if group_size == -1 else group_size
    qmax = 2**bits - 1
    s = clamp_ste(scale.float(), 1e-4, 1e4).reshape(-1, 1)
    z = clamp_ste(round_ste(zero_point.float()), 0, qmax).reshape(-1, 1)
    codes = (round_ste(weight.float().reshape(-1, group_size) / s) + z).clamp(0, qmax)
    return ((codes - z) * s).reshape(weight.shape)


def make_inputs(shape: tuple[int, int, int], bits: int, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """weight in dtype, scale and zero_point in fp32; many codes are clipped, some zero points are out of range."""
    rows, columns, group_size = shape
    groups = 1 if group_size == -1 else columns // group_size
    weight = torch.randn(rows, columns).to(dtype)
    scale = torch.rand(rows, groups) * 4 / 2**bits + 0.01
    zero_point = torch.rand(rows, groups) * (2**bits + 1) - 1
    return [t.to(device).requires_grad_() for t in (weight, scale, zero_point)]


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.dtype == expected.dtype
    largest = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * max(largest, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_forward_and_gradients(
    backend: str, device: str, rounds_to_bf16: bool, bits: int, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    inputs = make_inputs(shape, bits, dtype, device)
    grad_out = torch.randn(shape[:2], device=device).to(dtype)

    actual = qat_kernels.fake_quant(*inputs, bits=bits, group_size=shape[2])
    gradients = torch.autograd.grad(actual, inputs, grad_out)
    expected = expected_fake_quant(*inputs, bits, shape[2])
    expected_gradients = torch.autograd.grad(expected, inputs, grad_out.float())

    if dtype != torch.bfloat16 or rounds_to_bf16:
        assert torch.equal(actual, expected.to(dtype))
    else:
        assert_close(actual, expected.to(dtype), TOLERANCE[dtype])
    assert_close(gradients[0], expected_gradients[0], TOLERANCE[dtype])
    assert_close(gradients[1], expected_gradients[1], TOLERANCE[torch.float32])
    assert_close(gradients[2], expected_gradients[2], TOLERANCE[torch.float32])


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
def test_out_dtype_is_that_of_the_result_and_of_the_incoming_gradient(
    backend: str, device: str, out_dtype: torch.dtype
) -> None:
    inputs = make_inputs((5, 96, 32), 2, torch.float32, device)
    grad_out = torch.randn(5, 96, device=device).to(out_dtype)
    actual = qat_kernels.fake_quant(*inputs, bits=2, group_size=32, out_dtype=out_dtype)
    gradients = torch.autograd.grad(actual, inputs, grad_out)
    expected = expected_fake_quant(*inputs, 2, 32)
    expected_gradients = torch.autograd.grad(expected, inputs, grad_out.float())
    assert_close(actual, expected.to(out_dtype), TOLERANCE[out_dtype])
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert_close(gradient, expected_gradient, TOLERANCE[torch.float32])


def test_gradients_have_the_dtypes_of_their_tensors(backend: str, device: str) -> None:
    weight, scale, zero_point = make_inputs((4, 64, 32), 4, torch.float16, device)
    scale = scale.detach().to(torch.bfloat16).requires_grad_()
    qat_kernels.fake_quant(weight, scale, zero_point, bits=4, group_size=32).sum().backward()
    grads = [t.grad for t in (weight, scale, zero_point)]
    assert [None if grad is None else grad.dtype for grad in grads] == [torch.float16, torch.bfloat16, torch.float32]


def test_scale_and_zero_point_outside_their_range_get_straight_through_gradients(backend: str, device: str) -> None:
    weight = torch.tensor([[0.5, -0.25, 3e4, 1.0]] * 3, device=device, requires_grad=True)
    scale = torch.tensor([[1e-6], [-1.0], [3e4]], device=device, requires_grad=True)
    zero_point = torch.tensor([[-7.0], [99.0], [1.5]], device=device, requires_grad=True)
    inputs = [weight, scale, zero_point]
    grad_out = torch.tensor([[1.0, -2.0, 0.5, 4.0]] * 3, device=device)
    actual = qat_kernels.fake_quant(*inputs, bits=2, group_size=-1)
    expected = expected_fake_quant(*inputs, 2, -1)
    assert torch.equal(actual, expected)
    gradients = torch.autograd.grad(actual, inputs, grad_out)
    for gradient, expected_gradient in zip(gradients, torch.autograd.grad(expected, inputs, grad_out), strict=True):
        torch.testing.assert_close(gradient, expected_gradient)
    assert gradients[1].abs().min() > 0


def test_constant_grid_of_integers_and_strided_tensors(backend: str, device: str) -> None:
    weight = torch.randn(64, 6, device=device).t().requires_grad_()
    scale = (torch.rand(2, 6, device=device) + 0.1).t()
    zero_point = torch.randint(0, 16, (6, 2), dtype=torch.uint8, device=device)
    actual = qat_kernels.fake_quant(weight, scale, zero_point, bits=4, group_size=32)
    expected = expected_fake_quant(weight, scale, zero_point, 4, 32)
    assert torch.equal(actual, expected)
    grad_out = torch.ones((), device=device).expand(6, 64)
    assert_close(
        torch.autograd.grad(actual, weight, grad_out)[0],
        torch.autograd.grad(expected, weight, grad_out)[0],
        TOLERANCE[torch.float32],
    )


def test_what_is_not_a_number_stays_so(backend: str, device: str) -> None:
    """A minimum and a maximum that drop a NaN would hide a diverged weight behind a code."""
    weight = torch.ones(2, 64, device=device)
    weight[0, 40] = torch.nan
    scale = torch.ones(2, 2, device=device)
    scale[1, 0] = torch.nan
    result = qat_kernels.fake_quant(weight, scale, torch.zeros(2, 2, device=device), bits=4, group_size=32)
    wrong = torch.zeros(2, 64, dtype=torch.bool, device=device)
    wrong[0, 40] = wrong[1, :32] = True
    assert torch.equal(result.isnan(), wrong)


def test_a_gradient_that_is_not_finite_is_not_hidden_by_the_clamp(backend: str, device: str) -> None:
    """Else an update of fp16 whose gradients overflowed would be taken."""
    weight = torch.full((1, 64), 100.0, device=device, requires_grad=True)  # every weight beyond the grid
    scale, zero_point = torch.ones(1, 1, device=device), torch.zeros(1, 1, device=device)
    out = qat_kernels.fake_quant(weight, scale.requires_grad_(), zero_point.requires_grad_(), bits=2, group_size=-1)
    grad_out = torch.zeros(1, 64, device=device)
    grad_out[0, 3] = torch.inf
    d_weight, d_scale, d_zero = torch.autograd.grad(out, [weight, scale, zero_point], grad_out)
    assert not bool(torch.isfinite(d_weight[0, 3]))
    assert not bool(torch.isfinite(d_scale).any() or torch.isfinite(d_zero).any())


def test_saves_its_inputs_and_nothing_else(backend: str, device: str) -> None:
    inputs = make_inputs((4, 64, 32), 2, torch.float32, device)
    saved: list[int] = []

    def remember(tensor: Tensor) -> Tensor:
        saved.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        qat_kernels.fake_quant(*inputs, bits=2, group_size=32)
    assert sorted(saved) == sorted(t.data_ptr() for t in inputs)


def test_two_runs_are_equal(backend: str, device: str) -> None:
    def run() -> list[Tensor]:
        torch.manual_seed(1)
        inputs = make_inputs((7, 192, 64), 3, torch.float32, device)
        out = qat_kernels.fake_quant(*inputs, bits=3, group_size=64)
        return [out, *torch.autograd.grad(out, inputs, torch.randn(7, 192).to(device))]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_blocks_of_rows_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> list[Tensor]:
        torch.manual_seed(1)
        inputs = make_inputs((7, 192, 64), 3, torch.bfloat16)
        out = qat_kernels.fake_quant(*inputs, bits=3, group_size=64)
        return [out, *torch.autograd.grad(out, inputs, torch.randn(7, 192).bfloat16())]

    monkeypatch.setenv("QAT_KERNELS", "reference")
    whole = run()
    monkeypatch.setattr(reference, "BLOCK_ELEMENTS_CPU", 2 * 192)  # 4 blocks of which the last is shorter
    assert all(torch.equal(a, b) for a, b in zip(whole, run(), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, r"bits must be one of \(2, 3, 4, 8\). Got: 5"),
        ({"group_size": 48}, "divide in_features = 64. Got: 48"),
        ({"group_size": 0}, "divide in_features = 64. Got: 0"),
        ({"scale": torch.ones(4, 1)}, r"scale must have shape \(4, 2\). Got: \(4, 1\)"),
        ({"zero_point": torch.ones(2, 4)}, r"zero_point must have shape \(4, 2\). Got: \(2, 4\)"),
        ({"scale": torch.ones(4, 2, dtype=torch.int32)}, "scale must be .* Got: torch.int32"),
        ({"weight": torch.ones(4, 64, dtype=torch.float64)}, "weight must be .* Got: torch.float64"),
        ({"weight": torch.ones(4, 8, 8)}, r"weight must have 2 dimensions. Got: shape \(4, 8, 8\)"),
        ({"weight": torch.ones(0, 64)}, r"weight must not be empty. Got: shape \(0, 64\)"),
        ({"out_dtype": torch.int8}, "out_dtype must be .* Got: torch.int8"),
        ({"scale": torch.ones(4, 2, device="meta")}, "one device. Got: weight on cpu, scale on meta"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "weight": torch.ones(4, 64),
        "scale": torch.ones(4, 2),
        "zero_point": torch.ones(4, 2),
        "bits": 2,
        "group_size": 32,
    }
    with pytest.raises(ValueError, match=message):
        qat_kernels.fake_quant(**{**arguments, **change})


@pytest.mark.gpu
@pytest.mark.parametrize("group_size", [64, 128, -1])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_real_size(both_backends: BothBackends, bits: int, group_size: int) -> None:
    inputs = make_inputs((4096, 11008, group_size), bits, torch.float32, "cuda")
    grad_out = torch.randn(4096, 11008, device="cuda")

    def run() -> list[Tensor]:
        out = qat_kernels.fake_quant(*inputs, bits=bits, group_size=group_size)
        return [out, *torch.autograd.grad(out, inputs, grad_out)]

    expected, actual = both_backends(run)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])
    assert_close(actual[2], expected[2], 1e-4)
    assert_close(actual[3], expected[3], 1e-4)
