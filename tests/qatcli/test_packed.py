"""Packed checkpoints: what is written is read back bit for bit, and what is broken is said."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from qatcli.errors import InputError
from qatcli.packed import (
    PackedCheckpoint,
    PackedWriter,
    QuantizedLinear,
    companion_files,
    pack_zero_point,
    quantization_config,
    read_config,
    unpack_zero_point,
)


def make_linear(
    generator: torch.Generator, bits: int, rows: int, groups: int, size: int, bias: bool
) -> QuantizedLinear:
    def codes(*shape: int) -> Tensor:
        return torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8)

    return QuantizedLinear(
        codes=codes(rows, groups * size),
        scale=torch.rand(rows, groups, generator=generator) + 1e-3,
        zero_point=codes(rows, groups),
        bits=bits,
        group_size=-1 if groups == 1 else size,
        bias=torch.rand(rows, generator=generator) if bias else None,
    )


@st.composite
def linears(draw: st.DrawFn) -> dict[str, QuantizedLinear]:
    """One to four linears of any bits, odd shapes, one or more groups, with or without bias."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    found = {}
    for index in range(draw(st.integers(1, 4))):
        found[f"model.layers.{index}.mlp.up_proj"] = make_linear(
            generator,
            bits=draw(st.sampled_from([2, 3, 4, 8])),
            rows=draw(st.integers(1, 37)),
            groups=draw(st.integers(1, 4)),
            size=draw(st.sampled_from([8, 24, 32, 96])),
            bias=draw(st.booleans()),
        )
    return found


def write(path: Path, linears: dict[str, QuantizedLinear], dense: dict[str, Tensor], **options: float) -> None:
    writer = PackedWriter(path, **options)
    for name, linear in linears.items():
        writer.add_linear(name, linear)
    for name, tensor in dense.items():
        writer.add_tensor(name, tensor)
    quantization = quantization_config(
        writer.modules, bits=2, group_size=32, symmetric=False, scale_dtype=torch.float32
    )
    writer.close({"model_type": "llama", "quantization_config": quantization})


