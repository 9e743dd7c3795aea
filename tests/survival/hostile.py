"""Inputs that are damaged, wrong or meant to harm, each with the exit code that the contract has for it.

A case changes a private copy of everything that a stage reads and returns further arguments of the command. What the
command answers must be an error and no traceback, standard output stays empty, and nothing beside the run directory
changes or runs.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import STAGES, Chain, Done, contents

DEEP = "[" * 100_000
CANARY = "open({!r}, 'w').write('executed')"


@dataclass(frozen=True)
class Place:
    """What a case may damage: the run directory, the model, the text; `outside` must stay as it is."""

    run: Path
    model: Path
    text: Path
    outside: Path
    recipe: Path


@dataclass(frozen=True)
class Case:
    """A bad input for `stage`; `said` is part of the error."""

    name: str
    stage: str
    code: int
    said: str
    damage: Callable[[Place], list[str] | None]


CASES: list[Case] = []


def case(name: str, stage: str, code: int, said: str) -> Callable[[Callable[[Place], Any]], None]:
    """Register a function as a case."""

    def register(damage: Callable[[Place], Any]) -> None:
        CASES.append(Case(name, stage, code, said, damage))

    return register


def attempt(chain: Chain, bad: Case, folder: Path, model: Path) -> tuple[Done, list[str]]:
    """How the command ended on a bad input, and what is wrong about that."""
    place = Place(folder / "run", folder / "model", folder / "text.jsonl", folder / "outside", folder / "recipe.yaml")
    shutil.copytree(model, place.model)
    place.outside.mkdir()
    (place.outside / "precious").write_text("precious")
    place.text.write_text("".join(json.dumps({"text": f"the cat sees {n} birds. " * 20}) + "\n" for n in range(60)))
    place.recipe.write_text(chain.recipe.read_text())
    for stage in STAGES[: STAGES.index(bad.stage)] if bad.stage in STAGES else STAGES:
        shutil.copytree(chain.reference / stage, place.run / stage)
    arguments = ["inspect"] if bad.stage == "inspect" else chain.command(bad.stage, place.run)
    arguments = [str(place.recipe) if part == str(chain.recipe) else part for part in arguments]
    arguments += bad.damage(place) or []
    before = contents(place.outside)
    done = chain.launch(arguments)
    problems = []
    if done.code != bad.code:
        problems.append(f"exit code {done.code}, not {bad.code}")
    if bad.said not in done.stderr:
        problems.append(f"does not say {bad.said!r}")
    if "Traceback" in done.stderr or "unforeseen" in done.stderr or "error: " not in done.stderr:
        problems.append("not a sentence")
    if contents(place.outside) != before:
        problems.append("something outside was changed")
    return done, problems


def flip(file: Path, position: int) -> None:
    """Flip a bit."""
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.unlink()
    file.write_bytes(content)


def sign(stage: Path) -> None:
    """Make the digests of a stage right again, as someone would who means harm."""
    facts = json.loads((stage / "stage.json").read_text())
    facts["files"] = {name: digest(stage / name) for name in facts["files"]}
    facts.pop("digest")
    facts["digest"] = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    (stage / "stage.json").write_text(json.dumps(facts))


def digest(file: Path) -> str:
    """sha256 of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def edit(file: Path, how: Callable[[dict[str, Any]], Any]) -> None:
    """Change a JSON object."""
    value = json.loads(file.read_text())
    how(value)
    file.write_text(json.dumps(value))


def header(file: Path, how: Callable[[dict[str, Any]], Any], *, length: int | None = None) -> None:
    """Change a safetensors header, and what the file says about its length."""
    content = file.read_bytes()
    (old,) = struct.unpack("<Q", content[:8])
    value = json.loads(content[8 : 8 + old])
    how(value)
    new = json.dumps(value).encode()
    file.write_bytes(struct.pack("<Q", len(new) if length is None else length) + new + content[8 + old :])


def use(place: Place, **more: str) -> list[str]:
    """Options that point the recipe at the copies."""
    keys = {"model.source": place.model, "calibrate.data": f"[{{source: {place.text}}}]", **more}
    return [part for key, value in keys.items() for part in ("--set", f"{key}={value}")]


# Integrity of stages and exports.


@case("flipped bit in a shard", "e2e-qp", 3, "model-block-0001.safetensors is damaged")
def _(p: Place) -> None:
    flip(p.run / "block-ap" / "model-block-0001.safetensors", -100)


