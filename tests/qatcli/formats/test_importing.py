"""Checkpoints of other tools become packed ones with the same integers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qatcli.errors import InputError
from qatcli.formats import FORMATS, ExportOptions, source
from qatcli.formats.importing import import_checkpoint, require_importable
from qatcli.packed import PackedCheckpoint

Packed = Callable[..., PackedCheckpoint]
OPTIONS = ExportOptions(runtimes=False)
AUTO_ROUND: dict[str, object] = {"quant_method": "auto-round", "data_type": "int"}


def _same(found: PackedCheckpoint, expected: PackedCheckpoint) -> None:
    assert found.modules.keys() == expected.modules.keys()
    for name in expected.modules:
        left, right = source.arrays(found, name), source.arrays(expected, name)
        assert left.bits == right.bits
        for part in ("codes", "zero_point", "scale"):
            assert np.array_equal(getattr(left, part), getattr(right, part)), f"{name}: {part}"
    assert sorted(found.dense_names()) == sorted(expected.dense_names())


@pytest.mark.parametrize(
    ("name", "bits", "options"),
    [
        ("gptq", 2, {}),
        ("gptq", 3, {"group_size": -1}),
        ("gptq", 4, {"symmetric": True}),
        ("gptq", 8, {}),
        ("gptq", 2, {"kinds": {"layers.1.mlp.down_proj": (4, 32)}, "skip": ("layers.0.self_attn",)}),
        ("awq", 4, {}),
        ("bitblas", 2, {}),
        ("bitblas", 4, {"group_size": -1}),
        ("mlx", 2, {"kinds": {"layers.1.mlp.down_proj": (4, 32)}, "skip": ("layers.0.self_attn",)}),
        ("mlx", 3, {}),
        ("mlx", 8, {}),
        ("compressed-tensors", 2, {}),
        ("compressed-tensors", 3, {"symmetric": True}),
        ("compressed-tensors", 4, {"kinds": {"layers.1.mlp.down_proj": (8, -1)}, "skip": ("layers.0.self_attn",)}),
    ],
)
def test_our_own_exports_come_back(
    packed: Packed, tmp_path: Path, name: str, bits: int, options: dict[str, object]
) -> None:
    checkpoint = packed(bits, **options)
    FORMATS[name].write(checkpoint, tmp_path / "export", OPTIONS)
    import_checkpoint(tmp_path / "export", tmp_path / "packed")
    _same(PackedCheckpoint.open(tmp_path / "packed"), checkpoint)
    assert (tmp_path / "packed" / "tokenizer.json").is_file()
    assert "quantization" not in PackedCheckpoint.open(tmp_path / "packed").config


def _rewrite(
    export: Path, change: Callable[[dict[str, torch.Tensor]], None], settings: dict[str, object] | None
) -> None:
    """Turn an export of ours into what another tool wrote."""
    tensors = load_file(export / "model.safetensors")
    change(tensors)
    save_file(tensors, export / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((export / "config.json").read_text())
    config.pop("quantization_config")
    (export / "config.json").write_text(json.dumps(config))
    (export / "quantize_config.json").unlink(missing_ok=True)  # AWQ has none
    if settings is not None:
        (export / "quantize_config.json").write_text(json.dumps(settings))


def _ten_per_word(values: np.ndarray) -> torch.Tensor:
    """EfficientQAT's 3 bits along the last axis: value i in word i // 10 at shift 3 (i % 10)."""
    padded = np.pad(values.astype(np.uint32), ((0, 0), (0, -values.shape[1] % 10)))
    fields = padded.reshape(len(values), -1, 10) << np.arange(0, 30, 3, dtype=np.uint32)
    return torch.from_numpy(np.bitwise_or.reduce(fields, axis=2).view(np.int32))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_efficientqat_native(packed: Packed, tmp_path: Path, bits: int) -> None:
    checkpoint = packed(bits)
    FORMATS["gptq"].write(checkpoint, tmp_path / "export", OPTIONS)

    def native(tensors: dict[str, torch.Tensor]) -> None:
        for name in checkpoint.modules:
            del tensors[name + ".g_idx"]
            tensors[name + ".scales"] = tensors[name + ".scales"].float()
            if bits == 3:
                linear = source.arrays(checkpoint, name)
                tensors[name + ".qweight"] = _ten_per_word(linear.codes).T.contiguous()
                tensors[name + ".qzeros"] = _ten_per_word(linear.zero_point.T).contiguous()

    _rewrite(tmp_path / "export", native, None)
    import_checkpoint(tmp_path / "export", tmp_path / "packed")
    found = PackedCheckpoint.open(tmp_path / "packed")
    _same(found, checkpoint)
    assert found.linear("model.layers.0.mlp.up_proj").scale.dtype == torch.float32
    assert found.config["quantization_config"]["scale_dtype"] == "float32"


