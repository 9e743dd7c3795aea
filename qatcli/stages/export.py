"""export: one format that another runtime serves, written, read back with other code, and compared bit for bit.

Reads:  packed.
Writes: exported, one directory per format: the files of that format, a model card that says which runtime runs them
        with which command, and verify.json.
A difference found after writing fails the stage, and nothing appears under the final name.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from qatcli.directory import LOG_FILE, RESUME_FILE, STAGE_FILE, adopt, write_json
from qatcli.errors import QatError
from qatcli.formats import FORMATS, ExportOptions, Verification, require_passed
from qatcli.formats.card import deployments_of
from qatcli.formats.deployment import NOT_IN_FLOAT16
from qatcli.inputs import read_json
from qatcli.packed import DTYPE_KEYS, PackedCheckpoint
from qatcli.recipe.schema import ExportSection
from qatcli.stages import Job

VERIFICATION = "verify.json"
WRITTEN = "written"  # the export until it is verified


def run(job: Job) -> dict[str, Any]:
    """Write and verify the format that the job names. A killed run keeps its whole shards, then the written export."""
    written = job.out / WRITTEN
    if not (job.out / VERIFICATION).is_file():  # else it was killed while the files were moved
        checkpoint = PackedCheckpoint.open(job.input.path)
        options = export_options(job.recipe.export, checkpoint)
        if not written.is_dir():
            FORMATS[job.variant].write(checkpoint, written, options)
        if job.recipe.export.verify:
            _verify(job, checkpoint, written, options)
    if written.is_dir():
        adopt(written, job.out)
    job.log.say(f"{job.variant} runs in, with these commands in its folder:\n{deployments_of(job.out)}")
    own = (VERIFICATION, LOG_FILE, RESUME_FILE, STAGE_FILE)
    size = sum(file.stat().st_size for file in job.out.rglob("*") if file.is_file() and file.name not in own)
    metrics: dict[str, Any] = {"format": job.variant, "bytes": size, "verified": job.recipe.export.verify}
    if not job.recipe.export.verify:
        job.log.warn(f"{job.variant}: NOT verified, as asked; nobody knows whether this export is right")
        return metrics
    return metrics | {"verification": read_json(job.out / VERIFICATION)}


def _verify(job: Job, checkpoint: PackedCheckpoint, written: Path, options: ExportOptions) -> None:
    """Write verify.json, or remove what was written and raise VerificationError."""
    runtimes = FORMATS[job.variant].runtimes if options.runtimes else ()
    job.log.say(f"{job.variant}: written; reading it back" + f", then in {' and '.join(runtimes)}" * bool(runtimes))
    verification = FORMATS[job.variant].verify(checkpoint, written, options)
    if not options.runtimes:
        verification = verification.with_note("not loaded in any library: export.runtimes is false")
    for note in verification.notes:
        job.log.say(f"{job.variant}: {note}")
    try:
        require_passed(verification)
    except QatError:
        job.log.event("verification", **verification.to_json())
        shutil.rmtree(written)
        raise
    write_json(job.out / VERIFICATION, verification.to_json())
    job.log.say(f"{job.variant}: verified, {summary(verification)}")


def summary(verification: Verification) -> str:
    """One line about a verification that passed: what is equal, by whose reading, and how far logits are apart."""
    line = f"{verification.modules} linears have equal codes, zero points and scales, read by {verification.verifier}"
    if verification.max_logit_difference is None:
        return line
    largest, allowed = verification.max_logit_difference, verification.logit_tolerance
    return f"{line}; logits differ by at most {largest:.3g}, {allowed:.3g} is allowed"


def export_options(section: ExportSection, checkpoint: PackedCheckpoint) -> ExportOptions:
    """The formats' options as the recipe sets them. The stage's own directory is resumed by equal options only."""
    config = checkpoint.config
    wide = config.get("model_type") in NOT_IN_FLOAT16 or "bfloat16" in (config.get(key) for key in DTYPE_KEYS)
    return ExportOptions(
        dtype=("bfloat16" if wide else "float16") if section.dtype == "auto" else section.dtype,
        max_shard_bytes=section.max_shard_gb * 1e9,
        awq_promote=section.awq_promote,
        bitblas_zeros=section.bitblas_zeros,
        gguf_type=section.gguf_type,
        gguf_embedding=section.gguf_embedding,
        runtimes=section.runtimes,
        resume=True,
    )