@settings(deadline=None, max_examples=25)
@given(linears=linears(), max_shard_bytes=st.sampled_from([1, 500, 5e9]))
def test_round_trip(linears: dict[str, QuantizedLinear], max_shard_bytes: float) -> None:
    dense = {"model.norm.weight": torch.randn(5), "model.embed_tokens.weight": torch.randn(7, 3).bfloat16()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "new" / "model"
        write(path, linears, dense, max_shard_bytes=max_shard_bytes)
        files = sorted(file.name for file in path.iterdir())
        checkpoint = PackedCheckpoint.open(path)
        read = {name: checkpoint.linear(name) for name in checkpoint.modules}
        read_dense = {name: checkpoint.tensor(name) for name in checkpoint.dense_names()}

    assert list(read) == sorted(linears)
    for name, linear in linears.items():
        back = read[name]
        assert torch.equal(back.codes, linear.codes)
        assert torch.equal(back.scale, linear.scale)
        assert torch.equal(back.zero_point, linear.zero_point)
        assert (back.bits, back.group_size) == (linear.bits, linear.group_size)
        assert (back.bias is None) == (linear.bias is None)
        assert linear.bias is None or torch.equal(back.bias, linear.bias)
        quant = checkpoint.modules[name]
        assert (quant.in_features, quant.out_features) == (linear.in_features, linear.out_features)
    assert {name: tensor.dtype for name, tensor in read_dense.items()} == {n: t.dtype for n, t in dense.items()}
    assert all(torch.equal(read_dense[name], tensor) for name, tensor in dense.items())
    if max_shard_bytes == 1:  # a tensor is never divided: one per file
        tensors = len(dense) + sum(3 + (linear.bias is not None) for linear in linears.values())
        shards = [f"model-{n:05d}-of-{tensors:05d}.safetensors" for n in range(1, tensors + 1)]
        assert files == ["config.json", *shards, "model.safetensors.index.json"]
    if max_shard_bytes == 5e9:
        assert files == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_bits_lie_as_the_format_says(tmp_path: Path, bits: int) -> None:
    """Codes: field k of a row is bits k*b .. k*b+b-1, lowest first; zero points the same down the column of a group."""
    linear = make_linear(torch.Generator().manual_seed(1), bits, rows=35, groups=3, size=24, bias=False)
    write(tmp_path, {"x": linear}, {})
    tensors = load_file(tmp_path / "model.safetensors")
    assert set(tensors) == {"x.weight_packed", "x.weight_scale", "x.weight_zero_point"}
    packed, zero_point = tensors["x.weight_packed"], tensors["x.weight_zero_point"]
    assert packed.dtype == zero_point.dtype == torch.int32
    assert packed.shape == (35, -(-72 * bits // 32))
    assert zero_point.shape == (-(-35 * bits // 32), 3)

    def fields(words: Tensor, count: int) -> list[int]:
        stream = sum((int(word) & 0xFFFFFFFF) << (32 * index) for index, word in enumerate(words))
        return [stream >> (bits * index) & (2**bits - 1) for index in range(count)]

    assert [fields(row, 72) for row in packed] == linear.codes.tolist()
    assert [fields(column, 35) for column in zero_point.T] == linear.zero_point.T.tolist()


@settings(deadline=None, max_examples=40)
@given(bits=st.sampled_from([2, 3, 4, 8]), rows=st.integers(1, 70), groups=st.integers(1, 5), seed=st.integers(0, 999))
def test_zero_points_survive_packing(bits: int, rows: int, groups: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    zero_point = torch.randint(0, 2**bits, (rows, groups), generator=generator, dtype=torch.uint8)
    packed = pack_zero_point(zero_point, bits=bits)
    assert torch.equal(unpack_zero_point(packed, bits=bits, out_features=rows), zero_point)


def test_dequantize_is_codes_minus_zero_point_times_scale() -> None:
    linear = make_linear(torch.Generator().manual_seed(2), 3, rows=5, groups=2, size=8, bias=False)
    for row in range(5):
        for column in range(16):
            group = column // 8
            step = int(linear.codes[row, column]) - int(linear.zero_point[row, group])
            expected = torch.tensor(float(step)) * linear.scale[row, group]
            assert linear.dequantize()[row, column] == expected
    assert linear.dequantize(torch.bfloat16).dtype == torch.bfloat16


def test_companion_files_are_the_tokenizers_and_the_generation_settings(tmp_path: Path) -> None:
    wanted = ["chat_template.jinja", "generation_config.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"]
    for name in [*wanted, "model.safetensors", "README.md", "modeling_evil.py", "config.json"]:
        (tmp_path / name).touch()
    (tmp_path / "tokenizer-cache").mkdir()
    assert [file.name for file in companion_files(tmp_path)] == wanted


# What is wrong with a checkpoint is said when it is opened, with the place.


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A sound packed checkpoint of two linears in several shards."""
    generator = torch.Generator().manual_seed(3)
    names = ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj")
    write(
        tmp_path / "model",
        {name: make_linear(generator, 2, 16, 2, 32, bias=False) for name in names},
        {"model.norm.weight": torch.ones(16)},
        max_shard_bytes=100,
    )
    assert len(PackedCheckpoint.open(tmp_path / "model").modules) == 2
    return tmp_path / "model"


@pytest.fixture
def edit(checkpoint: Path) -> Callable[[Callable[[dict[str, Any]], None]], None]:
    """A function that changes the quantization_config in config.json."""

    def change(how: Callable[[dict[str, Any]], None]) -> None:
        config = read_config(checkpoint)
        how(config["quantization_config"])
        (checkpoint / "config.json").write_text(json.dumps(config))

    return change


def refused(path: Path) -> InputError:
    with pytest.raises(InputError) as caught:
        PackedCheckpoint.open(path)
    assert str(path) in caught.value.message
    return caught.value


def test_a_full_precision_model_is_not_packed(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text('{"model_type": "llama"}')
    error = refused(checkpoint)
    assert "not a packed qat checkpoint" in error.message
    assert error.hint is not None
    assert "qat pack" in error.hint


@pytest.mark.parametrize("other", [{"quant_method": "gptq", "bits": 4}, [], "qat", 3])
def test_another_methods_checkpoint_is_not_packed(checkpoint: Path, other: object) -> None:
    (checkpoint / "config.json").write_text(json.dumps({"quantization_config": other}))
    assert "not a packed qat checkpoint" in refused(checkpoint).message


@pytest.mark.parametrize("version", [2, 0, "1", None])
def test_another_format_version_is_refused(checkpoint: Path, edit: Callable[..., None], version: object) -> None:
    edit(lambda q: q.update(format_version=version))
    assert f"packed format {version}; this qat reads 1" in refused(checkpoint).message


@pytest.mark.parametrize(
    "modules",
    [
        None,
        [],
        "model.layers.0",
        {"model.layers.0.mlp.up_proj": {"bits": 2}},
        {"model.layers.0.mlp.up_proj": None},
        {"model.layers.0.mlp.up_proj": {"bits": 2, "group_size": 32, "in_features": 64, "out_features": 16, "x": 1}},
        {"model.layers.0.mlp.up_proj": {"bits": 5, "group_size": 32, "in_features": 64, "out_features": 16}},
        {"model.layers.0.mlp.up_proj": {"bits": "2", "group_size": 32, "in_features": 64, "out_features": 16}},
    ],
)
def test_malformed_modules_are_refused(checkpoint: Path, edit: Callable[..., None], modules: object) -> None:
    edit(lambda q: q.update(modules=modules))
    assert "quantization_config.modules is malformed" in refused(checkpoint).message


def test_a_checkpoint_of_nothing_is_refused(checkpoint: Path, edit: Callable[..., None]) -> None:
    edit(lambda q: q.update(modules={}))
    assert "has no quantized linear" in refused(checkpoint).message


def test_absent_modules_are_refused(checkpoint: Path, edit: Callable[..., None]) -> None:
    edit(lambda q: q.pop("modules"))
    assert "quantization_config.modules is malformed" in refused(checkpoint).message


@pytest.mark.parametrize("suffix", ["weight_packed", "weight_scale", "weight_zero_point"])
def test_a_missing_tensor_is_named(checkpoint: Path, suffix: str) -> None:
    name = f"model.layers.0.mlp.up_proj.{suffix}"
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    del index["weight_map"][name]
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    assert f"lacks 1 tensors of quantized linears, first: {name}" in refused(checkpoint).message


def test_a_missing_shard_is_named(checkpoint: Path) -> None:
    shard = sorted(checkpoint.glob("*.safetensors"))[1]
    shard.unlink()
    assert f"{shard.name} is missing" in refused(checkpoint).message


def test_a_config_that_is_absent_or_no_json_object_is_refused(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text("{")
    assert "cannot be read" in refused(checkpoint).message
    (checkpoint / "config.json").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in refused(checkpoint).message
    (checkpoint / "config.json").write_text("[1]")
    assert "not a JSON object" in refused(checkpoint).message
    (checkpoint / "config.json").unlink()
    assert "no config.json" in refused(checkpoint).message


def test_a_truncated_shard_is_an_input_error_when_it_is_read(checkpoint: Path) -> None:
    opened = PackedCheckpoint.open(checkpoint)
    name = "model.layers.0.mlp.up_proj"
    shard = checkpoint / opened.shards[name + ".weight_packed"]
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(InputError, match=shard.name):
        opened.linear(name)


def test_a_shard_without_the_tensor_that_the_index_promises(checkpoint: Path) -> None:
    opened = PackedCheckpoint.open(checkpoint)
    name = "model.layers.0.mlp.up_proj.weight_packed"
    save_file({"other": torch.zeros(1)}, checkpoint / opened.shards[name])
    with pytest.raises(InputError, match=name):
        opened.tensor(name)


def test_the_code_of_a_model_travels_with_it(tmp_path: Path) -> None:
    for name in ("modeling_odd.py", "odd.tiktoken", "tokenizer.json", "notes.md", "model.safetensors"):
        (tmp_path / name).touch()
    (tmp_path / "config.json").write_text('{"auto_map": {"AutoConfig": "modeling_odd.OddConfig"}}')
    assert [file.name for file in companion_files(tmp_path)] == ["modeling_odd.py", "odd.tiktoken", "tokenizer.json"]