def _with_any_zero_points(checkpoint: PackedCheckpoint, out: Path) -> PackedCheckpoint:
    """A copy whose zero points take all values, 0 among them, which rounding a trained model seldom gives."""
    shutil.copytree(checkpoint.path, out)
    tensors = load_file(out / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in checkpoint.modules:
        words = tensors[name + ".weight_zero_point"]
        words.copy_(torch.randint(-(2**31), 2**31, words.shape, generator=generator))
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return PackedCheckpoint.open(out)


@pytest.mark.parametrize("named", [{"quant_method": "gptq"}, AUTO_ROUND | {"packing_format": "auto_round:auto_gptq"}])
@pytest.mark.parametrize(("bits", "ones"), [(2, 0x55555555), (4, 0x11111111), (8, 0x01010101)])
def test_gptq_version_1_as_autogptq_gptqmodel_and_autoround_write_it(
    packed: Packed, tmp_path: Path, bits: int, ones: int, named: dict[str, object]
) -> None:
    """They subtract one from every field of whole words, so a zero point of 0 borrows from its neighbour."""
    checkpoint = _with_any_zero_points(packed(bits), tmp_path / "any")
    FORMATS["gptq"].write(checkpoint, tmp_path / "export", OPTIONS)
    borrowed = 0

    def minus_one(tensors: dict[str, torch.Tensor]) -> None:
        nonlocal borrowed
        for name in checkpoint.modules:
            words = tensors[name + ".qzeros"].numpy().view(np.uint32)
            tensors[name + ".qzeros"] = torch.from_numpy((words - np.uint32(ones)).view(np.int32))
            borrowed += int((source.arrays(checkpoint, name).zero_point == 0).sum())

    _rewrite(tmp_path / "export", minus_one, named | {"bits": bits, "group_size": 32, "sym": False})
    assert borrowed > 0
    import_checkpoint(tmp_path / "export", tmp_path / "packed")
    _same(PackedCheckpoint.open(tmp_path / "packed"), checkpoint)


@pytest.mark.parametrize(
    ("packing", "name", "bits"),
    [("auto_round", "gptq", 3), ("auto_round:gptqmodel", "gptq", 2), ("auto_round:auto_awq", "awq", 4)],
)
def test_autoround_names_the_layout_that_it_stores(
    packed: Packed, tmp_path: Path, packing: str, name: str, bits: int
) -> None:
    checkpoint = packed(bits)
    FORMATS[name].write(checkpoint, tmp_path / "export", OPTIONS)
    settings = AUTO_ROUND | {"packing_format": packing, "bits": bits, "group_size": 32, "sym": False}
    _rewrite(tmp_path / "export", lambda tensors: None, settings)
    import_checkpoint(tmp_path / "export", tmp_path / "packed")
    _same(PackedCheckpoint.open(tmp_path / "packed"), checkpoint)


def test_gptq_version_1_at_3_bits_wraps_in_every_field(packed: Packed, tmp_path: Path) -> None:
    """Fields cross words there, so nothing is subtracted from whole words: a zero point of 0 is stored as 7."""
    checkpoint = _with_any_zero_points(packed(3), tmp_path / "any")
    FORMATS["gptq"].write(checkpoint, tmp_path / "export", OPTIONS)

    def minus_one(tensors: dict[str, torch.Tensor]) -> None:
        for name in checkpoint.modules:
            lower = source.arrays(checkpoint, name).zero_point.T - np.uint8(1) & np.uint8(7)
            bits = (lower[..., None] >> np.arange(3, dtype=np.uint8) & 1).reshape(len(lower), -1)
            words = np.packbits(bits, axis=1, bitorder="little").view(np.int32)
            tensors[name + ".qzeros"] = torch.from_numpy(words)

    _rewrite(tmp_path / "export", minus_one, {"quant_method": "gptq", "bits": 3, "group_size": 32, "sym": False})
    import_checkpoint(tmp_path / "export", tmp_path / "packed")
    _same(PackedCheckpoint.open(tmp_path / "packed"), checkpoint)


def test_4_bits_of_32_inputs_are_not_taken_for_3(
    save_tiny_llama: Callable[..., Path], pack: Packed, tmp_path: Path
) -> None:
    """Four words per output either way."""
    narrow = save_tiny_llama("narrow", hidden_size=32, num_attention_heads=2, num_key_value_heads=2)
    checkpoint = pack(narrow, tmp_path / "checkpoint", bits=4)
    FORMATS["gptq"].write(checkpoint, tmp_path / "export", OPTIONS)
    import_checkpoint(tmp_path / "export", tmp_path / "packed")
    _same(PackedCheckpoint.open(tmp_path / "packed"), checkpoint)


def test_imported_checkpoint_can_be_exported(packed: Packed, tmp_path: Path) -> None:
    FORMATS["gptq"].write(packed(3), tmp_path / "export", OPTIONS)
    import_checkpoint(tmp_path / "export", tmp_path / "packed")
    imported = PackedCheckpoint.open(tmp_path / "packed")
    FORMATS["compressed-tensors"].write(imported, tmp_path / "again", OPTIONS)
    assert FORMATS["compressed-tensors"].verify(packed(3), tmp_path / "again", OPTIONS).passed


def test_malformed_settings_beside_the_weights_are_refused(packed: Packed, tmp_path: Path) -> None:
    FORMATS["gptq"].write(packed(4), tmp_path / "export", OPTIONS)
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "export" / "config.json").write_text(json.dumps(config))
    (tmp_path / "export" / "quantize_config.json").write_text("{")
    with pytest.raises(InputError, match=r"quantize_config\.json is malformed"):
        require_importable(tmp_path / "export")


