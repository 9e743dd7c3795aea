"""Bad inputs: models and checkpoints, of this tool and of others."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hostile import CANARY, DEEP, Place, case, edit, header, sign, use

# config.json of the model.


def config(name: str, said: str, how: Callable[[dict[str, Any]], Any]) -> None:
    """A case with a changed config.json."""

    @case(f"config.json: {name}", "calibrate", 3, said)
    def _(p: Place) -> list[str]:
        edit(p.model / "config.json", how)
        return use(p)


def raw_config(name: str, said: str, content: bytes) -> None:
    """A case with other bytes as config.json."""

    @case(f"config.json: {name}", "calibrate", 3, said)
    def _(p: Place) -> list[str]:
        (p.model / "config.json").write_bytes(content)
        return use(p)


config("hidden_size is text", "transformers does not accept", lambda c: c.update(hidden_size="big"))
config("no attention heads", "", lambda c: c.update(num_attention_heads=0))
config("a billion layers", "num_hidden_layers is 1000000000", lambda c: c.update(num_hidden_layers=10**9))
config("-1 layers", "num_hidden_layers is -1", lambda c: c.update(num_hidden_layers=-1))
config("layers is null", "transformers does not accept", lambda c: c.update(num_hidden_layers=None))
config("other sizes than the weights", "config.json implies", lambda c: c.update(hidden_size=128))
config("unknown model_type", "transformers does not accept", lambda c: c.update(model_type="never-heard-of"))
config("model_type is a list", "transformers does not accept", lambda c: c.update(model_type=["llama"]))
config("quantized already", "is quantized already", lambda c: c.update(quantization_config={"quant_method": "fp8"}))
config("attention code of the hub", "asks for code from the hub", lambda c: c.update(attn_implementation="evil/kernel"))
config("weights named elsewhere", "transformers_weights is", lambda c: c.update(transformers_weights="../x.bin"))
raw_config("empty", "malformed", b"")
raw_config("a list", "not a JSON object", b"[]")
raw_config("nested 100,000 deep", "nested too deeply", DEEP.encode())
raw_config("not UTF-8", "malformed", b'{"a": "\xff\xfe"}')
raw_config("a number of 10,000 digits", "malformed", b'{"hidden_size": ' + b"9" * 10_000 + b"}")


@case("config.json: a named pipe", "calibrate", 3, "config.json is missing")
def _(p: Place) -> list[str]:
    (p.model / "config.json").unlink()
    os.mkfifo(p.model / "config.json")
    return use(p)


@case("config.json: auto_map to Python code, not trusted", "calibrate", 3, "")
def _(p: Place) -> list[str]:
    (p.model / "evil.py").write_text(CANARY.format(str(p.outside / "canary")))
    names = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    edit(p.model / "config.json", lambda c: c.update(auto_map=names, model_type="evil"))
    return use(p)


# The index and the shards of the model.


def index(name: str, said: str, weight_map: Any) -> None:
    """A case with an index."""

    @case(f"index: {name}", "calibrate", 3, said)
    def _(p: Place) -> list[str]:
        (p.model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return use(p)


index("a shard in another folder", "points outside", {"a": "../outside/precious"})
index("an absolute path", "points outside", {"a": "/etc/passwd"})
index("a shard that is not there", "is missing", {"a": "model-00001-of-00002.safetensors"})
index("a number for a file name", "malformed", {"a": 3})
index("a list for a map", "malformed", ["a"])
index("tensors that the shard lacks", "", {"model.embed_tokens.weight": "model.safetensors", "x": "model.safetensors"})


def shard(name: str, damage: Callable[[Path], Any]) -> None:
    """A case with a damaged model.safetensors."""

    @case(f"safetensors: {name}", "calibrate", 3, "safetensors")
    def _(p: Place) -> list[str]:
        damage(p.model / "model.safetensors")
        return use(p)


def _first(entries: dict[str, Any]) -> dict[str, Any]:
    return entries[sorted(name for name in entries if name != "__metadata__")[0]]


def _same(entries: dict[str, Any]) -> None:
    names = [name for name in entries if name != "__metadata__"]
    entries[names[0]] = dict(entries[names[1]])


shard("empty", lambda file: file.write_bytes(b""))
shard("7 bytes", lambda file: file.write_bytes(b"\0" * 7))
shard("a header of 2^63 bytes", lambda file: header(file, lambda h: None, length=2**63))
shard("a header longer than the file", lambda file: header(file, lambda h: None, length=file.stat().st_size))
shard("a header that is no JSON", lambda file: file.write_bytes(struct.pack("<Q", 8) + b"\xff" * 8))
shard("a header nested deep", lambda file: file.write_bytes(struct.pack("<Q", len(DEEP)) + DEEP.encode()))
shard("overlapping tensors", lambda file: header(file, _same))
shard("offsets beyond the end", lambda file: header(file, lambda h: _first(h).update(data_offsets=[0, 2**40])))
shard("offsets backwards", lambda file: header(file, lambda h: _first(h).update(data_offsets=[8, 0])))
shard("a shape that does not fit its bytes", lambda file: header(file, lambda h: _first(h).update(shape=[2**40])))
shard("a negative shape", lambda file: header(file, lambda h: _first(h).update(shape=[-1])))
shard("an unknown type", lambda file: header(file, lambda h: _first(h).update(dtype="F7")))
shard("a pickle under its name", lambda file: file.write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR."))


@case("safetensors: a link to another place", "calibrate", 3, "link that leads out")
def _(p: Place) -> list[str]:
    (p.model / "model.safetensors").rename(p.outside / "x.safetensors")
    (p.model / "model.safetensors").symlink_to(p.outside / "x.safetensors")
    return use(p)


@case("only pickled weights", "calibrate", 3, "only safetensors checkpoints are read")
def _(p: Place) -> list[str]:
    (p.model / "model.safetensors").unlink()
    (p.model / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'touch x'\ntR.")
    return use(p)


@case("model.source does not exist", "calibrate", 2, "model.source")
def _(p: Place) -> list[str]:
    return use(p, **{"model.source": "./nowhere"})


# A packed checkpoint with corrected digests.


def packed(name: str, said: str, how: Callable[[Path], Any]) -> None:
    """A case that changes the packed checkpoint that export reads, and its digests with it."""

    @case(f"packed: {name}", "export", 3, said)
    def _(p: Place) -> None:
        how(p.run / "pack")
        sign(p.run / "pack")


def quantization(how: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Change quantization_config."""
    return lambda path: edit(path / "config.json", lambda c: how(c["quantization_config"]))


