"""One function per runtime: it loads an export there, on the CPU, and returns the logits the runtime computes.

Imported only in a child process (`child`): these libraries patch transformers when they are imported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qatcli.formats import source
from qatcli.formats.layouts import mlx as layout
from qatcli.formats.runtimes.reference import dense_weight, logits
from qatcli.linear import PackedLinear
from qatcli.packed import read_config


@dataclass(frozen=True)
class Loaded:
    """An export in a runtime.

    name      runtime and version
    model     its own model object: a torch module, or `LlamaCpp`
    logits    token ids of one window -> logits fp32 [T, V]
    weight    a quantized linear of the model -> the weight [N, K] it multiplies with, by the library's own code
    expected  the same from the checkpoint's linear, as the format rounds it
    tokenize  text -> token ids, where the runtime has a tokenizer of its own; None: the checkpoint's
    """

    name: str
    model: Any
    logits: Callable[[list[int]], NDArray[np.float32]]
    tokenize: Callable[[str], list[int]] | None = None
    weight: Callable[[Any], Tensor] | None = None
    expected: Callable[[source.Arrays], NDArray[np.float32]] = dense_weight


def gptqmodel(out: Path) -> Loaded:
    """GPTQModel's TorchLinear, the one kernel that takes all bits."""
    from gptqmodel import BACKEND, GPTQModel

    awq = read_config(out)["quantization_config"]["quant_method"] == "awq"
    backend = BACKEND.TORCH_AWQ if awq else BACKEND.TORCH
    model = GPTQModel.load(str(out), device="cpu", backend=backend, dtype=torch.float16).model
    return replace(_of_torch(f"gptqmodel {version('gptqmodel')}", model), weight=_awq_weight if awq else _gptq_weight)


def _gptq_weight(linear: Any) -> Tensor:
    weight: Tensor = linear.dequantize_weight()
    return weight.T


def _awq_weight(linear: Any) -> Tensor:
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    settings = {"bits": linear.bits, "group_size": linear.group_size}
    weight: Tensor = dequantize_gemm(linear.qweight, linear.qzeros, linear.scales, **settings)
    return weight.T


def transformers_gptqmodel(out: Path) -> Loaded:
    """transformers, through optimum and GPTQModel's fp16 kernel: the default at 4 bits on CPUs rounds to bf16."""
    from transformers import AwqConfig, GPTQConfig

    settings = read_config(out)["quantization_config"]
    awq = settings["quant_method"] == "awq"
    kernel = AwqConfig(backend="torch_awq") if awq else GPTQConfig(bits=settings["bits"], backend="torch")
    library = f"gptqmodel {version('gptqmodel')}"
    return _transformers(out, library, quantization_config=kernel, device_map="cpu", dtype=torch.float16)


def transformers_dense(out: Path) -> Loaded:
    """transformers, an ordinary dense checkpoint."""
    return _transformers(out, dtype=torch.float32)


def transformers_native(out: Path) -> Loaded:
    """transformers with qat's quantizer, which `import qatcli` registered."""
    return replace(_transformers(out, "qatcli", dtype=torch.float32), weight=PackedLinear.dequantize)


def transformers_compressed_tensors(out: Path) -> Loaded:
    """transformers with decompressed weights: its default load fails where they are asymmetric."""
    from transformers import CompressedTensorsConfig

    library = f"compressed-tensors {version('compressed-tensors')}"
    return _transformers(
        out, library, quantization_config=CompressedTensorsConfig(dequantize=True), dtype=torch.float32
    )


def mlx(out: Path) -> Loaded:
    """mlx-lm, in fp32: its CPU kernels add up products in the type of the activations, its others do not."""
    import mlx.core as mx
    from mlx_lm.utils import load_model

    model, _ = load_model(out)
    model.set_dtype(mx.float32)
    return Loaded(
        f"mlx-lm {version('mlx-lm')} (mlx {version('mlx')})",
        model,
        lambda ids: np.array(model(mx.array([ids]))[0], np.float32),
        weight=_mlx_weight,
        expected=lambda linear: layout.dense_weight(linear.codes, linear.zero_point, linear.scale),
    )


def _mlx_weight(linear: Any) -> Tensor:
    import mlx.core as mx

    parts = linear.weight, linear.scales, linear.biases
    return torch.from_numpy(np.array(mx.dequantize(*parts, group_size=linear.group_size, bits=linear.bits)))


def llama_cpp(out: Path) -> Loaded:
    """llama.cpp on the CPU."""
    from qatcli.formats.runtimes.llama_cpp import LlamaCpp

    model = LlamaCpp(next(out.glob("*.gguf")))
    return Loaded(f"llama.cpp (xllamacpp {version('xllamacpp')})", model, model.logits, model.tokenize)


LOADERS: dict[str, Callable[[Path], Loaded]] = {
    "gptqmodel": gptqmodel,
    "transformers": transformers_gptqmodel,
    "transformers-dense": transformers_dense,
    "transformers-native": transformers_native,
    "compressed-tensors": transformers_compressed_tensors,
    "llama.cpp": llama_cpp,
    "mlx": mlx,
}


def _transformers(out: Path, library: str = "", **options: Any) -> Loaded:
    from transformers import AutoModelForCausalLM

    name = f"transformers {version('transformers')}"
    model = AutoModelForCausalLM.from_pretrained(out, **options)
    return _of_torch(f"{name} ({library})" if library else name, model)


def _of_torch(name: str, model: Any) -> Loaded:
    model.eval()
    return Loaded(name, model, lambda ids: logits(model, np.array([ids]))[0])
