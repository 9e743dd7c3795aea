"""Which releases of which runtime run an export, at which bits, and how (docs/export-formats.md has the evidence).

Releases are those whose source was read or that were run; commands are given for the directory of the export. The
traps these rows exist for: vLLM up to 0.11.0 reads gptq_v2 zero points off by one without a word, and vLLM from 0.22
and SGLang from 0.5.21 run asymmetric or 2/3-bit GPTQ only with `--quantization humming`.
"""

from __future__ import annotations

from contextlib import suppress

from qatcli.errors import QatError
from qatcli.formats import source
from qatcli.formats.contract import Deployment, ExportOptions
from qatcli.packed import PackedCheckpoint

_HUMMING = "pip install humming-kernels; CUDA, compute capability 7.5 or newer"
_ONE_KIND = "does not run it: it reads one number of bits and group size for all linears; export native or dense"
# vLLM and SGLang compute these linears as one, so their parts must have the same bits and group size, or all be dense.
MERGED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_MERGING = ("vLLM", "SGLang")
# Families whose activations leave float16 (Gemma-3-270M: 1.04e5 on random tokens), as vLLM 0.11 lists them.
NOT_IN_FLOAT16 = ("gemma2", "gemma3", "gemma3_text", "plamo2", "glm4")
_PYTHON = "python -c \"from transformers import pipeline; print(pipeline('text-generation', '.')('Hello'))\""


def gptq(checkpoint: PackedCheckpoint, *, symmetric: bool) -> list[Deployment]:
    """Rows for GPTQ: version 1 for symmetric models, version 2 otherwise."""
    bits = {quant.bits for quant in checkpoint.modules.values()}
    kinds = {quant.kind for quant in checkpoint.modules.values()}
    rows = [Deployment("GPTQModel", ">= 7", "GPTQModel.load('.')", "3 bits: TorchLinear only" if 3 in bits else "")]
    if len(kinds) == 1:
        rows.append(Deployment("transformers", ">= 5 with optimum and gptqmodel", _PYTHON))
    else:
        rows.append(Deployment("transformers", "up to 5.23", "", _ONE_KIND))
    if symmetric and bits <= {4, 8}:
        rows += [Deployment("vLLM", "all", "vllm serve ."), Deployment("SGLang", "all", _sglang())]
        return where_merged(checkpoint, rows)
    if not symmetric:
        rows.append(Deployment("vLLM", "<= 0.11.0", "", "do not use: SILENTLY WRONG: zero points are read off by one"))
    rows.append(_in_float16(checkpoint, "vLLM", "0.11.1 to 0.21", "vllm serve ."))
    rows.append(_in_float16(checkpoint, "SGLang", "<= 0.5.19", _sglang()))
    if len(kinds) == 1 and all(group > 0 for _, group in kinds):
        rows.append(Deployment("vLLM", ">= 0.22", "vllm serve . --quantization humming", _HUMMING))
        rows.append(Deployment("SGLang", ">= 0.5.21", _sglang("--quantization humming"), _HUMMING))
    else:
        remark = "does not run it: one number of bits and one positive group size only; export compressed-tensors"
        rows.append(Deployment("vLLM", ">= 0.22", "", remark))
        rows.append(Deployment("SGLang", ">= 0.5.21", "", remark.replace("compressed-tensors", "dense")))
    if not symmetric and bits in ({2}, {4}):
        rows.append(Deployment("T-MAC", "June 2025", "run_pipeline.py -m gptq-auto", "CPU"))
    return where_merged(checkpoint, rows)


def where_merged(checkpoint: PackedCheckpoint, rows: list[Deployment]) -> list[Deployment]:
    """`rows`, without those of servers that merge linears where the parts of a merged one differ."""
    for name in checkpoint.modules:
        parent, _, leaf = name.rpartition(".")
        parts = next((parts for parts in MERGED.values() if leaf in parts), (leaf,))
        there = [linear for part in parts if _exists(checkpoint, linear := f"{parent}.{part}")]
        found = [checkpoint.modules.get(linear) for linear in there]
        if len({quant and quant.kind for quant in found}) > 1:
            remark = f"does not run it: it merges {', '.join(parts)}, which differ in {parent}; export dense"
            kept = [row for row in rows if row.runtime not in _MERGING]
            return [*kept, *(Deployment(runtime, "all", "", remark) for runtime in _MERGING)]
    return rows


def bitblas(checkpoint: PackedCheckpoint, zeros_name: str) -> list[Deployment]:
    """Rows for BitBLAS, by the name of the zero-point tensor."""
    releases = ">= 5 with bitblas" if zeros_name == "qzeros" else "<= 4 with bitblas"
    rows = [Deployment("GPTQModel", releases, "GPTQModel.load('.')", "CUDA 12; the bitblas project is idle since 2025")]
    if zeros_name == "zeros":
        rows.append(_in_float16(checkpoint, "vLLM", "<= 0.14.1", "vllm serve . --quantization gptq_bitblas"))
        return where_merged(checkpoint, rows)
    return rows


