"""Every format: written, re-read with other code, damaged on purpose and caught."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from qatcli.errors import InputError, QatError, VerificationError
from qatcli.formats import FORMATS, ExportOptions, awq, compare, dense, require_passed, source
from qatcli.formats.compare import TensorFiles
from qatcli.formats.importing import import_checkpoint
from qatcli.formats.runtimes.reference import dense_weight
from qatcli.packed import ModuleQuant, PackedCheckpoint, PackedWriter, QuantizedLinear
from qatcli.recipe import FORMAT_BITS
from qatcli.shards import shard_map

Packed = Callable[..., PackedCheckpoint]
INTEGERS_ONLY = ExportOptions(runtimes=False)
PROMOTED = ExportOptions(runtimes=False, awq_promote=True)
SAFETENSORS = ("gptq", "bitblas", "native", "awq", "compressed-tensors", "mlx", "dense")


def _options(name: str, bits: int) -> ExportOptions:
    return PROMOTED if name == "awq" and bits < 4 else INTEGERS_ONLY


CARRIED = {**FORMAT_BITS, "awq": (2, 3, 4)}  # which promotes fewer than 4
CASES = [(name, bits, symmetric) for name, each in CARRIED.items() for bits in each for symmetric in (False, True)]


@pytest.mark.parametrize(("name", "bits", "symmetric"), CASES)
def test_export_equals_its_source(packed: Packed, tmp_path: Path, name: str, bits: int, symmetric: bool) -> None:
    checkpoint = packed(bits, symmetric=symmetric)
    options = _options(name, bits)
    FORMATS[name].write(checkpoint, tmp_path / "out", options)
    verification = FORMATS[name].verify(checkpoint, tmp_path / "out", options)
    assert verification.differences == ()
    assert verification.modules == 21
    assert verification.passed
    require_passed(verification)
    assert json.loads(json.dumps(verification.to_json()))["passed"] is True
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| runtime | releases | command | remark |" in card
    assert name in card


@pytest.mark.parametrize("name", SAFETENSORS)
def test_directory_has_what_loaders_want(packed: Packed, tmp_path: Path, name: str) -> None:
    checkpoint = packed(4)
    FORMATS[name].write(checkpoint, tmp_path / "out", INTEGERS_ONLY)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "float16"
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    method = {"gptq": "gptq", "bitblas": "gptq", "native": "qat"}.get(name, name)
    assert config.get("quantization_config", {}).get("quant_method") == (None if name in ("dense", "mlx") else method)
    if name in ("gptq", "bitblas"):
        beside = json.loads((tmp_path / "out" / "quantize_config.json").read_text())
        assert beside == config["quantization_config"]
        assert beside["sym"] is False
        assert beside["desc_act"] is False
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {t.dtype for n, t in tensors.items() if t.is_floating_point()} == {torch.float16}


def test_shards_and_index(packed: Packed, tmp_path: Path) -> None:
    checkpoint = packed(4)
    options = ExportOptions(runtimes=False, max_shard_bytes=50_000)
    FORMATS["gptq"].write(checkpoint, tmp_path / "out", options)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert set(shard_map(tmp_path / "out").values()) == set(files)
    assert FORMATS["gptq"].verify(checkpoint, tmp_path / "out", options).passed


def test_gptq_version_follows_the_zero_points(packed: Packed, tmp_path: Path) -> None:
    for symmetric, expected in ((False, "gptq_v2"), (True, "gptq")):
        out = tmp_path / expected
        FORMATS["gptq"].write(packed(4, symmetric=symmetric), out, INTEGERS_ONLY)
        config = json.loads((out / "quantize_config.json").read_text())
        assert (config["checkpoint_format"], config["format"], config["sym"]) == (expected, expected, symmetric)


def test_mixed_bits_and_skipped_linears_are_declared(packed: Packed, tmp_path: Path) -> None:
    checkpoint = packed(2, kinds={"layers.1.mlp.down_proj": (4, 32)}, skip=("layers.0.self_attn",))
    for name in ("gptq", "compressed-tensors"):
        FORMATS[name].write(checkpoint, tmp_path / name, INTEGERS_ONLY)
        assert FORMATS[name].verify(checkpoint, tmp_path / name, INTEGERS_ONLY).passed
    with pytest.raises(QatError, match=r"same bits and group size, here \(2, 32\).*down_proj \(4, 32\)"):
        FORMATS["bitblas"].write(checkpoint, tmp_path / "bitblas", INTEGERS_ONLY)
    dynamic = json.loads((tmp_path / "gptq" / "quantize_config.json").read_text())["dynamic"]
    assert dynamic == {
        r"+:^model\.layers\.1\.mlp\.(down_proj)$": {"bits": 4, "group_size": 32},
        r"-:^model\.layers\.0\.self_attn\.(q_proj|k_proj|v_proj|o_proj|qkv_proj)$": {},
    }
    quantization = json.loads((tmp_path / "compressed-tensors" / "config.json").read_text())["quantization_config"]
    assert quantization["config_groups"]["group_0"]["targets"] == ["model.layers.1.mlp.down_proj"]
    assert quantization["config_groups"]["group_1"]["targets"] == ["Linear"]
    assert quantization["ignore"] == ["lm_head", *(f"model.layers.0.self_attn.{p}_proj" for p in "qkvo")]


@pytest.mark.parametrize("group_size", [-1, 16])
def test_other_group_sizes(packed: Packed, tmp_path: Path, group_size: int) -> None:
    checkpoint = packed(3, group_size=group_size)
    for name in ("gptq", "compressed-tensors", "native", "dense"):
        FORMATS[name].write(checkpoint, tmp_path / name, INTEGERS_ONLY)
        assert FORMATS[name].verify(checkpoint, tmp_path / name, INTEGERS_ONLY).differences == ()


def test_group_sizes_that_no_kernel_takes_are_refused(
    save_tiny_llama: Callable[..., Path], pack: Packed, tmp_path: Path
) -> None:
    odd = save_tiny_llama("threes", hidden_size=96, num_hidden_layers=1, num_attention_heads=6, num_key_value_heads=2)
    checkpoint = pack(odd, tmp_path / "packed", bits=4, group_size=48)
    for name in ("gptq", "bitblas", "awq"):
        with pytest.raises(QatError, match="group size") as refused:
            FORMATS[name].write(checkpoint, tmp_path / name, INTEGERS_ONLY)
        assert "compressed-tensors" in (refused.value.hint or "")
    FORMATS["compressed-tensors"].write(checkpoint, tmp_path / "ct", INTEGERS_ONLY)
    assert FORMATS["compressed-tensors"].verify(checkpoint, tmp_path / "ct", INTEGERS_ONLY).passed


def test_promoted_groups_are_repeated_in_place(
    save_tiny_llama: Callable[..., Path], pack: Packed, tmp_path: Path
) -> None:
    """Read back as another tool's, because the writer and what verifies it expand groups alike."""
    wide = save_tiny_llama("wide", hidden_size=128, num_hidden_layers=1)
    checkpoint = pack(wide, tmp_path / "packed", bits=3, kinds={"gate_proj": (4, 64)})  # two groups, four in the file
    FORMATS["awq"].write(checkpoint, tmp_path / "out", PROMOTED)
    import_checkpoint(tmp_path / "out", tmp_path / "imported")
    imported = PackedCheckpoint.open(tmp_path / "imported")
    for name in checkpoint.modules:
        expected, found = (source.arrays(each, name) for each in (checkpoint, imported))
        assert np.array_equal(dense_weight(found), dense_weight(expected)), name


