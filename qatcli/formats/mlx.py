"""MLX export: what mlx-lm, LM Studio and others run on Apple's chips. Codes stay as they are trained.

Tensors are in `layouts.mlx`; config.json's `quantization` says bits and group size, and those of linears that differ
from most by their names. MLX computes in the type of the scales, which is fp16 (bf16 would lose 3 bits of them), so all
other tensors are, too.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from qatcli.errors import QatError
from qatcli.formats import deployment, readback, source
from qatcli.formats.compare import Kind, Settings, TensorFiles, compare_directory
from qatcli.formats.contract import ExportOptions, Verification
from qatcli.formats.layouts import mlx as layout
from qatcli.formats.model_directory import write_directory
from qatcli.packed import PackedCheckpoint

SETTINGS = "quantization"  # in config.json
SUFFIXES = ("weight", "scales", "biases")
GROUPS = (32, 64, 128)  # what its kernels take
# Families whose logits mlx-lm was seen to compute (Gemma 2 and 3 are not: NOT_IN_FLOAT16).
FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "phi",
    "phi3",
    "olmo2",
    "stablelm",
    "granite",
    "smollm3",
    "starcoder2",
)
_HINT = "export gguf, which runs on Apple's chips, too, or dense"


def write(checkpoint: PackedCheckpoint, out: Path, options: ExportOptions) -> None:
    """Write the MLX directory. QatError for what `refuse` names, and for scales of 0, whose zero points it loses."""
    refuse(checkpoint, options)
    source.survey(checkpoint)
    write_directory(
        checkpoint,
        out,
        format_name="mlx",
        pack_linear=_pack,
        quantization=_settings(checkpoint),
        settings_key=SETTINGS,
        deployments=deployment.mlx(checkpoint),
        options=options,
    )


def compare(checkpoint: PackedCheckpoint, out: Path, options: ExportOptions) -> Verification:
    """Compare the integers; an offset must be the very rounding of -s z."""
    return compare_directory(
        checkpoint, out, "mlx", _read, partial(_declared, checkpoint), suffixes=SUFFIXES, settings_key=SETTINGS
    )


def refuse(checkpoint: PackedCheckpoint, options: ExportOptions) -> None:
    """QatError for groups that its kernels do not take, and families that it computes otherwise, or in float16 not."""
    family = str(checkpoint.config.get("model_type"))
    if family in deployment.NOT_IN_FLOAT16:
        raise QatError(f"mlx would compute in float16, which the activations of {family} leave", hint=_HINT)
    if family not in FAMILIES:
        raise QatError(f"MLX export knows {', '.join(FAMILIES)}, not {family}", hint=_HINT)
    wrong = [f"{name} ({q.group_size})" for name, q in checkpoint.modules.items() if q.group_size not in GROUPS]
    source.refuse_if(wrong, f"mlx takes group sizes of {list(GROUPS)} only", hint=_HINT)


def _settings(checkpoint: PackedCheckpoint) -> dict[str, Any]:
    """Bits and group size of most linears, and by name those of others. What has no scales is not quantized."""
    common = source.majority(checkpoint)
    others = {name: _entry(*quant.kind) for name, quant in checkpoint.modules.items() if quant.kind != common}
    return {**_entry(*common), **others}


def _entry(bits: int, group_size: int) -> dict[str, int]:
    return {"group_size": group_size, "bits": bits}


def _pack(linear: source.Arrays) -> layout.Arrays:
    if not linear.scale.all():
        raise QatError("a scale is 0, of which MLX would not know the zero point", hint=_HINT)
    return layout.pack_linear(linear.codes, linear.zero_point, linear.scale, bits=linear.bits)


def _declared(checkpoint: PackedCheckpoint, settings: Settings, name: str) -> Kind | None:
    """What the settings say of a linear; mlx-lm asks whether there are scales before it asks them."""
    entry = settings.get(name, settings if name in checkpoint.modules else None)
    return entry and (entry["bits"], entry["group_size"])


def _read(settings: Settings, files: TensorFiles, name: str) -> readback.Triple:
    bits = settings.get(name, settings)["bits"]
    return readback.mlx(*(files.array(f"{name}.{suffix}") for suffix in SUFFIXES), bits=bits)
