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
        Format("gptq", gptq.BITS, gptq.write, gptq.verify, gptq.RUNTIMES, gptq.refuse),
        Format("bitblas", bitblas.BITS, bitblas.write, bitblas.verify, bitblas.RUNTIMES, bitblas.refuse),
        Format("native", native.BITS, native.write, native.verify, native.RUNTIMES),
        Format("gguf", gguf.BITS, gguf.write, gguf.verify, gguf.RUNTIMES, gguf.refuse),
        Format("awq", awq.BITS, awq.write, awq.verify, awq.RUNTIMES, awq.refuse),
        Format(
            "compressed-tensors",
            compressed_tensors.BITS,
            compressed_tensors.write,
            compressed_tensors.verify,
            compressed_tensors.RUNTIMES,
        ),
        Format("dense", dense.BITS, dense.write, dense.verify, dense.RUNTIMES),
    )
}
