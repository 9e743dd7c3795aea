"""Export formats: one row each. `write` makes a directory complete or not at all, `verify` re-reads it with other code.

    checkpoint = PackedCheckpoint.open(packed)
    FORMATS["gptq"].write(checkpoint, out, ExportOptions())
    require_passed(FORMATS["gptq"].verify(checkpoint, out, ExportOptions()))

Layouts: docs/export-formats.md. Imports of other tools' checkpoints: `qatcli.formats.importing`.
"""

from __future__ import annotations

from qatcli.formats import awq, bitblas, compressed_tensors, dense, gguf, gptq, native
from qatcli.formats.contract import ExportOptions, Format, Verification, require_passed

__all__ = ["FORMATS", "ExportOptions", "Format", "Verification", "require_passed"]

FORMATS = {
    row.name: row
    for row in (
        Format("gptq", "GPTQModel, transformers, vLLM, SGLang, T-MAC", gptq.BITS, gptq.write, gptq.verify),
        Format("bitblas", "GPTQModel's BitBLAS kernel", bitblas.BITS, bitblas.write, bitblas.verify),
        Format("native", "qat and transformers", native.BITS, native.write, native.verify),
        Format("gguf", "llama.cpp and what builds on it", gguf.BITS, gguf.write, gguf.verify),
        Format("awq", "vLLM, SGLang, transformers, MLX at 4 bits", awq.BITS, awq.write, awq.verify),
        Format(
            "compressed-tensors",
            "vLLM without a flag, transformers",
            compressed_tensors.BITS,
            compressed_tensors.write,
            compressed_tensors.verify,
        ),
        Format("dense", "any tool, in half precision", dense.BITS, dense.write, dense.verify),
    )
}
