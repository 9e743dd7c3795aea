"""The differentiable ops as operators of torch.library, for torch.compile.

A compiled graph holds each as one node, whatever backend serves it, with its shape rule and its gradient. Eager calls
take the autograd functions of `autograd` instead, which cost less per call.
"""

from typing import Any

import torch
from torch import Tensor

from qat_kernels.dispatch import backend_for


@torch.library.custom_op("qat_kernels::fake_quant", mutates_args=())
def fake_quant(
    weight: Tensor, scale: Tensor, zero_point: Tensor, bits: int, group_size: int, out_dtype: torch.dtype
) -> Tensor:
    """See `reference.fake_quant`."""
    return backend_for(weight).fake_quant(
        weight, scale, zero_point, bits=bits, group_size=group_size, out_dtype=out_dtype
    )


@fake_quant.register_fake
def _(weight: Tensor, scale: Tensor, zero_point: Tensor, bits: int, group_size: int, out_dtype: torch.dtype) -> Tensor:
    return weight.new_empty(weight.shape, dtype=out_dtype)


@torch.library.custom_op("qat_kernels::fake_quant_backward", mutates_args=())
def fake_quant_backward(
    grad_out: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor, bits: int, group_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.fake_quant_backward`."""
    return backend_for(weight).fake_quant_backward(
        grad_out, weight, scale, zero_point, bits=bits, group_size=group_size
    )


@fake_quant_backward.register_fake
def _(
    grad_out: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor, bits: int, group_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    return weight.new_empty(weight.shape), scale.new_empty(scale.shape), zero_point.new_empty(zero_point.shape)


def _keep_grid(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, bits, group_size, _ = inputs
    ctx.save_for_backward(*tensors)
    ctx.bits, ctx.group_size = bits, group_size


def _fake_quant_grads(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    grads = fake_quant_backward(grad_out, *ctx.saved_tensors, ctx.bits, ctx.group_size)
    wanted = (grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad, strict=False))
    return (*wanted, None, None, None)


fake_quant.register_autograd(_fake_quant_grads, setup_context=_keep_grid)


@torch.library.custom_op("qat_kernels::quantized_matmul", mutates_args=())
def quantized_matmul(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    group_size: int,
    prepared: Tensor | None,
) -> Tensor:
    """See `reference.quantized_matmul`."""
    return backend_for(x).quantized_matmul(
        x, packed, scale, zero_point, bits=bits, group_size=group_size, prepared=prepared
    )


@quantized_matmul.register_fake
def _(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    group_size: int,
    prepared: Tensor | None,
) -> Tensor:
    return x.new_empty(x.shape[0], packed.shape[0])


@torch.library.custom_op("qat_kernels::input_grad", mutates_args=())
def input_grad(
    grad_out: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    group_size: int,
    in_features: int,
) -> Tensor:
    """See `reference.input_grad`."""
    return backend_for(grad_out).input_grad(
        grad_out, packed, scale, zero_point, bits=bits, group_size=group_size, in_features=in_features
    )


@input_grad.register_fake
def _(
    grad_out: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    group_size: int,
    in_features: int,
) -> Tensor:
    return grad_out.new_empty(grad_out.shape[0], in_features)


@torch.library.custom_op("qat_kernels::scale_grad", mutates_args=())
def scale_grad(grad_out: Tensor, x: Tensor, packed: Tensor, zero_point: Tensor, bits: int, group_size: int) -> Tensor:
    """See `reference.scale_grad`."""
    return backend_for(x).scale_grad(grad_out, x, packed, zero_point, bits=bits, group_size=group_size)


@scale_grad.register_fake
def _(grad_out: Tensor, x: Tensor, packed: Tensor, zero_point: Tensor, bits: int, group_size: int) -> Tensor:
    return x.new_empty(zero_point.shape, dtype=torch.float32)


def _keep_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, scale, zero_point, bits, group_size, _ = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, packed, scale, zero_point)
    ctx.bits, ctx.group_size, ctx.in_features = bits, group_size, x.shape[1]


def _matmul_grads(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    x, packed, scale, zero_point = ctx.saved_tensors
    d_x = d_scale = None
    if ctx.needs_input_grad[0]:
        d_x = input_grad(grad_out, packed, scale, zero_point, ctx.bits, ctx.group_size, ctx.in_features)
    if ctx.needs_input_grad[2]:
        d_scale = scale_grad(grad_out, x, packed, zero_point, ctx.bits, ctx.group_size).to(scale.dtype)
    return d_x, None, d_scale, None, None, None, None


quantized_matmul.register_autograd(_matmul_grads, setup_context=_keep_weight)
