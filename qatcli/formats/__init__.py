"""Export formats: one row each. `write` makes a directory complete or not at all, `verify` re-reads it with other code.

    checkpoint = PackedCheckpoint.open(packed)
    FORMATS["gptq"].write(checkpoint, out, ExportOptions())
    require_passed(FORMATS["gptq"].verify(checkpoint, out, ExportOptions()))

Layouts: docs/export-formats.md. Imports of other tools' checkpoints: `qatcli.formats.importing`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qatcli.formats import awq, bitblas, compressed_tensors, dense, gguf, gptq, mlx, native
from qatcli.formats.contract import Compare, ExportOptions, Refuse, Verification, Write, require_passed
from qatcli.formats.runtimes import verify_in
from qatcli.packed import PackedCheckpoint

__all__ = ["FORMATS", "ExportOptions", "Format", "Verification", "require_passed"]


@dataclass(frozen=True)
class Format:
    """One export format.

    `write` makes the directory `out` or nothing; `compare` re-reads it with other code, and `runtimes`, keys of
    `qatcli.formats.runtimes.RUNTIMES`, run it where they are installed. `refuse` raises QatError for what `write` would
    refuse whatever the values: it asks for the config and for bits and sizes of the linears. Its bits: FORMAT_BITS.
    """

    name: str
    write: Write
    compare: Compare
    runtimes: tuple[str, ...]
    refuse: Refuse | None = None

    def verify(self, checkpoint: PackedCheckpoint, out: Path, options: ExportOptions) -> Verification:
        """Whether `out` holds what the checkpoint does, by our own reading and, if that agrees, in the runtimes."""
        found = self.compare(checkpoint, out, options)
        return verify_in(found, self.runtimes, checkpoint, out) if options.runtimes else found


_ROWS = (
    Format("gptq", gptq.write, gptq.compare, ("gptqmodel", "transformers"), gptq.refuse),
    Format("bitblas", bitblas.write, bitblas.compare, (), bitblas.refuse),  # its kernel needs CUDA
    Format("native", native.write, native.compare, ("transformers-native",)),
    Format("gguf", gguf.write, gguf.compare, ("gguf", "llama.cpp"), gguf.refuse),
    Format("awq", awq.write, awq.compare, ("gptqmodel", "transformers"), awq.refuse),
    Format("compressed-tensors", compressed_tensors.write, compressed_tensors.compare, ("compressed-tensors",)),
    Format("mlx", mlx.write, mlx.compare, ("mlx",), mlx.refuse),
    Format("dense", dense.write, dense.compare, ("transformers-dense",)),
)
FORMATS = {row.name: row for row in _ROWS}