def test_columns_out_of_order_are_refused(packed: Packed, tmp_path: Path) -> None:
    FORMATS["gptq"].write(packed(4), tmp_path / "export", OPTIONS)
    settings = json.loads((tmp_path / "export" / "quantize_config.json").read_text())
    flip = lambda t: t.update({n: v.flip(0) for n, v in t.items() if n.endswith("0.mlp.up_proj.g_idx")})  # noqa: E731
    _rewrite(tmp_path / "export", flip, settings)
    with pytest.raises(InputError, match=r"up_proj .*desc_act"):
        import_checkpoint(tmp_path / "export", tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "bitsandbytes"}, "quant_method bitsandbytes"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "stores GPTQ as marlin"),
        ({"quant_method": "awq", "version": "gemv", "bits": 4}, "stores AWQ gemv"),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "stores compressed-tensors as float"),
        (AUTO_ROUND | {"packing_format": "auto_round:fp8"}, "stores AutoRound auto_round:fp8"),
        (AUTO_ROUND | {"packing_format": "auto_round", "data_type": "mx_fp"}, "auto_round of mx_fp weights"),
        (AUTO_ROUND | {"packing_format": "auto_round", "act_bits": 8}, "8-bit activations"),
        (AUTO_ROUND | {"packing_format": "auto_round:auto_awq", "bits": 2}, "stores AWQ gemm at 2 bits"),
    ],
)
def test_unknown_kinds_are_refused(packed: Packed, tmp_path: Path, settings: dict[str, object], message: str) -> None:
    FORMATS["gptq"].write(packed(4), tmp_path / "export", OPTIONS)
    _rewrite(tmp_path / "export", lambda tensors: None, settings)
    with pytest.raises(InputError, match=message):
        import_checkpoint(tmp_path / "export", tmp_path / "packed")


def test_plain_model_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no tensor"):
        import_checkpoint(tiny_llama, tmp_path / "packed")


@pytest.mark.parametrize("name", ["gptq", "compressed-tensors"])
def test_biases_come_along(save_random_model: Callable[..., Path], pack: Packed, tmp_path: Path, name: str) -> None:
    qwen = save_random_model("Qwen2Config", hidden_size=64, intermediate_size=96, num_attention_heads=4, head_dim=16)
    checkpoint = pack(qwen, tmp_path / "checkpoint", bits=4)
    FORMATS[name].write(checkpoint, tmp_path / "export", OPTIONS)
    import_checkpoint(tmp_path / "export", tmp_path / "packed")
    found = PackedCheckpoint.open(tmp_path / "packed")
    biases = {module: bias for module in checkpoint.modules if (bias := checkpoint.linear(module).bias) is not None}
    assert biases
    for module, bias in biases.items():
        came = found.linear(module).bias
        assert came is not None
        assert torch.equal(came, bias.half())


