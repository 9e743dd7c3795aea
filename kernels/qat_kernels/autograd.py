"""The two differentiable ops, over whichever backend computes them."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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
    """y = x W^T with x [M, K] and W [N, K] kept packed: no dense W lives between the two passes."""

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
        prepared: Tensor | None = None,
    ) -> Tensor:
        x_for_scale = x if ctx.needs_input_grad[2] else None
        ctx.save_for_backward(x_for_scale, packed, scale, zero_point)
        ctx.bits, ctx.group_size, ctx.backend, ctx.in_features = bits, group_size, backend, x.shape[1]
        return backend.quantized_matmul(
            x, packed, scale, zero_point, bits=bits, group_size=group_size, prepared=prepared
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, packed, scale, zero_point = ctx.saved_tensors
        grid = {"bits": ctx.bits, "group_size": ctx.group_size}
        d_x = d_scale = None
        with torch.autocast(grad_out.device.type, enabled=False):  # the dtype was settled in the forward pass
            if ctx.needs_input_grad[0]:
                d_x = ctx.backend.input_grad(grad_out, packed, scale, zero_point, **grid, in_features=ctx.in_features)
            if ctx.needs_input_grad[2]:
                d_scale = ctx.backend.scale_grad(grad_out, x, packed, zero_point, **grid).to(scale.dtype)
        return d_x, None, d_scale, None, None, None, None, None