def native() -> list[Deployment]:
    """Rows for our own packed checkpoint."""
    return [
        Deployment("qat", "this release", "qat eval . --text wikitext2", "CPU and CUDA, every bit width"),
        Deployment("transformers", ">= 5.17 with qatcli", "import qatcli; AutoModelForCausalLM.from_pretrained('.')"),
    ]


def awq(checkpoint: PackedCheckpoint) -> list[Deployment]:
    """Rows for AWQ, the asymmetric 4-bit format most servers detect by themselves."""
    from qatcli.formats import mlx as mlx_format  # which imports this module

    rows = [
        _in_float16(checkpoint, "vLLM", ">= 0.11.1", "vllm serve .", "Marlin kernels on Ampere and newer"),
        _in_float16(checkpoint, "SGLang", ">= 0.5.10", _sglang()),
        Deployment("transformers", ">= 5 with gptqmodel", _PYTHON),
        Deployment("GPTQModel", ">= 7", "GPTQModel.load('.')"),
    ]
    with suppress(QatError):  # what mlx-lm computes otherwise
        mlx_format.refuse(checkpoint, ExportOptions())
        how = "mlx_lm.generate --model . --prompt Hello"
        rows.append(Deployment("MLX", "mlx-lm >= 0.30.4", how, "-s z is rounded to fp16"))
    return where_merged(checkpoint, rows)


def compressed_tensors(checkpoint: PackedCheckpoint, *, symmetric: bool) -> list[Deployment]:
    """Rows for compressed-tensors pack-quantized."""
    bits = {quant.bits for quant in checkpoint.modules.values()}
    rows = []
    if bits <= {4, 8}:
        rows.append(Deployment("vLLM", ">= 0.10.2", "vllm serve .", "Marlin or Machete"))
        rows.append(Deployment("SGLang", ">= 0.5.21", _sglang()))
    else:
        first = "0.25" if symmetric else "0.31"
        rows.append(Deployment("vLLM", f">= {first}", "vllm serve .", f"older releases refuse it; {_HUMMING}"))
        rows.append(Deployment("SGLang", ">= 0.5.21", _sglang("--quantization humming"), _HUMMING))
    if len({quant.kind for quant in checkpoint.modules.values()}) > 1:
        rows.append(Deployment("transformers", "up to 5.23", "", _ONE_KIND))
        return where_merged(checkpoint, rows)
    how = "quantization_config=CompressedTensorsConfig(dequantize=True)"
    rows.append(
        Deployment(
            "transformers",
            ">= 5.17 with compressed-tensors >= 0.18",
            f"AutoModelForCausalLM.from_pretrained('.', {how})",
            "the default load fails for asymmetric weights" if not symmetric else "",
        )
    )
    return where_merged(checkpoint, rows)


def gguf(file_name: str, types: set[str]) -> list[Deployment]:
    """Rows for GGUF, by the block types in the file."""
    releases = "all that know the architecture"
    if "Q2_0" in types:
        releases = "June 2026 and later on a CPU, July 2026 on a GPU (Q2_0)"
    run = f"llama-cli -m {file_name} -p Hello"
    modelfile = f"echo FROM ./{file_name} > Modelfile && ollama create qat -f Modelfile"
    return [
        Deployment("llama.cpp", releases, run, "CPU, Metal, Vulkan, CUDA"),
        Deployment("llama.cpp server", releases, f"llama-server -m {file_name}", "OpenAI-compatible"),
        Deployment("Ollama", "with such a llama.cpp", modelfile, "from the folder of the file"),
    ]


def mlx(checkpoint: PackedCheckpoint) -> list[Deployment]:
    """Rows for MLX, whose models of our families have no sliding window."""
    window = getattr(source.full_config(checkpoint.config), "sliding_window", None)  # null where it is not used
    limit = f"; as trained within {window} tokens, beyond these it attends to all" if window else ""
    releases = "mlx-lm >= 0.32.2"
    return [
        Deployment("MLX", releases, "mlx_lm.generate --model . --prompt Hello", f"-s z is rounded to fp16{limit}"),
        Deployment("MLX server", releases, "mlx_lm.server --model .", "OpenAI-compatible"),
    ]


def dense() -> list[Deployment]:
    """Rows for the plain checkpoint."""
    return [
        Deployment("transformers", "all", _PYTHON, "full size: the weights are expanded"),
        Deployment("vLLM", "all", "vllm serve ."),
        Deployment("SGLang", "all", _sglang()),
        Deployment("any other tool", "", "", "an ordinary half-precision Hugging Face checkpoint"),
    ]


def _in_float16(
    checkpoint: PackedCheckpoint, runtime: str, releases: str, command: str, remark: str = ""
) -> Deployment:
    """A row for kernels of float16 alone, which the activations of some families leave."""
    if checkpoint.config["model_type"] in NOT_IN_FLOAT16:
        refusal = "does not run it: its kernels are of float16, which this family's activations leave; export dense"
        return Deployment(runtime, releases, "", refusal)
    return Deployment(runtime, releases, f"{command} --dtype float16", remark)


def _exists(checkpoint: PackedCheckpoint, linear: str) -> bool:
    return linear in checkpoint.modules or f"{linear}.weight" in checkpoint.shards


def _sglang(flags: str = "") -> str:
    return f"python -m sglang.launch_server --model-path . {flags}".strip()
