"""Every op in plain torch: the definition of correct, and what runs where nothing faster does.

Weights are written W[n, k] = (q[n, k] - z[n, k // g]) * s[n, k // g] with codes q, zero points z and scales s
(kernels/README.md). Shape letters: N out_features, K in_features, g group size, G = K / g groups.

On CPU the work is done in blocks of rows that stay in cache, with in-place operations on a few scratch blocks: an
elementwise chain over a whole weight is bound by memory, not by arithmetic. The functions trust their arguments;
`qat_kernels.__init__` validates them.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import linear

from qat_kernels.bitstream import unpack

MIN_SCALE, MAX_SCALE = 1e-4, 1e4
"""Range that scales are clamped to while training (EfficientQAT, quantize/quantizer.py)."""

BLOCK_ELEMENTS_CPU = 2**17
"""Weights per block and thread: few enough to stay in cache, enough that the cost of a Python call does not show."""

BLOCK_ELEMENTS_GPU = 2**24
"""Weights per block on an accelerator, where a block only bounds the scratch memory."""

GRAD_BLOCK_ELEMENTS = 2**22
"""Elements of dW made at a time in `scale_grad`: enough to keep the matrix product efficient."""


def fake_quant(
    weight: Tensor, scale: Tensor, zero_point: Tensor, *, bits: int, group_size: int, out_dtype: torch.dtype
) -> Tensor:
    """Quantize and dequantize weight [N, K] on the grid of scale and zero_point [N, G]; computed in fp32."""
    out = torch.empty(weight.shape, dtype=out_dtype, device=weight.device)
    out_NGg = _grouped(out, group_size)
    weight_NGg = _grouped(weight, group_size)
    scale_NG1, lowest_NG1, highest_NG1 = _grid(scale, zero_point, bits)
    scratch = _scratch(weight_NGg, count=1)
    for rows in _row_blocks(weight_NGg):
        (steps,) = _cut(scratch, rows)
        _divide(weight_NGg[rows], scale_NG1[rows], out=steps).round_()
        _clamp(steps, lowest_NG1[rows], highest_NG1[rows], out=steps)
        _multiply(steps, scale_NG1[rows], out=out_NGg[rows])
    return out


def fake_quant_backward(
    grad_out: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor, *, bits: int, group_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `fake_quant`, recomputed from its inputs (kernels/README.md).

    With u = w / s, r = rint(u) and M = 1 where 0 <= r + z <= qmax, else 0:
        dw = grad * M        ds = sum over the group of grad * ((c - z) - M * u)        dz = sum of grad * s * (M - 1)
    The clamps and roundings of s and z pass gradients straight through, as EfficientQAT's clamp_ste and round_ste do.

    Returns:
        dw [N, K], ds [N, G], dz [N, G] in the dtypes of weight, scale and zero_point.
    """
    d_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    d_scale = torch.empty(scale.shape, dtype=torch.float32, device=scale.device)
    d_zero_point = torch.empty_like(d_scale)
    weight_NGg, grad_NGg, d_weight_NGg = (_grouped(t, group_size) for t in (weight, grad_out, d_weight))
    scale_NG1, lowest_NG1, highest_NG1 = _grid(scale, zero_point, bits)
    scratch = _scratch(weight_NGg, count=4)
    for rows in _row_blocks(weight_NGg):
        ratio, inside, steps, passed = _cut(scratch, rows)
        grad = grad_NGg[rows].float()
        _divide(weight_NGg[rows], scale_NG1[rows], out=ratio)
        torch.round(ratio, out=inside)
        _clamp(inside, lowest_NG1[rows], highest_NG1[rows], out=steps)  # c - z
        inside.eq_(steps)  # M: the clamp changed nothing
        torch.mul(grad, inside, out=passed)
        d_weight_NGg[rows] = passed
        steps.addcmul_(ratio, inside, value=-1).mul_(grad)
        torch.sum(steps, dim=-1, out=d_scale[rows])
        torch.sum(passed.sub_(grad), dim=-1, out=d_zero_point[rows])
    d_zero_point.mul_(scale_NG1.squeeze(-1))
    return d_weight, d_scale.to(scale.dtype), d_zero_point.to(zero_point.dtype)


