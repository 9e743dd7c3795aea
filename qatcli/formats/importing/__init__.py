"""Checkpoints of other tools become our packed form, so that eval, export and e2e-qp work on them.

    import_checkpoint(Path("Llama-2-7b-EfficientQAT-w2g64"), Path("packed"))

Read are EfficientQAT's native checkpoints (3 bits at 10 codes per word), GPTQ versions 1 and 2, AWQ (gemm), AutoRound's
own, which are one of these, BitBLAS, compressed-tensors (pack-quantized) and MLX (affine, with offsets of whole steps,
as ours). Codes, zero points and scales are taken as they are: nothing is quantized again.
Left out: activation order (`desc_act` with columns out of order), which our layout cannot say, and pickled files.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qatcli.errors import InputError
from qatcli.formats import readback
from qatcli.formats.atomic import atomic_directory
from qatcli.formats.compare import TensorFiles
from qatcli.formats.importing.linears import (
    CODES,
    IN_ORDER,
    KINDS,
    ORDERS,
    PARTS,
    REORDERED,
    Storage,
    read_linear,
    storage_of,
)
from qatcli.formats.source import skeleton
from qatcli.inputs import read_json
from qatcli.packed import PackedWriter, QuantizedLinear, copy_companions, quantization_config, read_config

DERIVED = ("rotary_emb.inv_freq", "attn.masked_bias", "attn.bias")  # buffers that older releases saved


def import_checkpoint(path: Path, out: Path) -> None:
    """Write the packed form of the checkpoint at `path` to `out`, complete or not at all.

    InputError when it is none of the known kinds, when a tensor is missing or has a shape that fits no layout, or when
    its columns were reordered by activation.
    """
    files = TensorFiles.open(path)
    config = read_config(path)
    settings = settings_of(path, config)
    storage = storage_of(path, settings)
    names = sorted(name.rpartition(".")[0] for name in files.shards if name.endswith(CODES))
    if not names:
        raise InputError(f"{path} has no tensor *{' or *'.join(CODES)}", hint=f"what is imported: {KINDS}")
    architecture = skeleton(config)
    sizes = _linear_sizes(architecture)
    with atomic_directory(out) as work:
        writer = PackedWriter(work)
        symmetric, scale_dtype = True, torch.float16
        for name in names:
            linear = _import_linear(files, name, storage, sizes)
            scale_dtype = linear.scale.dtype
            symmetric = symmetric and bool((linear.zero_point == 1 << (linear.bits - 1)).all())
            writer.add_linear(name, linear)
        taken = {f"{name}.{part}" for name in names for part in (*PARTS, "bias")}
        known = architecture.state_dict().keys()
        if scaled := [name for name in files.shards if name.endswith(".scales") and name not in taken | known]:
            raise InputError(f"{path} scales activations ({scaled[0]})", hint="only plain weights are imported")
        for name in files.shards:
            if name not in taken and (name in known or not name.endswith(DERIVED)):
                writer.add_tensor(name, files.tensor(name))
        first = writer.modules[names[0]]
        quantization = quantization_config(
            writer.modules,
            bits=int(settings.get("bits", first.bits)),
            group_size=int(settings.get("group_size", first.group_size)),
            symmetric=symmetric,
            scale_dtype=scale_dtype,
        )
        config.pop("quantization", None)  # MLX's, which no longer describes the tensors
        writer.close({**config, "quantization_config": quantization})
        copy_companions(path, work)


def require_importable(path: Path) -> None:
    """InputError for a kind of checkpoint, or an order of columns, that is not imported; no weight is read."""
    storage_of(path, settings_of(path, read_config(path)))
    files = TensorFiles.open(path)
    for name in files.shards:
        if name.endswith(ORDERS) and bool((files.tensor(name).diff() < 0).any()):
            raise InputError(f"{path}: {name}: {REORDERED}", hint=IN_ORDER)


def settings_of(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says of the quantization, else quantize_config.json, else none (EfficientQAT native)."""
    beside = path / "quantize_config.json"
    quantization, of_mlx = (config.get(key) or {} for key in ("quantization_config", "quantization"))
    if not (isinstance(quantization, dict) and isinstance(of_mlx, dict)):
        raise InputError(f"{path}/config.json: its quantization is malformed", hint="copy the checkpoint again")
    if of_mlx and "quant_method" not in quantization:  # which MLX's own files may repeat there, without a method
        return {"quant_method": "mlx", **of_mlx}
    if quantization:
        return dict(quantization)
    if beside.is_file():
        return read_json(beside)
    return {}


def _linear_sizes(architecture: Any) -> dict[str, tuple[int, int, bool]]:
    """(out_features, in_features, whether it has a bias) of every linear."""
    modules = ((name, m) for name, m in architecture.named_modules() if isinstance(m, torch.nn.Linear))
    return {name: (module.out_features, module.in_features, module.bias is not None) for name, module in modules}


def _import_linear(
    files: TensorFiles, name: str, storage: Storage, sizes: Mapping[str, tuple[int, int, bool]]
) -> QuantizedLinear:
    mismatch = "weights and config.json are of different models; copy the checkpoint again"
    if name not in sizes:
        raise InputError(f"{files.path}: {name} is quantized but the architecture has no such linear", hint=mismatch)
    rows, columns, biased = sizes[name]
    tensors = {part: files.tensor(f"{name}.{part}") for part in PARTS if f"{name}.{part}" in files.shards}
    try:
        triple, bits = read_linear(tensors, storage, columns)
        _check(triple, rows, columns)
    except (KeyError, ValueError) as error:
        hint = IN_ORDER if REORDERED in str(error) else "copy the checkpoint again, or take another export of the model"
        raise InputError(f"{files.path}: {name} does not fit the {storage.name} layout: {error}", hint=hint) from error
    groups = triple.scale.shape[1]
    bias = files.tensor(name + ".bias") if name + ".bias" in files.shards else None
    if bias is not None and not biased:
        if bias.any():
            raise InputError(f"{files.path}: {name} has a bias, in its architecture it has none", hint=mismatch)
        bias = None  # AutoGPTQ and optimum write zeros
    return QuantizedLinear(
        codes=torch.from_numpy(triple.codes),
        scale=torch.from_numpy(triple.scale),
        zero_point=torch.from_numpy(triple.zero_point),
        bits=bits,
        group_size=-1 if groups == 1 else columns // groups,
        bias=bias,
    )


def _check(triple: readback.Triple, rows: int, columns: int) -> None:
    if triple.codes.shape != (rows, columns):
        raise ValueError(f"{list(triple.codes.shape)} codes for a linear of {[rows, columns]}")
    if triple.zero_point.shape != triple.scale.shape or columns % triple.scale.shape[1]:
        raise ValueError(f"zero points {list(triple.zero_point.shape)}, scales {list(triple.scale.shape)}")
