"""import: a checkpoint of another tool becomes our packed form, codes, zero points and scales as they are.

Reads:  a checkpoint directory of another tool (--from).
Writes: packed, so that eval, export and e2e-qp work on models people already have.
"""

from __future__ import annotations

from typing import Any

from qatcli.directory import adopt
from qatcli.formats.importing import import_checkpoint
from qatcli.models.refusal import refused
from qatcli.packed import PackedCheckpoint
from qatcli.sizes import packed_size
from qatcli.stages import Job


def run(job: Job) -> dict[str, Any]:
    """Convert the checkpoint given with --from."""
    written = job.out / "written"
    if not written.is_dir():  # else it was killed while the files were moved
        with refused(f"{job.input.path} cannot be imported"):
            import_checkpoint(job.input.path, written)
    adopt(written, job.out)
    checkpoint = PackedCheckpoint.open(job.out)
    return {"linears": len(checkpoint.modules), **packed_size(checkpoint)}
