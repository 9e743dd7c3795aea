"""BitBLAS export: GPTQModel's pre-packed kernel layout, written with numpy because importing bitblas needs a GPU.

Tensors are in `layouts.bitblas`; 3-bit codes ride in a 4-bit container, so the config says 4 bits. No reader of this
layout runs without CUDA: verification is our independent reader, which the golden vectors prove.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path

from qatcli.formats import deployment, readback, source
from qatcli.formats.compare import Settings, TensorFiles, compare_directory
from qatcli.formats.contract import ExportOptions, Verification
from qatcli.formats.gptq import declared, quantization_config, refuse_groups, refuse_sizes
from qatcli.formats.layouts import bitblas as layout
from qatcli.formats.model_directory import write_directory
from qatcli.packed import PackedCheckpoint

BITS = (2, 3, 4, 8)
GROUPS = (-1, 32, 64, 128)
_CONTAINERS = {bits: layout.container_bits(bits) for bits in BITS}
_NOTE = "not run in GPTQModel: its BitBLAS kernel needs CUDA; the integers were compared"


def write(checkpoint: PackedCheckpoint, out: Path, options: ExportOptions) -> None:
    """Write the BitBLAS directory. QatError for what `refuse` names."""
    refuse(checkpoint, options)
    source.survey(checkpoint)
    config = quantization_config(checkpoint, symmetric=False, layout_name="bitblas", containers=_CONTAINERS)
    write_directory(
        checkpoint,
        out,
        format_name="bitblas",
        pack_linear=partial(_pack, zeros_name=options.bitblas_zeros),
        quantization=config,
        deployments=deployment.bitblas(checkpoint, options.bitblas_zeros),
        options=options,
        extra_files={"quantize_config.json": config},
    )


def compare(checkpoint: PackedCheckpoint, out: Path, options: ExportOptions) -> Verification:
    """Undo interleave and compression with the independent reader and compare the integers."""
    found = compare_directory(
        checkpoint,
        out,
        "bitblas",
        partial(_read, options.bitblas_zeros),
        declared,
        suffixes=("qweight", options.bitblas_zeros, "scales"),
        kinds=_kinds(checkpoint),
        settings_beside="quantize_config.json",
    )
    return found.with_note(_NOTE)


def refuse(checkpoint: PackedCheckpoint, _options: ExportOptions) -> None:
    """QatError for group sizes, sizes or bits its kernel would misread."""
    source.refuse_quantized_head(checkpoint, "bitblas")
    refuse_sizes(checkpoint, "bitblas", 32)
    refuse_groups(checkpoint, "bitblas", GROUPS, hint="export gptq, which takes more, or compressed-tensors")
    main = Counter(_kinds(checkpoint).values()).most_common(1)[0][0]
    others = [f"{name} {kind}" for name, kind in _kinds(checkpoint).items() if kind != main]
    source.refuse_if(
        others,
        f"GPTQModel gives every BitBLAS linear the same bits and group size, here {main}, whatever `dynamic` says",
        hint="export gptq, which takes several",
    )


def _pack(linear: source.Arrays, *, zeros_name: str) -> layout.Arrays:
    return layout.pack_linear(linear.codes, linear.zero_point, linear.scale, bits=linear.bits, zeros_name=zeros_name)


def _kinds(checkpoint: PackedCheckpoint) -> dict[str, tuple[int, int]]:
    """Bits of the container and group size of every linear."""
    return {name: (_CONTAINERS[quant.bits], quant.group_size) for name, quant in checkpoint.modules.items()}


def _read(zeros_name: str, settings: Settings, files: TensorFiles, name: str) -> readback.Triple:
    qweight, zeros, scales = (files.array(f"{name}.{suffix}") for suffix in ("qweight", zeros_name, "scales"))
    if settings["checkpoint_format"] != "bitblas" or settings["sym"]:
        raise ValueError("the settings say another layout, or symmetric, which has no zero points")
    return readback.bitblas(qweight, zeros, scales, bits=settings["bits"])
