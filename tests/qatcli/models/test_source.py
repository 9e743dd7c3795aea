"""Where a model comes from: folders, GGUF files, and what is said when it does not come."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qatcli.errors import InputError, QatError
from qatcli.models.gguf import cache_directory
from qatcli.models.source import load_tokenizer, open_source


@pytest.fixture
def model(random_llama: Path, tmp_path: Path) -> Path:
    """A copy of a random model that a test may damage."""
    return shutil.copytree(random_llama, tmp_path / "model")


def rewrite(model: Path, **changes: torch.Tensor) -> None:
    tensors = load_file(model / "model.safetensors") | changes
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def test_a_folder_is_read_tensor_by_tensor(model: Path) -> None:
    source = open_source(str(model))
    wanted = ["model.norm.weight", "model.layers.2.mlp.up_proj.weight"]
    tensors = source.tensors(wanted)
    stored = load_file(model / "model.safetensors")
    assert source.path == model
    assert list(source.shards) == sorted(stored)
    assert list(tensors) == wanted
    assert all(torch.equal(tensor, stored[name]) for name, tensor in tensors.items())
    assert source.config().num_hidden_layers == 3


def test_tensors_keep_the_dtype_of_the_file(model: Path) -> None:
    rewrite(model, **{"model.norm.weight": torch.ones(32, dtype=torch.bfloat16)})
    assert open_source(str(model)).tensors(["model.norm.weight"])["model.norm.weight"].dtype == torch.bfloat16


def test_a_missing_tensor_is_named(model: Path) -> None:
    with pytest.raises(InputError, match=r"no tensor `model\.layers\.9\.mlp\.up_proj\.weight`") as caught:
        open_source(str(model)).tensors(["model.norm.weight", "model.layers.9.mlp.up_proj.weight"])
    assert str(model) in caught.value.message


def test_a_shard_damaged_after_opening_is_an_input_error(model: Path) -> None:
    source = open_source(str(model))
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"model\.safetensors"):
        source.tensors(["model.norm.weight"])


def test_the_fingerprint_follows_the_config_and_the_shape_of_the_weights(model: Path, random_llama: Path) -> None:
    original = open_source(str(random_llama)).fingerprint
    assert open_source(str(model)).fingerprint == original, "a copy elsewhere is the same model"
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert open_source(str(model)).fingerprint != original
    (model / "config.json").write_bytes((random_llama / "config.json").read_bytes())
    assert open_source(str(model)).fingerprint == original
    rewrite(model, extra=torch.zeros(3))
    assert open_source(str(model)).fingerprint != original


@pytest.mark.parametrize(("name", "said"), [("config.json", "no config.json"), ("model.safetensors", "neither")])
def test_a_folder_that_is_no_model(model: Path, name: str, said: str) -> None:
    (model / name).unlink()
    with pytest.raises(InputError, match=said):
        open_source(str(model))


def test_a_damaged_file_is_refused_when_the_model_is_opened(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"\x08\0\0\0")
    with pytest.raises(InputError, match="not a readable safetensors file"):
        open_source(str(model))


def test_a_config_that_transformers_does_not_know(model: Path) -> None:
    (model / "config.json").write_text('{"model_type": "never-heard-of"}')
    with pytest.raises(InputError, match="transformers does not accept"):
        open_source(str(model)).config()


def test_a_model_without_a_tokenizer(model: Path) -> None:
    with pytest.raises(InputError, match="no tokenizer that loads") as caught:
        load_tokenizer(model)
    assert str(model) in caught.value.message


@pytest.mark.parametrize("name", ["not a hub id", "a/b/c/d", "owner/"])
def test_a_source_that_is_neither_folder_nor_hub_id(name: str) -> None:
    with pytest.raises(InputError, match="neither a folder, a GGUF file nor a hub id"):
        open_source(name)


def test_a_hub_that_cannot_be_reached_is_an_input_error() -> None:
    with pytest.raises(InputError, match="owner/model could not be fetched") as caught:  # the tests switch the hub off
        open_source("owner/model")
    assert caught.value.hint is not None
    assert "local folder" in caught.value.hint


# GGUF files.


def test_a_file_that_is_not_gguf(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(InputError, match=r"is a file but not \.gguf"):
        open_source(str(tmp_path / "model.bin"))


def test_a_gguf_file_that_is_not_in_the_folder(model: Path) -> None:
    with pytest.raises(InputError, match=r"missing\.gguf does not exist"):
        open_source(str(model), gguf_file="missing.gguf")


def test_gguf_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(QatError) as caught:
        open_source(str(tmp_path / "model.gguf"))
    assert caught.value.hint is not None
    assert "qatcli[gguf]" in caught.value.hint


def test_a_damaged_gguf_file_is_refused_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf", reason="the package gguf is not installed (pip install 'qatcli[gguf]')")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(range(64)))
    with pytest.raises(InputError, match=r"model\.gguf is not a GGUF file of version 2 or 3"):
        open_source(str(tmp_path / "model.gguf"))
    assert not (tmp_path / "cache").exists() or list((tmp_path / "cache").rglob("*.safetensors")) == []


def test_the_cache_is_where_the_user_keeps_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "qat"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_directory() == tmp_path / "home" / ".cache" / "qat"
