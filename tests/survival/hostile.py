"""Inputs that are damaged, wrong or meant to harm, each with the exit code that the contract has for it.

A case changes a private copy of everything that a stage reads and returns further arguments of the command. What the
command answers must be an error and no traceback, standard output stays empty, and nothing beside the run directory
changes or runs.
"""

from __future__ import annotations

import hashlib
import json
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
    """What a case may damage: the run directory, the model, the text; `outside` must stay as it is.

    `reference` is a finished run to copy from.
    """

    run: Path
    model: Path
    text: Path
    outside: Path
    recipe: Path
    reference: Path


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
    run, source, text, outside, recipe = (
        folder / name for name in ("run", "model", "text.jsonl", "outside", "recipe.yaml")
    )
    place = Place(run, source, text, outside, recipe, chain.reference)
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
    if done.stdout:
        problems.append("data on standard output")
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