def quantize(weight: Tensor, scale: Tensor, zero_point: Tensor, *, bits: int, group_size: int) -> Tensor:
    """Codes uint8 [N, K] of weight [N, K] on the grid of scale and zero_point [N, G], rounded as in `fake_quant`."""
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    codes_NGg = _grouped(codes, group_size)
    weight_NGg = _grouped(weight, group_size)
    scale_NG1, lowest_NG1, highest_NG1 = _grid(scale, zero_point, bits)
    scratch = _scratch(weight_NGg, count=1)
    for rows in _row_blocks(weight_NGg):
        (steps,) = _cut(scratch, rows)
        _divide(weight_NGg[rows], scale_NG1[rows], out=steps).round_()
        _clamp(steps, lowest_NG1[rows], highest_NG1[rows], out=steps)
        codes_NGg[rows] = steps.sub_(lowest_NG1[rows])
    return codes


def dequantize(
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    *,
    bits: int,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """Weights [N, K] in dtype from packed codes int32 [N, ceil(K * bits / 32)], scale and zero_point [N, G].

    Computed in fp32 and rounded once to dtype.
    """
    out = torch.empty(packed.shape[0], in_features, dtype=dtype, device=packed.device)
    out_NGg = _grouped(out, group_size)
    scale_NG1 = scale.float().unsqueeze(-1)
    zero_point_NG1 = zero_point.float().unsqueeze(-1)
    scratch = _scratch(out_NGg, count=1)
    for rows in _row_blocks(out_NGg):
        (steps,) = _cut(scratch, rows)
        steps.copy_(_grouped(unpack(packed[rows], bits=bits, length=in_features), group_size))
        _multiply(steps.sub_(zero_point_NG1[rows]), scale_NG1[rows], out=out_NGg[rows])
    return out


def prepare(packed: Tensor, *, bits: int, group_size: int, in_features: int) -> Tensor | None:
    """No run-time layout: the reference reads the checkpoint's."""
    return None


def quantized_matmul(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    *,
    bits: int,
    group_size: int,
    prepared: Tensor | None = None,
) -> Tensor:
    """y = x W^T [M, N] in the dtype of x [M, K], over W in that dtype."""
    weight = dequantize(
        packed, scale, zero_point, bits=bits, group_size=group_size, in_features=x.shape[1], dtype=x.dtype
    )
    return linear(x, weight)


def input_grad(
    grad_out: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    *,
    bits: int,
    group_size: int,
    in_features: int,
) -> Tensor:
    """Gradient grad_out W [M, K] of the input of `quantized_matmul`, in the dtype of grad_out [M, N]."""
    weight = dequantize(
        packed, scale, zero_point, bits=bits, group_size=group_size, in_features=in_features, dtype=grad_out.dtype
    )
    return grad_out @ weight


def scale_grad(
    grad_out: Tensor,
    x: Tensor,
    packed: Tensor,
    zero_point: Tensor,
    *,
    bits: int,
    group_size: int,
    dequantize: Callable[..., Tensor] = dequantize,
) -> Tensor:
    """Gradient fp32 [N, G] of the scales of y = x W^T: the sum over each group of dW * (q - z), dW = grad_out^T x.

    dW is made a block of rows at a time and never whole. Each of its elements is accumulated in fp32 and rounded once
    to the dtype of the operands, as in the backward pass of a dense linear; the rest is fp32.

    Args:
        grad_out: [M, N].
        x: [M, K], of the dtype of grad_out.
        dequantize: the implementation to unpack with.
    """
    in_features = x.shape[1]
    d_scale = torch.empty(zero_point.shape, dtype=torch.float32, device=x.device)
    unit_scale = torch.ones_like(d_scale)
    block = max(1, GRAD_BLOCK_ELEMENTS // in_features)
    for start in range(0, packed.shape[0], block):
        rows = slice(start, start + block)
        steps = dequantize(
            packed[rows],
            unit_scale[rows],
            zero_point[rows],
            bits=bits,
            group_size=group_size,
            in_features=in_features,
            dtype=torch.float32,
        )
        steps.mul_(torch.mm(grad_out[:, rows].t(), x))
        torch.sum(_grouped(steps, group_size), dim=-1, out=d_scale[rows])
        del steps  # before the next ones are made
    return d_scale


def _grouped(tensor_NK: Tensor, group_size: int) -> Tensor:
    """View [N, K] as [N, G, g]."""
    return tensor_NK.unflatten(1, (-1, tensor_NK.shape[1] if group_size == -1 else group_size))


def _grid(scale: Tensor, zero_point: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Clamped scale s and the bounds -z and qmax - z of rint(w / s), each fp32 [N, G, 1].

    Clamping rint(w / s) to these bounds gives c - z = clamp(rint(w / s) + z, 0, qmax) - z in two passes instead of
    four. Both are exact in fp32: codes beyond 2**24 are clamped away in either form.
    """
    qmax = 2**bits - 1
    scale_NG = scale.float().clamp(MIN_SCALE, MAX_SCALE)
    zero_point_NG = zero_point.float().round().clamp_(0, qmax)
    return scale_NG.unsqueeze(-1), (-zero_point_NG).unsqueeze(-1), (qmax - zero_point_NG).unsqueeze(-1)


def _row_blocks(tensor_NGg: Tensor) -> Iterator[slice]:
    """Slices of consecutive rows, each small enough to work on in cache."""
    size = _rows_per_block(tensor_NGg)
    for start in range(0, tensor_NGg.shape[0], size):
        yield slice(start, min(start + size, tensor_NGg.shape[0]))


def _rows_per_block(tensor_NGg: Tensor) -> int:
    on_cpu = tensor_NGg.device.type == "cpu"
    elements = BLOCK_ELEMENTS_CPU * torch.get_num_threads() if on_cpu else BLOCK_ELEMENTS_GPU
    rows, groups, group_size = tensor_NGg.shape
    return min(rows, max(1, elements // (groups * group_size)))


def _scratch(tensor_NGg: Tensor, *, count: int) -> Tensor:
    """Uninitialized fp32 [count, rows per block, G, g]."""
    shape = (count, _rows_per_block(tensor_NGg), *tensor_NGg.shape[1:])
    return torch.empty(shape, dtype=torch.float32, device=tensor_NGg.device)


def _cut(scratch: Tensor, rows: slice) -> tuple[Tensor, ...]:
    """The scratch blocks, shortened to the number of rows (the last block may be smaller)."""
    return scratch[:, : rows.stop - rows.start].unbind(0)


def _divide(dividend: Tensor, divisor: Tensor, *, out: Tensor) -> Tensor:
    """IEEE division in fp32: a reciprocal multiplication would flip codes at ties."""
    return torch.div(dividend.float(), divisor, out=out)


def _clamp(value: Tensor, lowest: Tensor, highest: Tensor, *, out: Tensor) -> Tensor:
    """torch.clamp with tensor bounds; on CPU that op is several times slower than this pair, which is vectorized."""
    return torch.minimum(torch.maximum(value, lowest, out=out), highest, out=out)


def _multiply(value: Tensor, factor: Tensor, *, out: Tensor) -> Tensor:
    """Product in fp32, rounded once to the dtype of out. Overwrites value when out has another dtype."""
    if out.dtype == torch.float32:
        return torch.mul(value, factor, out=out)
    return out.copy_(value.mul_(factor))