@case("truncated shard", "e2e-qp", 3, "is damaged")
def _(p: Place) -> None:
    file = p.run / "block-ap" / "model-block-0002.safetensors"
    os.truncate(file, file.stat().st_size // 2)


@case("missing file", "pack", 3, "config.json is missing")
def _(p: Place) -> None:
    (p.run / "e2e-qp" / "config.json").unlink()


@case("flipped bit in stage.json", "pack", 3, "stage.json")
def _(p: Place) -> None:
    file = p.run / "e2e-qp" / "stage.json"
    flip(file, file.read_bytes().index(b'"seconds"') + 12)


@case("stage.json is not JSON", "pack", 3, "malformed")
def _(p: Place) -> None:
    (p.run / "e2e-qp" / "stage.json").write_text("{")


@case("stage.json nested 100,000 deep", "pack", 3, "nested too deeply")
def _(p: Place) -> None:
    (p.run / "e2e-qp" / "stage.json").write_text(DEEP)


@case("stage.json with wrong types, digest corrected", "pack", 3, "malformed: metrics, files")
def _(p: Place) -> None:
    stage = p.run / "e2e-qp"
    sign(stage)
    edit(stage / "stage.json", lambda facts: facts.update(metrics=3, files=["x"]))


@case("stage.json names ../../outside", "pack", 3, "outside")
def _(p: Place) -> None:
    stage = p.run / "e2e-qp"
    edit(stage / "stage.json", lambda facts: facts["files"].update({"../../outside/precious": "0"}))
    sign(stage)


@case("a shard is a link to another place", "pack", 3, "link that leads out")
def _(p: Place) -> None:
    file = p.run / "e2e-qp" / "model-block-0000.safetensors"
    file.rename(p.outside / file.name)
    file.symlink_to(p.outside / file.name)


@case("stage of another kind", "e2e-qp", 3, "holds a calibration; expected quantized")
def _(p: Place) -> list[str]:
    return ["--from", str(p.run / "calibrate")]


@case("--from does not exist", "pack", 3, "not a stage directory")
def _(p: Place) -> list[str]:
    return ["--from", str(p.run / "nowhere")]


@case("stage of another run, or recipe edited in between", "e2e-qp", 3, "block_ap.epochs: was 2, is 3")
def _(p: Place) -> list[str]:
    return ["--set", "block_ap.epochs=3"]


@case("recipe edited before a resume", "block-ap", 3, "block_ap.lr_weights: was")
def _(p: Place) -> list[str]:
    (p.run / "block-ap.partial").mkdir()
    (p.run / "block-ap.partial" / "resume.json").write_text('{"block_ap": {"lr_weights": 9}}')
    return []


@case("the model was exchanged in place", "block-ap", 3, "made from another model")
def _(p: Place) -> list[str]:
    stage = p.run / "calibrate"
    edit(stage / "stage.json", lambda facts: facts.update(model_fingerprint="0" * 64))
    sign(stage)
    return []


@case("export with a flipped bit", "inspect", 3, "is damaged")
def _(p: Place) -> list[str]:
    export = p.run / "export" / "gptq"
    flip(sorted(export.glob("*.safetensors"))[1], -100)
    return [str(export)]


@case("export without a shard", "inspect", 3, "is missing")
def _(p: Place) -> list[str]:
    export = p.run / "export" / "gptq"
    sorted(export.glob("*.safetensors"))[0].unlink()
    return [str(export)]


# The run directory.


@case("--run is a file", "calibrate", 2, "is not a directory")
def _(p: Place) -> list[str]:
    return ["--run", str(p.recipe)]


@case("resume.json is not JSON", "calibrate", 3, "resume.json is malformed")
def _(p: Place) -> None:
    (p.run / "calibrate.partial").mkdir(parents=True)
    (p.run / "calibrate.partial" / "resume.json").write_text("\0")


@case("the unfinished stage is a link", "block-ap", 3, "is a link")
def _(p: Place) -> None:
    (p.outside / "resume.json").write_text("{}")
    (p.run / "block-ap.partial").symlink_to(p.outside)


@case("the log is a link", "block-ap", 3, "is a link")
def _(p: Place) -> None:
    (p.run / "block-ap.partial").mkdir()
    (p.run / "block-ap.partial" / "resume.json").write_text("{}")
    (p.run / "block-ap.partial" / "log.jsonl").symlink_to(p.outside / "precious")


@case("the lock is a link", "block-ap", 3, "is a link")
def _(p: Place) -> None:
    (p.run / "block-ap.lock").symlink_to(p.outside / "precious")


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
config("attention code of the hub", "asks for code from the hub", lambda c: c.update(attn_implementation="evil/kernel"))
config("weights named elsewhere", "", lambda c: c.update(transformers_weights="../outside/x.bin", hidden_size=65))
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


# Tokenizer files.


def tokenizer(name: str, file: str, content: bytes) -> None:
    """A case with other bytes in a tokenizer file."""

    @case(f"{file}: {name}", "calibrate", 3, "tokenizer")
    def _(p: Place) -> list[str]:
        (p.model / file).write_bytes(content)
        return use(p)


tokenizer("empty", "tokenizer.json", b"")
tokenizer("a list", "tokenizer.json", b"[]")
tokenizer("nested 100,000 deep", "tokenizer.json", DEEP.encode())
tokenizer("not UTF-8", "tokenizer.json", b"\xff\xfe\xfd")
tokenizer("an unknown model", "tokenizer.json", b'{"version": "1.0", "model": {"type": "Evil"}}')


@case("tokenizer.json: tokens beyond the embedding", "calibrate", 3, "token")
def _(p: Place) -> list[str]:
    def shift(value: dict[str, Any]) -> None:
        value["model"]["vocab"] = {token: number + 1000 for token, number in value["model"]["vocab"].items()}
        value["added_tokens"] = []
        value["post_processor"] = None

    edit(p.model / "tokenizer.json", shift)
    return use(p)


@case("tokenizer_config.json: Python code, not trusted", "calibrate", 3, "")
def _(p: Place) -> list[str]:
    (p.model / "evil.py").write_text(CANARY.format(str(p.outside / "canary")))
    edit(
        p.model / "tokenizer_config.json",
        lambda c: c.update(auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, tokenizer_class="Evil"),
    )
    for name in ("tokenizer.json",):
        (p.model / name).unlink()
    return use(p)


@case("tokenizer.json: a link to a private file", "calibrate", 3, "link that leads out")
def _(p: Place) -> list[str]:
    (p.model / "tokenizer.json").rename(p.outside / "t.json")
    (p.model / "tokenizer.json").symlink_to(p.outside / "t.json")
    return use(p)


# Rows of data.


def rows(name: str, said: str, content: bytes, suffix: str = ".jsonl") -> None:
    """A case with other bytes as the calibration data."""

    @case(f"data: {name}", "calibrate", 3, said)
    def _(p: Place) -> list[str]:
        file = p.text.with_suffix(suffix)
        file.write_bytes(content)
        return use(p, **{"calibrate.data": f"[{{source: {file}}}]"})


rows("an empty file", "no document", b"")
rows("rows without text", "no document", b'{"text": ""}\n' * 50)
rows("text is a number", "must be a string", b'{"text": 3}\n' * 50)
rows("text is null", "must be a string", b'{"text": null}\n' * 50)
rows("rows are lists", "must be an object", b"[1, 2]\n" * 50)
rows("no such field", "no field", b'{"body": "x"}\n' * 50)
rows("not UTF-8", "not valid UTF-8", b'{"text": "\xff\xfe"}\n' * 50)
rows("not JSON", "not valid JSON", b"{text\n" * 50)
rows("nested 100,000 deep", "not valid JSON", b'{"text": ' + DEEP.encode() + b"\n")
rows("a JSON file nested 100,000 deep", "not valid JSON", DEEP.encode(), ".json")
rows("half a surrogate pair", "surrogate", b'{"text": "\\ud800 the cat"}\n' * 3)
rows("too few tokens", "", b'{"text": "x"}\n' * 3)
rows("a truncated gzip file", "cannot be read", gzip.compress(b'{"text": "x"}\n' * 9999)[:-20], ".jsonl.gz")
rows("text under the name of a parquet file", "not a readable parquet file", b"PAR1 no", ".parquet")
rows("text under the name of an arrow file", "not a readable arrow file", b"ARROW1 no", ".arrow")
rows("a message without a role", "a message needs", b'{"messages": [{"content": 3}]}\n' * 20)


@case("data: a named pipe", "calibrate", 3, "no such file")
def _(p: Place) -> list[str]:
    p.text.unlink()
    os.mkfifo(p.text)
    return use(p)


# Recipes, as a command reads them; the fuzzing is in test_recipes.py.


def recipe(name: str, said: str, content: bytes) -> None:
    """A case with other bytes as the recipe."""

    @case(f"recipe: {name}", "calibrate", 2, said)
    def _(p: Place) -> None:
        p.recipe.write_bytes(content)


recipe("empty", "empty", b"")
recipe("not UTF-8", "not UTF-8", b"\xff\xfe")
recipe("not YAML", "line 1", b"a: [")
recipe("nested 100,000 deep", "nested too deeply", DEEP.encode())
recipe("a Python object", "could not determine a constructor", b"a: !!python/object/apply:os.system ['touch x']")
recipe("aliases that multiply", "aliases are not supported", b"a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]")
recipe("a key twice", "is already set", b"a: 1\na: 2")
recipe("a list", "must be a mapping", b"- 1")
recipe("unknown keys", "quant.colour", b"quant: {bits: 2, colour: red}")
recipe("wrong types everywhere", "calibrate", b"model: 3\nquant: [x]\ncalibrate: text\nblock_ap: {epochs: [1]}")
recipe("numbers out of range", "quant.bits", b"quant: {bits: 99999999999999999999999, group_size: .nan}")
recipe("trust_remote_code as text", "model.trust_remote_code", b"model: {source: ./x, trust_remote_code: please}")
