"""GPTQ export: version 2 ("gptq_v2") for asymmetric models, version 1 when every zero point is 2^(bits-1).

Tensors are in `layouts.gptq`. config.json["quantization_config"] and an identical quantize_config.json say bits,
group size, `sym` (its absence would mean true) and the version; linears that stay dense are `"-:regex"` entries of
`dynamic`, linears with other bits or groups `"+:regex"` entries, as GPTQModel, vLLM and SGLang read them. transformers
reads neither: it gets a list of what is quantized, and cannot load a model of several bits or group sizes.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from qatcli import __version__
from qatcli.formats import deployment, readback, source
from qatcli.formats.compare import Kind, Settings, TensorFiles, compare_directory
from qatcli.formats.contract import ExportOptions, Verification
from qatcli.formats.layouts import gptq as layout
from qatcli.formats.model_directory import write_directory
from qatcli.packed import PackedCheckpoint

SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")
GROUPS = (-1, 16, 32, 64, 128, 256, 512, 1024)  # GPTQModel's, the one kernel that takes every number of bits


def write(checkpoint: PackedCheckpoint, out: Path, options: ExportOptions) -> None:
    """Write the GPTQ directory. QatError for what `refuse` names."""
    refuse(checkpoint, options)
    symmetric = source.survey(checkpoint)
    config = quantization_config(checkpoint, symmetric=symmetric, layout_name="gptq" if symmetric else "gptq_v2")
    write_directory(
        checkpoint,
        out,
        format_name="gptq",
        pack_linear=partial(_pack, version=1 if symmetric else 2),
        quantization=config,
        deployments=deployment.gptq(checkpoint, symmetric=symmetric),
        options=options,
        extra_files={"quantize_config.json": config},
    )


def compare(checkpoint: PackedCheckpoint, out: Path, options: ExportOptions) -> Verification:
    """Read the integers back as the directory's own config says they are stored."""
    return compare_directory(
        checkpoint, out, "gptq", _read, declared, suffixes=SUFFIXES, settings_beside="quantize_config.json"
    )


def refuse(checkpoint: PackedCheckpoint, _options: ExportOptions) -> None:
    """QatError for sizes that are no multiples of 32, groups that no kernel takes, or a quantized output head."""
    source.refuse_quantized_head(checkpoint, "gptq")
    refuse_sizes(checkpoint, "gptq", 32)
    refuse_groups(checkpoint, "gptq", GROUPS, hint="export compressed-tensors, which takes any")


def refuse_sizes(checkpoint: PackedCheckpoint, format_name: str, multiple: int) -> None:
    """QatError naming the linears whose sides are no multiples of `multiple`."""
    wrong = [
        f"{name} [{quant.out_features}, {quant.in_features}]"
        for name, quant in checkpoint.modules.items()
        if quant.out_features % multiple or quant.in_features % multiple
    ]
    hint = "put them into quant.skip so that they stay dense, or export compressed-tensors, which takes any size"
    source.refuse_if(wrong, f"{format_name} needs sizes that are multiples of {multiple}", hint=hint)


def refuse_groups(checkpoint: PackedCheckpoint, format_name: str, taken: tuple[int, ...], *, hint: str) -> None:
    """QatError naming the linears whose group size no kernel takes."""
    wrong = [f"{name} (group {q.group_size})" for name, q in checkpoint.modules.items() if q.group_size not in taken]
    source.refuse_if(wrong, f"{format_name} takes group sizes {list(taken)}", hint=hint)


def quantization_config(
    checkpoint: PackedCheckpoint, *, symmetric: bool, layout_name: str, containers: dict[int, int] | None = None
) -> dict[str, Any]:
    """The GPTQ quantization_config. `containers` maps bits to what the file stores (BitBLAS: 3 in 4)."""
    stored = containers or {}
    kinds = {name: (stored.get(q.bits, q.bits), q.group_size) for name, q in checkpoint.modules.items()}
    main_bits, group_size = source.majority(checkpoint)
    bits = stored.get(main_bits, main_bits)
    others: dict[tuple[int, int], list[str]] = defaultdict(list)
    for name, kind in kinds.items():
        if kind != (bits, group_size):
            others[kind].append(name)
    dynamic: dict[str, dict[str, int]] = {}
    for (other_bits, other_group), names in others.items():
        settings = {"bits": other_bits, "group_size": other_group}
        dynamic |= {f"+:{pattern}": settings for pattern in patterns(names)}
    skipped = source.dense_linears(checkpoint)
    dynamic |= {f"-:{pattern}": {} for pattern in patterns(skipped)}
    # The same for optimum, through which transformers loads: it has no `dynamic` and would make them all quantized.
    only = {"modules_in_block_to_quantize": [sorted(checkpoint.modules)]} if skipped else {}
    return {
        "quant_method": "gptq",
        "method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "sym": symmetric,
        "desc_act": False,
        "checkpoint_format": layout_name,
        "format": layout_name,
        "lm_head": False,
        "pack_dtype": "int32",
        "true_sequential": True,
        "damp_percent": 0.01,
        "dynamic": dynamic,
        **only,
        "meta": {"quantizer": [f"qat:{__version__}"]},
    }


def patterns(names: Iterable[str]) -> list[str]:
    """One anchored regular expression per parent module.

    Where all parts of a linear that vLLM and SGLang merge are there, the merged name, which they look up, is added.
    """
    leaves: dict[str, list[str]] = defaultdict(list)
    for name in names:
        parent, _, leaf = name.rpartition(".")
        leaves[parent].append(leaf)
    found = []
    for parent, group in leaves.items():
        group += [merged for merged, parts in deployment.MERGED.items() if set(parts) <= set(group)]
        prefix = re.escape(parent + ".") if parent else ""
        found.append(f"^{prefix}({'|'.join(map(re.escape, group))})$")
    return found


def _pack(linear: source.Arrays, *, version: int) -> layout.Arrays:
    return layout.pack_linear(linear.codes, linear.zero_point, linear.scale, bits=linear.bits, version=version)


def declared(settings: Settings, name: str) -> Kind | None:
    """Bits and group size that GPTQ settings give a linear, as GPTQModel reads them; None where it stays dense."""
    for pattern, override in settings.get("dynamic", {}).items():
        if re.match(pattern[2:], name):
            return None if pattern.startswith("-:") else (override["bits"], override["group_size"])
    return settings["bits"], settings["group_size"]


def _read(settings: Settings, files: TensorFiles, name: str) -> readback.Triple:
    bits = (declared(settings, name) or (0, 0))[0]
    if not bits or settings["desc_act"]:
        raise ValueError("the settings say that it is not quantized, or in another order of columns")
    qweight, qzeros, scales, g_idx = (files.array(f"{name}.{suffix}") for suffix in SUFFIXES)
    if not np.array_equal(g_idx, np.arange(len(g_idx)) * len(scales) // len(g_idx)):
        raise ValueError("g_idx is not in order")
    minus_one = settings["checkpoint_format"] == "gptq"
    found = readback.gptq(qweight, qzeros, scales, bits=bits, stored_minus_one=minus_one)
    if settings["sym"] and (found.zero_point != 1 << (bits - 1)).any():
        raise ValueError("the settings say symmetric, its zero points are not in the middle")
    return found
