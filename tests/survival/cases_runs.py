"""Bad inputs: stages, exports and run directories."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from hostile import DEEP, Place, case, edit, flip, sign

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
    (p.run / "block-ap.partial" / "model-block-0000.safetensors").touch()  # something that would be lost
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


def unfinished(stage: Path) -> Path:
    """The finished stage as if it had been interrupted just before its commit."""
    partial = stage.rename(stage.with_name(stage.name + ".partial"))
    identity = json.loads((partial / "stage.json").read_text())["identity"]
    (partial / "resume.json").write_text(json.dumps(identity))
    (partial / "stage.json").unlink()
    return partial


@case("the last checkpoint of an unfinished stage is truncated", "e2e-qp", 3, "resume.safetensors cannot be read")
def _(p: Place) -> None:
    shutil.copytree(p.reference / "e2e-qp", p.run / "e2e-qp")
    (unfinished(p.run / "e2e-qp") / "resume.safetensors").write_bytes(b"\0" * 100)


@case("a block of an unfinished stage is truncated", "block-ap", 3, "model-block-0001.safetensors cannot be read")
def _(p: Place) -> None:
    shutil.copytree(p.reference / "block-ap", p.run / "block-ap")
    file = unfinished(p.run / "block-ap") / "model-block-0001.safetensors"
    os.truncate(file, file.stat().st_size // 2)


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
