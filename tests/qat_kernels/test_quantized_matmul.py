"""quantized_matmul against a dense linear layer, forwards and backwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

import qat_kernels

BothBackends = Callable[[Callable[[], Any]], tuple[Any, Any]]

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}  # relative to the largest element


class Layer:
    """Packed weight tensors, and the dense weight they stand for as an autograd expression of the scale."""

    def __init__(self, shape: tuple[int, int, int], bits: int, device: str) -> None:
        self.rows, self.columns, self.group_size = shape
        groups = 1 if self.group_size == -1 else self.columns // self.group_size
        self.bits = bits
        self.codes = torch.randint(0, 2**bits, (self.rows, self.columns), dtype=torch.uint8, device=device)
        self.packed = qat_kernels.pack(self.codes, bits=bits)
        self.scale = ((torch.rand(self.rows, groups, device=device) + 0.5) / 2**bits).requires_grad_()
        self.zero_point = torch.randint(0, 2**bits, (self.rows, groups), dtype=torch.uint8, device=device)

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        weight = (self.packed, self.scale, self.zero_point)
        return qat_kernels.quantized_matmul(x, *weight, bits=self.bits, group_size=self.group_size, bias=bias)

    def dense(self) -> Tensor:
        steps = self.codes.view(*self.scale.shape, -1).float() - self.zero_point.unsqueeze(-1)
        return (steps * self.scale.unsqueeze(-1)).view(self.rows, self.columns)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    largest = expected.abs().max().item()
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 32, 32), (6, 96, 32), (5, 100, -1)], ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_output_and_gradients(
    backend: str, device: str, bits: int, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    layer = Layer(shape, bits, device)
    x = torch.randn(2, 7, shape[1], device=device).to(dtype).requires_grad_()
    bias = torch.randn(shape[0], device=device, requires_grad=True)
    grad_out = torch.randn(2, 7, shape[0], device=device).to(dtype)
    inputs = [x, layer.scale, bias]

    actual = layer(x, bias)
    expected = linear(x.float(), layer.dense(), bias)
    gradients = torch.autograd.grad(actual, inputs, grad_out)
    expected_gradients = torch.autograd.grad(expected, inputs, grad_out.float())

    assert actual.dtype == dtype
    assert_close(actual, expected, TOLERANCE[dtype])
    for gradient, expected_gradient, tensor in zip(gradients, expected_gradients, inputs, strict=True):
        assert gradient.dtype == tensor.dtype
        assert_close(gradient, expected_gradient, TOLERANCE[dtype])


@pytest.mark.parametrize("batch", [(), (0,), (1,), (2, 1, 3)], ids=str)
def test_any_number_of_leading_dimensions(backend: str, device: str, batch: tuple[int, ...]) -> None:
    layer = Layer((6, 96, 32), 3, device)
    x = torch.randn(*batch, 96, device=device, requires_grad=True)
    y = layer(x)
    assert y.shape == (*batch, 6)
    gradients = torch.autograd.grad(y.sum(), [x, layer.scale])
    expected = torch.autograd.grad(linear(x, layer.dense()).sum(), [x, layer.scale])
    for gradient, expected_gradient in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-4)


def test_autocast_casts_x_as_a_linear_layer_does(backend: str, device: str) -> None:
    layer = Layer((6, 96, 32), 2, device)
    x = torch.randn(4, 96, device=device, requires_grad=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = layer(x)
        gradients = torch.autograd.grad(y.float().square().sum(), [x, layer.scale])
    assert y.dtype == torch.bfloat16
    assert [gradient.dtype for gradient in gradients] == [torch.float32, torch.float32]
    expected = linear(x, layer.dense())
    assert_close(y, expected, TOLERANCE[torch.bfloat16])
    for gradient, exact in zip(gradients, torch.autograd.grad(expected.square().sum(), [x, layer.scale]), strict=True):
        assert_close(gradient, exact, TOLERANCE[torch.bfloat16])


def test_a_backward_pass_under_autocast_keeps_the_dtype_of_the_forward_pass(backend: str, device: str) -> None:
    layer = Layer((6, 96, 32), 2, device)
    x = torch.randn(4, 96, device=device, requires_grad=True)
    loss = layer(x).square().sum()
    expected = torch.autograd.grad(loss, [x, layer.scale], retain_graph=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        gradients = torch.autograd.grad(loss, [x, layer.scale])
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(backend: str, device: str, use_reentrant: bool) -> None:
    layer = Layer((6, 96, 32), 2, device)
    x = torch.randn(4, 96, device=device, requires_grad=True)

    def gradients(y: Tensor) -> list[Tensor | None]:
        x.grad = layer.scale.grad = None
        y.square().sum().backward()
        return [x.grad, layer.scale.grad]

    plain = gradients(layer(x))
    recomputed = gradients(checkpoint(layer, x, use_reentrant=use_reentrant))
    assert all(a is not None and b is not None and torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


@pytest.mark.parametrize("train_scale", [True, False])
def test_keeps_no_dense_weight_and_only_what_the_backward_pass_needs(
    backend: str, device: str, train_scale: bool
) -> None:
    layer = Layer((6, 96, 32), 2, device)
    layer.scale.requires_grad_(train_scale)
    x = torch.randn(4, 96, device=device, requires_grad=True)
    saved: list[int] = []

    def remember(tensor: Tensor) -> Tensor:
        saved.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        layer(x)
    kept = [layer.packed, layer.scale, layer.zero_point, *([x] if train_scale else [])]
    assert sorted(saved) == sorted(t.data_ptr() for t in kept)


def test_two_runs_are_equal(backend: str, device: str) -> None:
    layer = Layer((6, 96, 32), 3, device)
    x = torch.randn(4, 96, device=device, requires_grad=True)

    def run() -> list[Tensor]:
        y = layer(x)
        return [y, *torch.autograd.grad(y.square().sum(), [x, layer.scale])]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 32)}, "packed must have 2 words per row for 32 values of 2 bits. Got: 4"),
        (
            {"x": torch.ones(2, 64, dtype=torch.int64)},
            r"x must be a floating-point tensor .* Got: torch.int64 \(2, 64\)",
        ),
        ({"bias": torch.ones(4)}, r"bias must have shape \(3,\). Got: \(4,\)"),
        ({"scale": torch.ones(3, 4)}, r"scale must have shape \(3, 2\). Got: \(3, 4\)"),
        (
            {"prepared": torch.zeros(3, 16, dtype=torch.int32)},  # of 8 bits
            r"prepared must have shape \(3, 4\). Got: \(3, 16\)",
        ),
        ({"prepared": torch.zeros(3, 4)}, r"prepared must be torch.int32. Got: torch.float32"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "x": torch.ones(2, 64),
        "packed": torch.zeros(3, 4, dtype=torch.int32),
        "scale": torch.ones(3, 2),
        "zero_point": torch.ones(3, 2, dtype=torch.uint8),
        "bits": 2,
        "group_size": 32,
    }
    with pytest.raises(ValueError, match=message):
        qat_kernels.quantized_matmul(**{**arguments, **change})


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 512])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_real_size(both_backends: BothBackends, bits: int, tokens: int) -> None:
    layer = Layer((4096, 11008, 64), bits, "cuda")
    x = torch.randn(tokens, 11008, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad_out = torch.randn(tokens, 4096, device="cuda", dtype=torch.bfloat16)

    def run() -> list[Tensor]:
        y = layer(x)
        return [y, *torch.autograd.grad(y, [x, layer.scale], grad_out)]

    expected, actual = both_backends(run)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, TOLERANCE[torch.bfloat16])
