"""AWQ (GEMM) export: 4 bits, one group size for the whole model; what every current server detects by itself.

Tensors are in `layouts.awq`. With `awq_promote`, 2- and 3-bit codes ride unchanged in the 4-bit fields and groups are
cut to one common size by repeating scales and zero points: exact, but 4 bits of storage.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

from qatcli.errors import QatError
from qatcli.formats import deployment, readback, source
from qatcli.formats.compare import Kind, Settings, TensorFiles, compare_directory
from qatcli.formats.contract import ExportOptions, Verification
from qatcli.formats.gptq import refuse_sizes
from qatcli.formats.layouts import awq as layout
from qatcli.formats.model_directory import write_directory
from qatcli.packed import PackedCheckpoint

BITS = (2, 3, 4)
GROUPS = (128, 64, 32)  # what the kernels of all servers take
# In which transformers and vLLM put a scaled activation behind some linears, whose scales AutoAWQ writes.
SCALED = ("falcon", "gpt_neox", "gptj", "starcoder2")
_PROMOTE = "export with awq_promote, which stores them in 4 bits, or export compressed-tensors"


def write(checkpoint: PackedCheckpoint, out: Path, options: ExportOptions) -> None:
    """Write the AWQ directory. QatError for what `refuse` names."""
    refuse(checkpoint, options)
    source.survey(checkpoint)
    group = group_size(checkpoint, promote=options.awq_promote)
    config: dict[str, Any] = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": source.dense_linears(checkpoint) or None,
    }
    write_directory(
        checkpoint,
        out,
        format_name="awq",
        pack_linear=partial(_pack, group=group),
        quantization=config,
        deployments=deployment.awq(checkpoint),
        options=options,
    )


def compare(checkpoint: PackedCheckpoint, out: Path, options: ExportOptions) -> Verification:
    """Read the nibbles back and compare."""
    group = group_size(checkpoint, promote=options.awq_promote)

    def expected(name: str) -> source.Arrays:
        return _expand(source.arrays(checkpoint, name), group)

    return compare_directory(
        checkpoint,
        out,
        "awq",
        _read,
        _declared,
        suffixes=("qweight", "qzeros", "scales"),
        kinds=dict.fromkeys(checkpoint.modules, (4, group)),
        expected=expected,
    )


def refuse(checkpoint: PackedCheckpoint, options: ExportOptions) -> None:
    """QatError for bits, sizes or mixed groups it cannot say, and for families whose activations readers scale."""
    source.refuse_quantized_head(checkpoint, "awq")
    carried = BITS if options.awq_promote else (4,)
    source.refuse_bits(checkpoint, "awq", carried, hint=_PROMOTE)
    refuse_sizes(checkpoint, "awq", 32)
    group_size(checkpoint, promote=options.awq_promote)
    family = checkpoint.config["model_type"]
    if family in SCALED:
        hint = "export compressed-tensors, or dense"
        raise QatError(f"awq's readers scale the activations of {family}, as we do not", hint=hint)


def group_size(checkpoint: PackedCheckpoint, *, promote: bool) -> int:
    """The one group size of the file: the model's own, or with `promote` the largest that divides all of its groups."""
    sizes = {q.group_size for q in checkpoint.modules.values()}
    if len(sizes) == 1 and sizes <= set(GROUPS):
        return sizes.pop()
    if not promote:
        raise QatError(f"awq takes one group size of {sorted(GROUPS)}, got {sorted(sizes)}", hint=_PROMOTE)
    common = math.gcd(*(q.in_features if q.group_size == -1 else q.group_size for q in checkpoint.modules.values()))
    fitting = [group for group in GROUPS if common % group == 0]
    if not fitting:
        raise QatError(f"no group size of {sorted(GROUPS)} divides {common}", hint="export compressed-tensors")
    return fitting[0]


def _expand(linear: source.Arrays, group: int) -> source.Arrays:
    return source.expand_groups(linear, linear.codes.shape[1] // group)


def _pack(linear: source.Arrays, *, group: int) -> layout.Arrays:
    linear = _expand(linear, group)
    return layout.pack_linear(linear.codes, linear.zero_point, linear.scale)


def _declared(settings: Settings, name: str) -> Kind | None:
    dense = any(part in name for part in settings["modules_to_not_convert"] or [])
    return None if dense else (settings["bits"], settings["group_size"])


def _read(settings: Settings, files: TensorFiles, name: str) -> readback.Triple:
    if settings["quant_method"] != "awq" or settings["version"] != "gemm" or not settings["zero_point"]:
        raise ValueError("the settings say another layout")
    return readback.awq(*(files.array(f"{name}.{suffix}") for suffix in ("qweight", "qzeros", "scales")))
