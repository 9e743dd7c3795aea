"""export: one format that another runtime serves, written, read back with other code, and compared bit for bit.

Reads:  packed.
Writes: exported, one directory per format: the files of that format, a model card that says which runtime runs them
        with which command, and verify.json.
A difference found after writing fails the stage, and nothing appears under the final name.
"""

from __future__ import annotations

from typing import Any

from qatcli.directory import adopt, write_json
from qatcli.errors import QatError
from qatcli.formats import FORMATS, ExportOptions, require_passed
from qatcli.packed import PackedCheckpoint
from qatcli.recipe.schema import ExportSection
from qatcli.stages import Job

VERIFICATION = "verify.json"


def run(job: Job) -> dict[str, Any]:
    """Write and verify the format that the job names."""
    chosen = FORMATS[job.variant]
    checkpoint = PackedCheckpoint.open(job.input.path)
    options = export_options(job.recipe.export)
    # Formats make their directory complete or not at all; inside the stage's own it is taken apart again.
    written = job.out / "written"
    chosen.write(checkpoint, written, options)
    adopt(written, job.out)
    size = sum(file.stat().st_size for file in job.out.rglob("*") if file.is_file())
    metrics: dict[str, Any] = {"format": chosen.name, "bytes": size, "verified": False}
    if not job.recipe.export.verify:
        job.log.warn(f"{chosen.name}: NOT verified, as asked; nobody knows whether this export is right")
        return metrics
    verification = chosen.verify(checkpoint, job.out, options)
    write_json(job.out / VERIFICATION, verification.to_json())
    for note in verification.notes:
        job.log.say(f"{chosen.name}: {note}")
    try:
        require_passed(verification)
    except QatError:
        job.log.event("verification", **verification.to_json())
        raise
    return metrics | {"verified": True, "verification": verification.to_json()}


def export_options(section: ExportSection) -> ExportOptions:
    """The formats' options as the recipe sets them."""
    return ExportOptions(
        dtype=section.dtype,
        max_shard_bytes=section.max_shard_gb * 1e9,
        awq_promote=section.awq_promote,
        bitblas_zeros=section.bitblas_zeros,
        gguf_type=section.gguf_type,
        gguf_embedding=section.gguf_embedding,
        runtimes=section.runtimes,
    )
