"""The ops inside torch.compile: one graph without breaks, the same numbers, and schemas that tell the truth."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import qat_kernels
from qat_kernels import ops

GRID = {"bits": 3, "group_size": 32}


def make_weight(device: str) -> tuple[Tensor, Tensor, Tensor]:
    """packed [6, 9], scale [6, 3] that trains, zero_point [6, 3]."""
    codes = torch.randint(0, 8, (6, 96), dtype=torch.uint8, device=device)
    scale = (torch.rand(6, 3, device=device) + 0.1).requires_grad_()
    zero_point = torch.randint(0, 8, (6, 3), dtype=torch.uint8, device=device)
    return qat_kernels.pack(codes, bits=3), scale, zero_point


@pytest.mark.parametrize("bias", [True, False])
def test_a_compiled_packed_linear_is_one_graph_with_the_same_numbers(backend: str, device: str, bias: bool) -> None:
    weight = make_weight(device)
    x = torch.randn(2, 4, 96, device=device, requires_grad=True)
    b = torch.randn(6, device=device) if bias else None

    def layer(x: Tensor) -> Tensor:
        return qat_kernels.quantized_matmul(x, *weight, **GRID, bias=b).square()

    def run(function: object) -> list[Tensor]:
        y = function(x)  # type: ignore[operator]
        return [y, *torch.autograd.grad(y.sum(), [x, weight[1]])]

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for actual, expected in zip(run(compiled), run(layer), strict=True):
        assert torch.equal(actual, expected)


def test_a_compiled_fake_quant_is_one_graph_with_the_same_numbers(backend: str, device: str) -> None:
    weight = torch.randn(6, 96, device=device, requires_grad=True)
    scale = (torch.rand(6, 3, device=device) + 0.1).requires_grad_()
    zero_point = (torch.rand(6, 3, device=device) * 7).requires_grad_()

    def layer(x: Tensor) -> Tensor:
        return x @ qat_kernels.fake_quant(weight, scale, zero_point, **GRID).t()

    def run(function: object) -> list[Tensor]:
        y = function(torch.ones(2, 96, device=device))  # type: ignore[operator]
        return [y, *torch.autograd.grad(y.square().sum(), [weight, scale, zero_point])]

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for actual, expected in zip(run(compiled), run(layer), strict=True):
        assert torch.equal(actual, expected)


def test_a_compiled_decoding_step_takes_prepared_codes(triton_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAT_KERNELS", "triton")
    weight = make_weight(triton_device)
    prepared = qat_kernels.prepare(weight[0], **GRID, in_features=96)
    assert prepared is not None

    def layer(x: Tensor) -> Tensor:
        return qat_kernels.quantized_matmul(x, *weight, **GRID, prepared=prepared) + 1

    x = torch.randn(1, 96, device=triton_device)
    with torch.no_grad():
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x), layer(x))


def test_operators_keep_their_promises(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own checks: schema, shape rules, autograd registration."""
    monkeypatch.setenv("QAT_KERNELS", "reference")
    packed, scale, zero_point = make_weight("cpu")
    x = torch.randn(4, 96, requires_grad=True)
    grad_out = torch.randn(4, 6)
    weight = torch.randn(6, 96, requires_grad=True)
    zero = torch.rand(6, 3, requires_grad=True)
    plain = scale.detach()
    checked = 0
    for operator, arguments in [
        (ops.fake_quant, (weight, scale, zero, 3, 32, torch.float32)),
        (ops.fake_quant_backward, (weight.detach(), weight.detach(), plain, zero.detach(), 3, 32)),
        (ops.quantized_matmul, (x, packed, scale, zero_point, 3, 32, None)),
        (ops.input_grad, (grad_out, packed, plain, zero_point, 3, 32, 96)),
        (ops.scale_grad, (grad_out, x.detach(), packed, zero_point, 3, 32)),
    ]:
        result = torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
        checked += sum(outcome == "SUCCESS" for outcome in result.values())
    assert checked == 10
