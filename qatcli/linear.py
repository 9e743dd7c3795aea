"""The two linears of quantized models: one that trains through fake quantization, one that runs packed codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat_kernels import dequantize, fake_quant, prepare, quantize, quantized_matmul
from qat_kernels.bitstream import words_per_row
from qat_kernels.reference import MAX_SCALE, MIN_SCALE
from qatcli.packed import ModuleQuant, QuantizedLinear, unpack_zero_point
from qatcli.training import active_dtype

FEW_ROWS = 4
"""Rows of x up to which any table of kernel settings serves a prepared weight."""


class FakeQuantLinear(nn.Module):
    """A linear whose weight, scale and zero point train together through straight-through estimators (Block-AP).

    weight [N, K], scale [N, G] and zero_point [N, G] are fp32 parameters.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, scale: Tensor, zero_point: Tensor, *, bits: int, group_size: int
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.scale = nn.Parameter(scale)
        self.zero_point = nn.Parameter(zero_point)
        self.bits = bits
        self.group_size = group_size

    def forward(self, x: Tensor) -> Tensor:
        dtype = active_dtype(self.weight)
        weight = fake_quant(
            self.weight, self.scale, self.zero_point, bits=self.bits, group_size=self.group_size, out_dtype=dtype
        )
        return F.linear(x, weight, self.bias)

    @torch.no_grad()
    def export(self) -> QuantizedLinear:
        """The canonical form: the codes and the integer zero points that `forward` used."""
        qmax = 2**self.bits - 1
        scale = self.scale.clamp(MIN_SCALE, MAX_SCALE)
        return QuantizedLinear(
            codes=quantize(self.weight, self.scale, self.zero_point, bits=self.bits, group_size=self.group_size),
            scale=scale,
            zero_point=self.zero_point.round().clamp(0, qmax).to(torch.uint8),
            bits=self.bits,
            group_size=self.group_size,
            bias=None if self.bias is None else self.bias.detach(),
        )


class PackedLinear(nn.Module):
    """A linear on packed codes; only the scale can train (E2E-QP). Tensor names and layouts: `qatcli.packed`."""

    weight_packed: Tensor
    weight_zero_point: Tensor

    def __init__(self, quant: ModuleQuant, *, bias: bool, scale_dtype: torch.dtype, dtype: torch.dtype) -> None:
        super().__init__()
        words = words_per_row(quant.in_features, quant.bits)
        self.quant = quant
        self.register_buffer("weight_packed", torch.zeros(quant.out_features, words, dtype=torch.int32))
        zero_words = words_per_row(quant.out_features, quant.bits)
        self.register_buffer("weight_zero_point", torch.zeros(zero_words, quant.groups, dtype=torch.int32))
        scale = torch.zeros(quant.out_features, quant.groups, dtype=scale_dtype)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(quant.out_features, dtype=dtype), requires_grad=False) if bias else None
        self._unpacked_zero_point: Tensor | None = None
        self._prepared: Tensor | None = None
        self._prepared_on: torch.device | None = None

    @property
    def zero_point(self) -> Tensor:
        """Zero points uint8 [N, G], unpacked once after they are loaded."""
        cached = self._unpacked_zero_point
        if cached is None or cached.device != self.weight_zero_point.device:
            with torch.inference_mode(False):  # a tensor of inference mode could never be used while training
                cached = unpack_zero_point(
                    self.weight_zero_point, bits=self.quant.bits, out_features=self.quant.out_features
                )
            self._unpacked_zero_point = cached
        return cached

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight [N, K] in `dtype`."""
        packed, q = self.weight_packed, self.quant
        shape = {"bits": q.bits, "group_size": q.group_size, "in_features": q.in_features}
        return dequantize(packed, self.weight_scale, self.zero_point, **shape, dtype=dtype)

    def _prepared_for(self, x: Tensor) -> Tensor | None:
        """The codes laid out for decoding a few tokens, made at the first such call and never while training."""
        if torch.is_grad_enabled() or x.numel() > FEW_ROWS * x.shape[-1]:
            return None
        packed, q = self.weight_packed, self.quant
        if self._prepared_on != packed.device:
            self._prepared_on = packed.device  # asked once: on a CPU nothing is faster than the packed codes
            self._prepared = prepare(packed, bits=q.bits, group_size=q.group_size, in_features=q.in_features)
        return self._prepared

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        self._unpacked_zero_point = self._prepared = self._prepared_on = None
        super()._load_from_state_dict(*args, **options)

    def forward(self, x: Tensor) -> Tensor:
        return quantized_matmul(
            x,
            self.weight_packed,
            self.weight_scale,
            self.zero_point,
            bits=self.quant.bits,
            group_size=self.quant.group_size,
            bias=self.bias,
            prepared=self._prepared_for(x),
        )

    def extra_repr(self) -> str:
        q = self.quant
        return f"in={q.in_features}, out={q.out_features}, bits={q.bits}, group_size={q.group_size}"


def replace_modules(root: nn.Module, names: list[str], build: Callable[[str, nn.Linear], nn.Module]) -> None:
    """Put `build(name, linear)` in the place of each named linear."""
    for name in names:
        parent, _, leaf = name.rpartition(".")
        setattr(root.get_submodule(parent), leaf, build(name, cast(nn.Linear, root.get_submodule(name))))


@torch.no_grad()
def dense_linears(root: nn.Module, dtype: torch.dtype) -> None:
    """Put a plain linear with the dequantized weight in `dtype` in the place of every packed one."""

    def dense(_: str, module: Any) -> nn.Module:
        linear = nn.Linear(module.quant.in_features, module.quant.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(module.dequantize(dtype), requires_grad=False)
        linear.bias = module.bias
        return linear

    replace_modules(root, [name for name, module in root.named_modules() if isinstance(module, PackedLinear)], dense)