def test_awq_refuses_what_it_cannot_say_and_promotes_on_request(packed: Packed, tmp_path: Path) -> None:
    with pytest.raises(QatError, match=r"awq carries \[4\] bits only: model\.layers\.0.* and 17 more") as refused:
        FORMATS["awq"].write(packed(2), tmp_path / "out", INTEGERS_ONLY)
    assert "awq_promote" in (refused.value.hint or "")
    channel = packed(4, group_size=-1)
    with pytest.raises(QatError, match="group size"):
        FORMATS["awq"].write(channel, tmp_path / "out", INTEGERS_ONLY)
    FORMATS["awq"].write(channel, tmp_path / "out", PROMOTED)
    assert FORMATS["awq"].verify(channel, tmp_path / "out", PROMOTED).passed
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["group_size"] == 32


def test_sizes_that_are_no_multiple_of_32_are_refused_by_name(
    save_tiny_llama: Callable[..., Path], pack: Packed, tmp_path: Path
) -> None:
    odd = save_tiny_llama("odd", intermediate_size=80, num_hidden_layers=1)
    checkpoint = pack(odd, tmp_path / "packed", bits=4, group_size=16)
    for name in ("gptq", "bitblas", "awq"):
        with pytest.raises(QatError, match=r"multiples of 32: model\.layers\.0\.mlp\.\w+ \[") as refused:
            FORMATS[name].write(checkpoint, tmp_path / name, INTEGERS_ONLY)
        assert "quant.skip" in (refused.value.hint or "")
        assert not (tmp_path / name).exists()
    FORMATS["compressed-tensors"].write(checkpoint, tmp_path / "ct", INTEGERS_ONLY)
    assert FORMATS["compressed-tensors"].verify(checkpoint, tmp_path / "ct", INTEGERS_ONLY).passed


