"""Shards: complete or not there, and an index that is believed only about files beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from qatcli.errors import InputError, ResourceError
from qatcli.shards import (
    INDEX,
    SINGLE,
    ShardWriter,
    index_shards,
    load_state,
    load_tensors,
    read_header,
    save_state,
    save_tensors,
    shard_map,
)


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    return {name: torch.randn(10) for name in "abcde"}  # 40 bytes each


def names(path: Path) -> list[str]:
    return sorted(file.name for file in path.iterdir())


def test_shards_hold_no_more_than_the_limit(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    writer = ShardWriter(tmp_path, max_shard_bytes=80)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()
    shards = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert names(tmp_path) == [*shards, INDEX]
    assert [sorted(load_file(tmp_path / shard)) for shard in shards] == [["a", "b"], ["c", "d"], ["e"]]
    assert shard_map(tmp_path) == {name: shards[i // 2] for i, name in enumerate("abcde")}
    assert json.loads((tmp_path / INDEX).read_text())["metadata"] == {"total_size": 200}


def test_a_tensor_larger_than_the_limit_has_a_shard_of_its_own(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    writer = ShardWriter(tmp_path, max_shard_bytes=100)
    for name, tensor in {"a": tensors["a"], "large": torch.randn(99), "b": tensors["b"]}.items():
        writer.add(name, tensor)
    writer.close()
    assert len(set(shard_map(tmp_path).values())) == 3


def test_one_shard_needs_no_index(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    writer = ShardWriter(tmp_path)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()
    assert names(tmp_path) == [SINGLE]
    assert shard_map(tmp_path) == dict.fromkeys("abcde", SINGLE)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_tensors(tmp_path / SINGLE).items())


def test_nothing_looks_finished_before_close(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    writer = ShardWriter(tmp_path, max_shard_bytes=40)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    assert len(names(tmp_path)) >= 4, "shards are written as they fill, not kept in memory"
    assert list(tmp_path.glob("*.safetensors")) == []
    with pytest.raises(InputError):
        shard_map(tmp_path)


@pytest.mark.parametrize("limit", [1, 5e9])
def test_a_name_cannot_be_added_twice(tmp_path: Path, limit: float) -> None:
    writer = ShardWriter(tmp_path, max_shard_bytes=limit)
    writer.add("a", torch.ones(3))
    writer.add("b", torch.ones(3))
    with pytest.raises(ValueError, match="tensor a was added twice"):
        writer.add("a", torch.ones(3))


def test_views_and_parameters_are_stored_as_what_they_show(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    writer = ShardWriter(tmp_path)
    writer.add("transposed", base.T)
    writer.add("column", base[:, 1])
    writer.add("parameter", torch.nn.Parameter(base))
    writer.close()
    read = load_tensors(tmp_path / SINGLE)
    assert torch.equal(read["transposed"], base.T)
    assert torch.equal(read["column"], torch.tensor([1.0, 5.0, 9.0]))
    assert torch.equal(read["parameter"], base)


def test_a_full_disk_is_said_and_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.safetensors"
    save_tensors(file, {"old": torch.ones(1)})

    def fail(_: object, path: Path, **__: object) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("qatcli.shards.save_file", fail)
    with pytest.raises(ResourceError, match="No space left") as caught:
        save_tensors(file, {"new": torch.ones(1)})
    assert str(file) in caught.value.message
    assert set(load_tensors(file)) == {"old"}


def test_a_directory_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="absent"):
        save_tensors(tmp_path / "absent" / "x.safetensors", {"a": torch.ones(1)})


def test_index_shards_lists_files_under_their_own_names(tmp_path: Path) -> None:
    for index, name in enumerate(["model-block-0.safetensors", "model-rest.safetensors"]):
        save_file({f"t{index}": torch.ones(index + 1)}, tmp_path / name)
    index_shards(tmp_path, sorted(tmp_path.glob("*.safetensors")))
    assert shard_map(tmp_path) == {"t0": "model-block-0.safetensors", "t1": "model-rest.safetensors"}
    assert json.loads((tmp_path / INDEX).read_text())["metadata"]["total_size"] == 12


@pytest.mark.parametrize(
    "target", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", 3, None, ["x"]]
)
def test_an_index_that_points_elsewhere_is_refused(tmp_path: Path, target: object) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "secret.safetensors")
    path = tmp_path / "model"
    (path / "sub").mkdir(parents=True)
    save_file({"a": torch.ones(1)}, path / "sub" / "x.safetensors")
    (path / INDEX).write_text(json.dumps({"weight_map": {"a": target}}))
    with pytest.raises(InputError) as caught:
        shard_map(path)
    assert str(path) in caught.value.message


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": ["a"]}', "\x00"])
def test_a_malformed_index_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(InputError, match="malformed"):
        shard_map(tmp_path)


def test_a_directory_without_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"never unpickled")
    with pytest.raises(InputError, match="neither"):
        shard_map(tmp_path)


@pytest.mark.parametrize("size", [0, 7, 60])
def test_a_truncated_file_is_refused(tmp_path: Path, tensors: dict[str, Tensor], size: int) -> None:
    save_file(tensors, tmp_path / SINGLE)
    (tmp_path / SINGLE).write_bytes((tmp_path / SINGLE).read_bytes()[:size])
    with pytest.raises(InputError, match=SINGLE):
        shard_map(tmp_path)
    with pytest.raises(InputError, match=SINGLE):
        load_tensors(tmp_path / SINGLE)
    with pytest.raises(InputError, match="absent"):
        load_tensors(tmp_path / "absent.safetensors")


def test_a_killed_writer_is_continued_where_its_last_whole_shard_ends(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    def write(path: Path, stop: int | None = None, *, resume: bool = False) -> ShardWriter:
        writer = ShardWriter(path, max_shard_bytes=80, resume=resume)
        for name in list(tensors)[:stop]:
            writer.add(name, tensors[name])
        return writer

    write(tmp_path / "whole").close()
    write(tmp_path / "killed", 4)  # a and b are on disk, c and d were in memory
    kept = (tmp_path / "killed" / "shard-0.tmp").stat()
    (tmp_path / "killed" / "shard-1.tmp.writing").write_bytes(b"half")
    writer = write(tmp_path / "killed", resume=True)
    assert writer.kept == {"a", "b"}
    with pytest.raises(ValueError, match="added twice"):
        writer.add("a", tensors["a"])
    writer.close()
    (tmp_path / "killed" / "shard-1.tmp.writing").unlink(missing_ok=True)
    assert names(tmp_path / "killed") == names(tmp_path / "whole")
    for name in names(tmp_path / "whole"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert (tmp_path / "killed" / "model-00001-of-00003.safetensors").stat().st_ino == kept.st_ino
    assert ShardWriter(tmp_path / "killed").kept == frozenset()


def test_a_header_is_read_without_the_data(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, 3, dtype=torch.float16), "b": torch.ones(5)}, tmp_path / SINGLE)
    header = read_header(tmp_path / SINGLE)
    assert {name: (entry.dtype, entry.shape, entry.bytes) for name, entry in header.items()} == {
        "a": ("F16", (2, 3), 12),
        "b": ("F32", (5,), 20),
    }
    content = (tmp_path / SINGLE).read_bytes()
    assert content[header["b"].begin : header["b"].end] == torch.ones(5).numpy().tobytes()


def test_a_state_comes_back_as_it_was_or_not_at_all(tmp_path: Path) -> None:
    state = {"step": torch.tensor(3), "mask": torch.tensor([True, False]), "rate": torch.randn(4).bfloat16()}
    file = tmp_path / "resume.safetensors"
    save_state(file, state)
    found = load_state(file)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())

    content = file.read_bytes()
    start = int.from_bytes(content[:8], "little") + 8
    for position in range(start, len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1
        file.write_bytes(flipped)
        with pytest.raises(InputError, match="is damaged"):
            load_state(file)
    save_tensors(file, state)
    with pytest.raises(InputError, match="is damaged"):
        load_state(file)


def test_a_shard_is_on_disk_before_it_has_its_name(tmp_path: Path, disk_order: list[str]) -> None:
    save_tensors(tmp_path / "a.safetensors", {"a": torch.ones(1)})
    assert disk_order == [f"{tmp_path}/a.safetensors.writing", f"named {tmp_path}/a.safetensors"]