def module(**changes: object) -> Callable[[Path], None]:
    """Change the entry of the first quantized linear."""
    return quantization(lambda q: next(iter(q["modules"].values())).update(changes))


packed("5 bits", "modules is malformed", module(bits=5))
packed("groups of 0", "modules is malformed", module(group_size=0))
packed("groups that divide nothing", "modules is malformed", module(group_size=7))
packed("negative sizes", "modules is malformed", module(in_features=-64))
packed("sizes of 2^62", "config.json implies", module(in_features=2**62, group_size=-1))
packed("other shapes than the weights", "config.json implies", module(in_features=128))
packed("other groups than the scales", "config.json implies", module(group_size=16))
packed("other bits than the codes", "config.json implies", module(bits=4))
packed("an entry is text", "modules is malformed", quantization(lambda q: q["modules"].update({"x": "y"})))
packed(
    "a linear without tensors", "lacks 3 tensors", quantization(lambda q: q["modules"].update(x=_first(q["modules"])))
)
packed("another method", "not a packed qat checkpoint", quantization(lambda q: q.update(quant_method="gptq")))
packed("a later format", "packed format 99", quantization(lambda q: q.update(format_version=99)))
packed(
    "scales are integers",
    "config.json implies F16 or BF16 or F32",
    lambda path: header(path / "model.safetensors", _integer_scales),
)


def _integer_scales(entries: dict[str, Any]) -> None:
    for name, entry in entries.items():
        if name.endswith("weight_scale"):
            entry["dtype"] = "I16"


@case("packed: a tokenizer file is a link to a private file", "export", 3, "link that leads out")
def _(p: Place) -> None:
    file = p.run / "pack" / "tokenizer_config.json"
    file.rename(p.outside / "tokenizer_config.json")
    file.symlink_to(p.outside / "tokenizer_config.json")
    sign(p.run / "pack")


# A checkpoint of another tool.


def foreign(name: str, said: str, how: Callable[[Path], Any]) -> None:
    """A case that imports a damaged GPTQ checkpoint."""

    @case(f"import: {name}", "import", 3, said)
    def _(p: Place) -> list[str]:
        source = shutil.copytree(p.run / "export" / "gptq", p.run.parent / "foreign")
        how(source)
        return ["--from", str(source)]


foreign("bits are text", "", quantization(lambda q: q.update(bits="many")))
foreign("settings are a list", "", lambda path: edit(path / "config.json", lambda c: c.update(quantization_config=[1])))
foreign("no layers", "", lambda path: edit(path / "config.json", lambda c: c.update(num_hidden_layers=0)))
foreign("a missing shard", "is missing", lambda path: sorted(path.glob("*.safetensors"))[0].unlink())
foreign("not a checkpoint", "config.json", lambda path: (path / "config.json").unlink())
