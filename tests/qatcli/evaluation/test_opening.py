"""Anything that holds a model is opened by what is in it, and computes what the checkpoint computes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qatcli.directory import begin, commit
from qatcli.errors import InputError
from qatcli.evaluation import opening
from qatcli.evaluation.opening import open_candidate
from qatcli.formats import FORMATS, ExportOptions
from qatcli.packed import PackedCheckpoint
from qatcli.sizes import model_size, packed_size, parameter_count

CPU = torch.device("cpu")
TOKENS = torch.arange(2, 50)[None]
FACTS: dict[str, dict[str, str]] = {"identity": {}, "recipe": {}, "metrics": {}}


@pytest.fixture(scope="module")
def packed(tiny_llama: Path, pack_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "model"
    return pack_model(tiny_llama, out, bits=4, group_size=32, scale_dtype=torch.float16)


def _logits(path: Path) -> Tensor:
    with torch.no_grad():
        return open_candidate(str(path), CPU).load()(TOKENS).logits.float()


def _with_a_merge(model: Path, out: Path) -> Path:
    """A copy whose tokenizer knows "th": transformers reads no GGUF tokenizer without merges."""
    shutil.copytree(model, out)
    tokenizer = json.loads((out / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["th"] = vocabulary.pop("\u0100")  # the byte 0, which no text holds
    tokenizer["model"]["merges"] = [["t", "h"]]
    (out / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return out


@pytest.mark.parametrize(
    ("name", "loaded_as"),
    [
        ("native", "packed codes"),
        ("gptq", "gptq_v2, imported bit for bit"),
        ("awq", "awq, imported bit for bit"),
        ("bitblas", "bitblas, imported bit for bit"),
        ("compressed-tensors", "compressed-tensors, imported bit for bit"),
        ("mlx", "mlx, imported bit for bit"),
        ("dense", "weights as stored"),
        ("gguf", "GGUF, dequantized to fp32"),
    ],
)
def test_every_export_is_opened(packed: Path, tmp_path: Path, name: str, loaded_as: str) -> None:
    out = tmp_path / "export"
    if name == "gguf":
        pytest.importorskip("gguf", reason="needs the extra `gguf`")
        packed = _with_a_merge(packed, tmp_path / "merged")
    FORMATS[name].write(PackedCheckpoint.open(packed), out, ExportOptions(runtimes=False))
    candidate = open_candidate(str(out), CPU)
    assert candidate.loaded_as == loaded_as
    assert candidate.tokenizer()("the cat")["input_ids"]
    expected = _logits(packed)
    # everything that is not quantized is rounded to half precision, in GGUF the offsets of groups, too
    assert (_logits(out) - expected).abs().max() < 0.05 * expected.std()
    size = model_size(candidate.files or out, candidate.load())
    assert size["file_bytes"] == sum(file.stat().st_size for file in [*out.glob("*.safetensors"), *out.glob("*.gguf")])
    assert (size["bits_per_weight"] is None) == (name in ("dense", "gguf"))
    if name not in ("dense", "gguf"):
        assert 4.5 < size["bits_per_weight"] < 5.5


def test_sizes_agree_with_those_counted_from_tensors(packed: Path) -> None:
    found = model_size(packed, open_candidate(str(packed), CPU).load())
    counted = packed_size(PackedCheckpoint.open(packed))
    stored = sum(tensor.numel() * tensor.element_size() for tensor in load_file(packed / "model.safetensors").values())
    assert sum(counted["bytes"].values()) == stored
    assert found["bits_per_weight"] == counted["bits_per_weight"]
    assert found["parameters"] == counted["quantized_weights"] + counted["other_parameters"]
    assert found["bits_per_parameter"] == counted["bits_per_parameter"]


def test_tied_weights_count_once(tiny_llama: Path, tiny_llama_tied: Path) -> None:
    untied, tied = (open_candidate(str(path), CPU).load() for path in (tiny_llama, tiny_llama_tied))
    assert parameter_count(untied) - parameter_count(tied) == tied.lm_head.weight.numel()


def test_a_stage_directory_is_verified(packed: Path, tmp_path: Path) -> None:
    partial = begin(tmp_path / "pack", {}, restart=False)
    for file in packed.iterdir():
        (partial / file.name).write_bytes(file.read_bytes())
    commit(tmp_path / "pack", partial, {"kind": "packed", "stage": "pack", **FACTS})
    assert torch.equal(_logits(tmp_path / "pack"), _logits(packed))
    content = bytearray((tmp_path / "pack" / "model.safetensors").read_bytes())
    content[-3] ^= 1
    (tmp_path / "pack" / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="damaged"):
        open_candidate(str(tmp_path / "pack"), CPU)


def test_a_stage_without_a_model_is_refused(tmp_path: Path) -> None:
    facts = {"kind": "metrics", "stage": "eval", **FACTS}
    commit(tmp_path / "eval", begin(tmp_path / "eval", {}, restart=False), facts)
    with pytest.raises(InputError, match="holds a metrics, not a model") as caught:
        open_candidate(str(tmp_path / "eval"), CPU)
    assert "--from" not in str(caught.value.hint)


def test_a_config_beside_a_gguf_file_is_in_nobodys_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Repositories of GGUF files often have one."""
    opened: list[str] = []
    monkeypatch.setattr(opening, "open_source", lambda target: opened.append(target))
    monkeypatch.setattr(opening, "full_precision", lambda *_, **__: None)
    for name in ("model.gguf", "config.json"):
        (tmp_path / name).write_text("{}")
    open_candidate(str(tmp_path), CPU)
    assert opened == [str(tmp_path / "model.gguf")]


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"neither safetensors nor a GGUF file"):
        open_candidate(str(tmp_path), CPU)
    with pytest.raises(InputError, match="does not exist"):
        open_candidate(str(tmp_path / "nothing"), CPU)
    (tmp_path / "model.bin").touch()
    for target in ("a/b/c", str(tmp_path / "model.bin")):
        with pytest.raises(InputError, match=f"^{target} is ") as caught:
            open_candidate(target, CPU)
        assert caught.value.hint
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(InputError, match="2 GGUF files"):
        open_candidate(str(tmp_path), CPU)


def test_a_checkpoint_that_is_not_imported_is_refused_before_it_is_loaded(packed: Path, tmp_path: Path) -> None:
    """And so before the models beside it are measured."""
    FORMATS["gptq"].write(PackedCheckpoint.open(packed), tmp_path / "gptq", ExportOptions(runtimes=False))
    tensors = load_file(tmp_path / "gptq" / "model.safetensors")
    name = next(name for name in tensors if name.endswith("g_idx"))
    reordered = {**tensors, name: tensors[name].flip(0).contiguous()}
    save_file(reordered, tmp_path / "gptq" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="reordered by activation") as caught:
        open_candidate(str(tmp_path / "gptq"), CPU)
    assert "without desc_act" in (caught.value.hint or "")
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "bitsandbytes"
    (tmp_path / "gptq" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="quant_method bitsandbytes"):
        open_candidate(str(tmp_path / "gptq"), CPU)


def test_what_orders_columns_is_no_bits_of_weights(packed: Path, tmp_path: Path) -> None:
    FORMATS["gptq"].write(PackedCheckpoint.open(packed), tmp_path / "gptq", ExportOptions(runtimes=False))
    sizes = [model_size(path, open_candidate(str(path), CPU).load()) for path in (packed, tmp_path / "gptq")]
    assert sizes[0]["bits_per_weight"] == sizes[1]["bits_per_weight"]
