"""The two differentiable ops, over whichever backend computes them."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from qat_kernels.dispatch import Backend


class FakeQuant(torch.autograd.Function):
    """Quantize and dequantize a weight; saves only its inputs and recomputes the rest in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        bits: int,
        group_size: int,
        out_dtype: torch.dtype,
        backend: Backend,
    ) -> Tensor:
        ctx.save_for_backward(weight, scale, zero_point)
        ctx.bits, ctx.group_size, ctx.backend = bits, group_size, backend
        return backend.fake_quant(weight, scale, zero_point, bits=bits, group_size=group_size, out_dtype=out_dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale, zero_point = ctx.saved_tensors
        grads = ctx.backend.fake_quant_backward(
            grad_out, weight, scale, zero_point, bits=ctx.bits, group_size=ctx.group_size
        )
        wanted = (grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad, strict=False))
        return (*wanted, None, None, None, None)


class QuantizedMatmul(torch.autograd.Function):
    """y = x W^T with W [N, K] kept packed: W exists only while a pass needs it, never between the two passes."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        packed: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        bits: int,
        group_size: int,
        backend: Backend,
    ) -> Tensor:
        x_for_scale = x if ctx.needs_input_grad[2] else None
        ctx.save_for_backward(x_for_scale, packed, scale, zero_point)
        ctx.bits, ctx.group_size, ctx.backend = bits, group_size, backend
        ctx.in_features, ctx.dtype = x.shape[-1], x.dtype
        return linear(x, _weight(ctx, packed, scale, zero_point))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, packed, scale, zero_point = ctx.saved_tensors
        d_x = d_scale = None
        with torch.autocast(grad_out.device.type, enabled=False):  # the dtype was settled in the forward pass
            if ctx.needs_input_grad[0]:
                d_x = grad_out @ _weight(ctx, packed, scale, zero_point)
            if ctx.needs_input_grad[2]:
                d_scale = ctx.backend.scale_grad(
                    grad_out.reshape(-1, grad_out.shape[-1]),
                    x.reshape(-1, ctx.in_features),
                    packed,
                    zero_point,
                    bits=ctx.bits,
                    group_size=ctx.group_size,
                ).to(scale.dtype)
        return d_x, None, d_scale, None, None, None, None


def _weight(ctx: Any, packed: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    weight: Tensor = ctx.backend.dequantize(
        packed,
        scale,
        zero_point,
        bits=ctx.bits,
        group_size=ctx.group_size,
        in_features=ctx.in_features,
        dtype=ctx.dtype,
    )
    return weight