def test_columns_out_of_order_are_refused_in_compressed_tensors_too(packed: Packed, tmp_path: Path) -> None:
    FORMATS["compressed-tensors"].write(packed(4), tmp_path / "export", OPTIONS)
    file = tmp_path / "export" / "model.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if n.endswith("0.mlp.up_proj.weight_packed")).removesuffix("packed")
    columns, groups = int(tensors[name + "shape"][1]), tensors[name + "scale"].shape[1]
    tensors[name + "g_idx"] = (torch.arange(columns) * groups // columns).int().flip(0)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"up_proj .*desc_act"):
        import_checkpoint(tmp_path / "export", tmp_path / "packed")


def test_zero_points_of_one_byte_each(packed: Packed, tmp_path: Path) -> None:
    """compressed-tensors before April 2025 stored them so, around the middle of the grid."""
    checkpoint = packed(4)
    FORMATS["compressed-tensors"].write(checkpoint, tmp_path / "export", OPTIONS)
    tensors = load_file(tmp_path / "export" / "model.safetensors")
    for name in checkpoint.modules:
        zero_point = source.arrays(checkpoint, name).zero_point.astype(np.int16) - 8
        tensors[name + ".weight_zero_point"] = torch.from_numpy(zero_point.astype(np.int8))
    save_file(tensors, tmp_path / "export" / "model.safetensors", metadata={"format": "pt"})
    import_checkpoint(tmp_path / "export", tmp_path / "packed")
    _same(PackedCheckpoint.open(tmp_path / "packed"), checkpoint)


def _add(export: Path, **tensors: torch.Tensor) -> None:
    found = load_file(export / "model.safetensors")
    save_file({**found, **tensors}, export / "model.safetensors", metadata={"format": "pt"})


def test_rotated_activations_are_refused(packed: Packed, tmp_path: Path) -> None:
    FORMATS["compressed-tensors"].write(packed(4), tmp_path / "export", OPTIONS)
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    config["quantization_config"]["transform_config"] = {"config_groups": {"u": {"type": "hadamard"}}}
    (tmp_path / "export" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="rotates activations"):
        import_checkpoint(tmp_path / "export", tmp_path / "packed")


def test_scaled_activations_are_refused(packed: Packed, tmp_path: Path) -> None:
    """AutoAWQ's, in families whose activation stands between the linears; the plain one would compute another model."""
    FORMATS["awq"].write(packed(4), tmp_path / "export", OPTIONS)
    tensors = load_file(tmp_path / "export" / "model.safetensors")
    tensors["model.layers.0.mlp.act.scales"] = torch.full((64,), 3.0)
    save_file(tensors, tmp_path / "export" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"scales activations .*act\.scales"):
        import_checkpoint(tmp_path / "export", tmp_path / "packed")


def test_quantized_activations_are_refused(packed: Packed, tmp_path: Path) -> None:
    FORMATS["compressed-tensors"].write(packed(4), tmp_path / "export", OPTIONS)
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    for group in config["quantization_config"]["config_groups"].values():
        group["input_activations"] = {"num_bits": 8}
    (tmp_path / "export" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="quantizes activations, too"):
        import_checkpoint(tmp_path / "export", tmp_path / "packed")


def test_what_older_tools_saved_beside_the_weights_is_left(packed: Packed, tmp_path: Path) -> None:
    """Zeros for biases that Llama has not, and frequencies that follow from the configuration."""
    checkpoint, name = packed(4), "model.layers.0.mlp.up_proj"
    FORMATS["gptq"].write(checkpoint, tmp_path / "export", OPTIONS)
    extra = {name + ".bias": torch.zeros(96), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    _add(tmp_path / "export", **extra)
    import_checkpoint(tmp_path / "export", tmp_path / "packed")
    found = PackedCheckpoint.open(tmp_path / "packed")
    _same(found, checkpoint)
    assert not extra.keys() & found.shards.keys()


def test_a_bias_that_the_architecture_has_not_is_refused(packed: Packed, tmp_path: Path) -> None:
    FORMATS["gptq"].write(packed(4), tmp_path / "export", OPTIONS)
    _add(tmp_path / "export", **{"model.layers.0.mlp.up_proj.bias": torch.ones(96)})
    with pytest.raises(InputError, match="up_proj has a bias"):
        import_checkpoint(tmp_path / "export", tmp_path / "packed")
