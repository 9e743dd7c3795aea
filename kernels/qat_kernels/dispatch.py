"""Which implementation serves a call: Triton for CUDA tensors where it is installed, compiled C++ on a CPU (`cpu`).

Everything else gets the torch reference, which both also take for what they do not cover.

The environment variable QAT_KERNELS (reference or triton) overrides the choice, for bug reports and for tests; Triton
on CPU tensors needs TRITON_INTERPRET=1 set before Triton is first imported.
"""

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

from torch import Tensor

from qat_kernels import bitstream, cpu, reference


@dataclass(frozen=True)
class Backend:
    """One implementation of the primitives, with the signatures of `qat_kernels.reference` and `bitstream`."""

    fake_quant: Callable[..., Tensor]
    fake_quant_backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    quantize: Callable[..., Tensor]
    pack: Callable[..., Tensor]
    unpack: Callable[..., Tensor]
    dequantize: Callable[..., Tensor]
    quantized_matmul: Callable[..., Tensor]
    input_grad: Callable[..., Tensor]
    scale_grad: Callable[..., Tensor]
    prepare: Callable[..., Tensor | None] = reference.prepare


REFERENCE = Backend(
    fake_quant=reference.fake_quant,
    fake_quant_backward=reference.fake_quant_backward,
    quantize=reference.quantize,
    pack=bitstream.pack,
    unpack=bitstream.unpack,
    dequantize=reference.dequantize,
    quantized_matmul=reference.quantized_matmul,
    input_grad=reference.input_grad,
    scale_grad=reference.scale_grad,
)

CPU = replace(
    REFERENCE,
    fake_quant=cpu.fake_quant,
    fake_quant_backward=cpu.fake_quant_backward,
    dequantize=cpu.dequantize,
    quantized_matmul=cpu.quantized_matmul,
    input_grad=cpu.input_grad,
    scale_grad=cpu.scale_grad,
)


def backend_for(tensor: Tensor) -> Backend:
    """The backend for an op whose first argument is tensor.

    Raises:
        ValueError: QAT_KERNELS is set to something else than reference or triton.
        ImportError: QAT_KERNELS asks for Triton and it is not installed.
    """
    forced = os.environ.get("QAT_KERNELS", "")
    if forced not in ("", "reference", "triton"):
        raise ValueError(f"QAT_KERNELS must be reference or triton. Got: {forced!r}")
    if forced == "triton" or (not forced and tensor.is_cuda and _has_triton()):
        return _triton_backend()
    return REFERENCE if forced or tensor.is_cuda else CPU


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _triton_backend() -> Backend:
    from qat_kernels import triton_dequantize, triton_fake_quant, triton_linear, triton_packing

    return Backend(
        fake_quant=triton_fake_quant.fake_quant,
        fake_quant_backward=triton_fake_quant.fake_quant_backward,
        quantize=triton_fake_quant.quantize,
        pack=triton_packing.pack,
        unpack=triton_packing.unpack,
        dequantize=triton_dequantize.dequantize,
        quantized_matmul=triton_linear.quantized_matmul,
        input_grad=triton_linear.input_grad,
        scale_grad=triton_linear.scale_grad,
        prepare=triton_linear.prepare,
    )
