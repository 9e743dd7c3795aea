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
from qatcli.formats.rope import not_carried, rope_parameters
from qatcli.packed import PackedCheckpoint

SETTINGS = "quantization"  # in config.json
SUFFIXES = ("weight", "scales", "biases")
GROUPS = (32, 64, 128)  # what its kernels take
_SCALED = ("default", "linear", "dynamic", "llama3", "yarn")
# Families whose logits mlx-lm was seen to compute, by the kinds of rotary embeddings. Gemma 2 and 3 are NOT_IN_FLOAT16;
# Phi, StableLM and StarCoder2 stretch no positions there and lack some of their settings.
FAMILIES = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "olmo2", "granite", "smollm3"), _SCALED),
    "phi3": ("default",),
}
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
    """QatError for groups that its kernels do not take, and for models that mlx-lm computes otherwise."""
    family = str(checkpoint.config.get("model_type"))
    if family in deployment.NOT_IN_FLOAT16:
        raise QatError(f"mlx would compute in float16, which the activations of {family} leave", hint=_HINT)
    if family not in FAMILIES:
        raise QatError(f"MLX export knows {', '.join(FAMILIES)}, not {family}", hint=_HINT)
    config = source.full_config(checkpoint.config).to_dict()
    rope = rope_parameters(config)
    kind = {} if rope["rope_type"] in FAMILIES[family] else {"rope_type": rope["rope_type"]}
    if lost := not_carried(rope) | kind:
        raise QatError(f"mlx-lm does not compute these settings of {family}'s rotary embedding: {lost}", hint=_HINT)
    if config["hidden_act"] != "silu":
        raise QatError(f"mlx-lm computes {family} with silu, this model has {config['hidden_act']}", hint=_HINT)
    wrong = [f"{name} ({q.group_size})" for name, q in checkpoint.modules.items() if q.group_size not in GROUPS]
    source.refuse_if(wrong, f"mlx takes group sizes of {list(GROUPS)} only", hint=_HINT)


def _settings(checkpoint: PackedCheckpoint) -> dict[str, Any]:
    """Bits and group size of most linears, and by name those of others. What has no scales is not quantized."""
    bits, group_size = source.majority(checkpoint)
    others = {name: quant for name, quant in checkpoint.modules.items() if quant.kind != (bits, group_size)}
    named = {name: {"group_size": quant.group_size, "bits": quant.bits} for name, quant in others.items()}
    return {"group_size": group_size, "bits": bits, **named}


def _pack(linear: source.Arrays) -> layout.Arrays:
    if not linear.scale.all():
        raise QatError("a scale is 0, of which MLX would not know the zero point", hint=_HINT)
    return layout.pack_linear(linear.codes, linear.zero_point, linear.scale, bits=linear.bits)


def _declared(checkpoint: PackedCheckpoint, settings: Settings, name: str) -> Kind | None:
    """What the settings say of a linear: by its name, else, where it has scales, what they say of all."""
    entry = settings.get(name, settings if name in checkpoint.modules else None)
    return None if entry is None else (entry["bits"], entry["group_size"])


def _read(settings: Settings, files: TensorFiles, name: str) -> readback.Triple:
    bits = settings.get(name, settings)["bits"]
    return readback.mlx(*(files.array(f"{name}.{suffix}") for suffix in SUFFIXES), bits=bits)
