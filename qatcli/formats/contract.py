"""What every export format is: plain functions with one signature, and the two records they exchange."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from qatcli.errors import VerificationError
from qatcli.packed import PackedCheckpoint


@dataclass(frozen=True)
class ExportOptions:
    """Choices of the user that only some formats read; the defaults are what a current runtime wants.

    dtype            native, dense: "float16" or "bfloat16" for everything that is not quantized (others: float16)
    max_shard_bytes  size above which a new safetensors shard begins
    awq_promote      let 2- and 3-bit codes ride in AWQ's 4 bits, and unify group sizes by repeating scales
    bitblas_zeros    name of the zero-point tensor: "qzeros" (GPTQModel 5 and later) or "zeros"
    gguf_type        "auto" (smallest that fits), "exact" (no rounded offset) or a block type such as "Q8_0"
    gguf_embedding   "F16" or "Q8_0" for embeddings and lm_head
    runtimes         load the export in the libraries that serve it and compare logits, beside comparing integers
    resume           keep the whole shards that a killed write of the same checkpoint with the same options left
    """

    dtype: str = "float16"
    max_shard_bytes: float = 5e9
    awq_promote: bool = False
    bitblas_zeros: str = "qzeros"
    gguf_type: str = "auto"
    gguf_embedding: str = "F16"
    runtimes: bool = True
    resume: bool = False


@dataclass(frozen=True)
class Verification:
    """What re-reading an export found; `passed` decides, `notes` say what could not be checked and why."""

    format: str
    verifier: str
    modules: int
    codes_equal: bool
    zero_points_equal: bool
    scales_equal: bool
    differences: tuple[str, ...] = ()
    max_logit_difference: float | None = None
    logit_tolerance: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return self.codes_equal and self.zero_points_equal and self.scales_equal and not self.differences

    def with_runtime(self, report: RuntimeReport) -> Verification:
        """This verification extended by what a runtime found."""
        largest = [d for d in (self.max_logit_difference, report.max_logit_difference) if d is not None]
        return replace(
            self,
            verifier=f"{self.verifier}, {report.runtime}" if report.ran else self.verifier,
            differences=self.differences + report.differences,
            max_logit_difference=max(largest) if largest else None,
            logit_tolerance=report.logit_tolerance if report.ran else self.logit_tolerance,
            notes=self.notes + report.notes,
        )

    def with_note(self, note: str) -> Verification:
        """This verification with one more note."""
        return replace(self, notes=(*self.notes, note))

    def to_json(self) -> dict[str, Any]:
        """The content of verify.json."""
        return {**asdict(self), "passed": self.passed}


@dataclass(frozen=True)
class RuntimeReport:
    """What one runtime made of an export; `ran` is False when it is not installed.

    `perplexity` and `text`, a greedy continuation, are measured when windows of tokens were given.
    """

    runtime: str
    ran: bool
    differences: tuple[str, ...] = ()
    max_logit_difference: float | None = None
    logit_tolerance: float | None = None
    notes: tuple[str, ...] = ()
    perplexity: float | None = None
    text: str | None = None


@dataclass(frozen=True)
class Deployment:
    """One row of the deployment matrix: which releases of a runtime run this export, and how."""

    runtime: str
    releases: str
    command: str
    remark: str = ""


Write = Callable[[PackedCheckpoint, Path, ExportOptions], None]
Compare = Callable[[PackedCheckpoint, Path, ExportOptions], Verification]
Refuse = Callable[[PackedCheckpoint, ExportOptions], None]


def require_passed(verification: Verification) -> None:
    """VerificationError naming the first differences of a verification that failed."""
    if verification.passed:
        return
    shown = "; ".join(verification.differences[:3])
    more = len(verification.differences) - 3
    raise VerificationError(
        f"the {verification.format} export differs from its source: {shown}{f' and {more} more' if more > 0 else ''}",
        hint="do not use this export: write it again; if it fails again, report it with the export's log.jsonl",
    )