def test_bitblas_takes_3_and_4_bits_together_and_skipped_linears(packed: Packed, tmp_path: Path) -> None:
    checkpoint = packed(3, kinds={"mlp.down_proj": (4, 32)}, skip=("layers.0.self_attn",))
    FORMATS["bitblas"].write(checkpoint, tmp_path / "out", INTEGERS_ONLY)
    assert FORMATS["bitblas"].verify(checkpoint, tmp_path / "out", INTEGERS_ONLY).passed
    settings = json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    assert settings["bits"] == 4
    assert list(settings["dynamic"]) == [r"-:^model\.layers\.0\.self_attn\.(q_proj|k_proj|v_proj|o_proj|qkv_proj)$"]


def test_bitblas_writes_both_zero_names(packed: Packed, tmp_path: Path) -> None:
    options = ExportOptions(runtimes=False, bitblas_zeros="zeros")
    FORMATS["bitblas"].write(packed(2), tmp_path / "out", options)
    assert FORMATS["bitblas"].verify(packed(2), tmp_path / "out", options).passed
    assert "model.layers.0.mlp.up_proj.zeros" in shard_map(tmp_path / "out")
    assert not FORMATS["bitblas"].verify(packed(2), tmp_path / "out", INTEGERS_ONLY).passed


def _edit(out: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    file = out / shard_map(out)[name]
    tensors = load_file(file)
    tensors[name] = torch.from_numpy(change(tensors[name].numpy().copy()))
    save_file(tensors, file, metadata={"format": "pt"})


CODES = {"gptq": "qweight", "bitblas": "qweight", "awq": "qweight", "mlx": "weight", "dense": "weight"}
ZEROS = {"gptq": "qzeros", "bitblas": "qzeros", "awq": "qzeros", "mlx": "biases"}
LINEAR = "model.layers.1.self_attn.k_proj"


def _flip_a_bit(array: np.ndarray) -> np.ndarray:
    array.view(np.uint8).reshape(-1)[array.nbytes // 2] ^= 1
    return array


@pytest.mark.parametrize("name", SAFETENSORS)
@pytest.mark.parametrize("bits", [2, 4])
def test_a_flipped_bit_in_any_kind_of_tensor_is_caught(packed: Packed, tmp_path: Path, name: str, bits: int) -> None:
    checkpoint, options = packed(bits), _options(name, bits)
    tensors = [f"{LINEAR}.{CODES.get(name, 'weight_packed')}", "model.norm.weight", "model.embed_tokens.weight"]
    if name != "dense":
        tensors += [f"{LINEAR}.{ZEROS.get(name, 'weight_zero_point')}"]
        tensors += [f"{LINEAR}.{'scales' if name in ZEROS else 'weight_scale'}"]
    tensors += [f"{LINEAR}.g_idx"] * (name == "gptq")
    for number, tensor in enumerate(tensors):
        out = tmp_path / str(number)
        FORMATS[name].write(checkpoint, out, options)
        _edit(out, tensor, _flip_a_bit)
        verification = FORMATS[name].verify(checkpoint, out, options)
        assert not verification.passed, tensor
        assert tensor.rpartition(".")[0] in verification.differences[0]
        with pytest.raises(VerificationError, match="differs from its source"):
            require_passed(verification)


@pytest.mark.parametrize("name", SAFETENSORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_type_is_caught(packed: Packed, tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    FORMATS[name].write(packed(4), tmp_path / "out", INTEGERS_ONLY)
    file = tmp_path / "out" / "model.safetensors"
    good = load_file(file)
    scale = f"{LINEAR}.{'scales' if name in ZEROS else 'weight' if name == 'dense' else 'weight_scale'}"
    for tensor in (scale, "model.norm.weight", "model.embed_tokens.weight"):
        save_file({**good, tensor: good[tensor].to(dtype)}, file, metadata={"format": "pt"})
        (difference,) = FORMATS[name].verify(packed(4), tmp_path / "out", INTEGERS_ONLY).differences
        assert tensor.rpartition(".")[0] in difference


def test_dense_weights_are_compared_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that `qat plan` promises: the codes, and few rows in double precision."""
    codes = torch.randint(0, 16, (1024, 512), dtype=torch.uint8)
    grid = {"scale": torch.rand(1024, 8) + 0.5, "zero_point": torch.full((1024, 8), 7, dtype=torch.uint8)}
    writer = PackedWriter(tmp_path / "packed")
    writer.add_linear(LINEAR, QuantizedLinear(codes=codes, **grid, bits=4, group_size=64))
    writer.close({})
    shards = shard_map(tmp_path / "packed")
    checkpoint = PackedCheckpoint(tmp_path / "packed", {}, writer.modules, shards)
    weight = dense._weight(source.arrays(checkpoint, LINEAR), dtype=torch.float16)["weight"]
    (tmp_path / "out").mkdir()
    save_file({LINEAR + ".weight": weight}, tmp_path / "out" / "model.safetensors")
    files = TensorFiles.open(tmp_path / "out")
    monkeypatch.setattr(compare, "AT_A_TIME", 30 * 512)
    tracemalloc.start()
    try:
        found = dense._read(checkpoint, torch.float16, {}, files, LINEAR)
        assert tracemalloc.get_traced_memory()[1] < 4 * codes.numel()
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(found.codes, codes)


@pytest.mark.parametrize("own", [True, False])
def test_a_head_of_its_own_is_exported_whatever_the_config_says(
    tiny_llama: Path, pack: Packed, tmp_path: Path, own: bool
) -> None:
    """transformers ties nothing where both tensors are there and differ; other runtimes go by the config."""
    shutil.copytree(tiny_llama, tmp_path / "model")
    tensors = load_file(tiny_llama / "model.safetensors")
    if not own:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tiny_llama / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    checkpoint = pack(tmp_path / "model", tmp_path / "packed", bits=4)
    FORMATS["dense"].write(checkpoint, tmp_path / "out", INTEGERS_ONLY)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["tie_word_embeddings"] is not own
    assert ("lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")) == own
    assert FORMATS["dense"].verify(checkpoint, tmp_path / "out", INTEGERS_ONLY).passed
    head = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").lm_head.weight
    torch.testing.assert_close(head.float(), tensors["lm_head.weight"], rtol=1e-3, atol=1e-4)


def test_wrong_version_in_the_config_is_caught(packed: Packed, tmp_path: Path) -> None:
    FORMATS["gptq"].write(packed(4), tmp_path / "out", INTEGERS_ONLY)
    file = tmp_path / "out" / "config.json"
    file.write_text(file.read_text().replace("gptq_v2", "gptq"))
    verification = FORMATS["gptq"].verify(packed(4), tmp_path / "out", INTEGERS_ONLY)
    assert verification.codes_equal
    assert not verification.zero_points_equal


def _lie(settings: dict[str, object], path: tuple[object, ...], value: object) -> None:
    for key in path[:-1]:
        settings = next(iter(settings.values())) if key is FIRST else settings[key]  # type: ignore[assignment,index]
    settings[path[-1]] = value  # type: ignore[index]


FIRST = object()
LIES = [
    ("gptq", ("bits",), 4),
    ("gptq", ("group_size",), 64),
    ("gptq", ("sym",), True),
    ("gptq", ("desc_act",), True),
    ("gptq", ("dynamic",), {"-:.*mlp.*": {}}),
    ("gptq", ("dynamic",), {}),
    ("bitblas", ("bits",), 4),
    ("bitblas", ("checkpoint_format",), "gptq"),
    ("awq", ("bits",), 8),
    ("awq", ("group_size",), 64),
    ("awq", ("version",), "gemv"),
    ("awq", ("zero_point",), False),
    ("awq", ("modules_to_not_convert",), None),
    ("awq", ("modules_to_not_convert",), ["self_attn"]),
    ("compressed-tensors", ("config_groups", FIRST, "weights", "num_bits"), 4),
    ("compressed-tensors", ("config_groups", FIRST, "weights", "group_size"), 64),
    ("compressed-tensors", ("config_groups", FIRST, "weights", "symmetric"), True),
    ("compressed-tensors", ("ignore",), ["lm_head"]),
    ("compressed-tensors", ("format",), "naive-quantized"),
    ("native", ("modules", FIRST, "bits"), 4),
    ("native", ("modules", FIRST, "group_size"), 64),
    ("native", ("scale_dtype",), "float32"),
    ("native", ("modules",), {}),
    ("mlx", ("bits",), 4),
    ("mlx", ("group_size",), 64),
    ("mlx", ("model.layers.0.self_attn.q_proj",), {"bits": 2, "group_size": 32}),
    ("dense", ("quant_method",), "gptq"),
]


@pytest.mark.parametrize(("name", "path", "value"), LIES)
def test_settings_that_lie_are_caught(
    packed: Packed, tmp_path: Path, name: str, path: tuple[object, ...], value: object
) -> None:
    checkpoint = packed(2, skip=("layers.0.self_attn",))
    FORMATS[name].write(checkpoint, tmp_path / "out", PROMOTED)
    files = [tmp_path / "out" / "config.json"]
    if name in ("gptq", "bitblas"):
        files.append(tmp_path / "out" / "quantize_config.json")
    for file in files:
        content = json.loads(file.read_text())
        key = "quantization" if name == "mlx" else "quantization_config"
        settings = content.setdefault(key, {}) if file.name == "config.json" else content
        _lie(settings, path, value)
        file.write_text(json.dumps(content))
    verification = FORMATS[name].verify(checkpoint, tmp_path / "out", PROMOTED)
    assert not verification.passed
    assert verification.differences


@pytest.mark.parametrize("name", SAFETENSORS)
def test_damage_to_any_other_file_is_caught(packed: Packed, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    FORMATS[name].write(packed(4), out, INTEGERS_ONLY)
    files = [file for file in out.iterdir() if file.suffix == ".json"]
    assert {"config.json", "tokenizer.json"} <= {file.name for file in files}
    for file in files:
        good = file.read_bytes()
        middle = len(good) // 2
        for bad in (None, b"", good[:middle], good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :]):
            if bad is None:
                file.unlink()
            else:
                file.write_bytes(bad)
            differences = FORMATS[name].verify(packed(4), out, INTEGERS_ONLY).differences
            assert any(file.name in difference for difference in differences), file.name
        file.write_bytes(good)
    assert FORMATS[name].verify(packed(4), out, INTEGERS_ONLY).passed


def test_settings_beside_must_be_those_of_the_config(packed: Packed, tmp_path: Path) -> None:
    FORMATS["gptq"].write(packed(4), tmp_path / "out", INTEGERS_ONLY)
    file = tmp_path / "out" / "quantize_config.json"  # which GPTQModel reads first
    file.write_text(file.read_text().replace("gptq_v2", "gptq"))
    assert FORMATS["gptq"].verify(packed(4), tmp_path / "out", INTEGERS_ONLY).differences == (
        "quantize_config.json differs from the quantization_config in config.json",
    )


def test_other_users_may_read_what_their_folder_lets_them(packed: Packed, tmp_path: Path) -> None:
    FORMATS["gptq"].write(packed(4), tmp_path / "out", INTEGERS_ONLY)
    modes = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]


@pytest.mark.parametrize("name", SAFETENSORS)
def test_missing_and_unexpected_tensors_are_caught(packed: Packed, tmp_path: Path, name: str) -> None:
    FORMATS[name].write(packed(4), tmp_path / "out", INTEGERS_ONLY)
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    tensors["stray"] = tensors.pop("model.norm.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    differences = FORMATS[name].verify(packed(4), tmp_path / "out", INTEGERS_ONLY).differences
    assert differences == ("tensor model.norm.weight is missing", "tensor stray is unexpected")


def test_truncated_file_is_a_difference_not_a_crash(packed: Packed, tmp_path: Path) -> None:
    FORMATS["gptq"].write(packed(2), tmp_path / "out", INTEGERS_ONLY)
    file = tmp_path / "out" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert not FORMATS["gptq"].verify(packed(2), tmp_path / "out", INTEGERS_ONLY).passed


def test_a_model_that_only_its_own_code_can_build_is_refused(tiny_llama: Path, pack: Packed, tmp_path: Path) -> None:
    checkpoint = pack(tiny_llama, tmp_path / "packed", bits=4)
    checkpoint.config["model_type"] = "odd"
    with pytest.raises(InputError, match="no model_type odd") as caught:
        FORMATS["dense"].write(checkpoint, tmp_path / "out", INTEGERS_ONLY)
    assert "trust_remote_code" in str(caught.value.hint)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("scale", [1e6, 1e-9])
def test_scales_that_fp16_cannot_hold_are_refused(tiny_llama: Path, pack: Packed, tmp_path: Path, scale: float) -> None:
    checkpoint = pack(tiny_llama, tmp_path / "packed", bits=2)
    file = tmp_path / "packed" / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{LINEAR}.weight_scale"][0, 0] = scale
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(QatError, match=f"fp16 cannot hold.*{LINEAR}"):
        FORMATS["gptq"].write(checkpoint, tmp_path / "out", INTEGERS_ONLY)


def test_awq_promotes_to_the_largest_group_that_divides_all() -> None:
    modules = {"a": ModuleQuant(2, 128, 256, 64), "b": ModuleQuant(4, 64, 256, 64)}
    checkpoint: Any = SimpleNamespace(modules=modules)
    assert awq.group_size(checkpoint, promote=True) == 64


def test_families_whose_activations_readers_of_awq_scale_are_refused(packed: Packed) -> None:
    falcon = replace(packed(4), config={**packed(4).config, "model_type": "falcon"})
    with pytest.raises(QatError, match="scale the activations of falcon"):
        FORMATS["awq"].refuse(falcon, ExportOptions())


@pytest.mark.parametrize("name", ["gptq", "bitblas", "awq"])
def test_a_quantized_head_is_refused(name: str) -> None:
    checkpoint: Any = SimpleNamespace(modules={"lm_head": ModuleQuant(4, 32, 64, 64)})
    with pytest.raises(QatError, match="keeps the output head dense: lm_head"):
        FORMATS[name].refuse(checkpoint, ExportOptions())
