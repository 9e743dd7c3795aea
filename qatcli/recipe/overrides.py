"""`--set key.path=value`: change one value of a recipe from the command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qatcli.recipe.problems import Key, Problem
from qatcli.recipe.text import YamlProblem, parse


def apply(data: dict[str, Any], overrides: Sequence[str]) -> tuple[list[Key], list[Problem]]:
    """Write each `key.path=value` into `data`, in order; the value is YAML, a list item is named by its index.

    Returns the outermost key that each of them added or changed, and what is wrong with the others. Whether a key
    exists in the schema is left to the validation, which knows the nearest match.
    """
    done: list[Key] = []
    problems: list[Problem] = []
    for override in overrides:
        path, equals, text = override.partition("=")
        key = _parts(path)
        if not equals or not all(key) or not path.isprintable():
            problems.append(Problem((), f"{override}: must be key.path=value"))
            continue
        try:
            done.append(_set(data, key, parse(text)))
        except (YamlProblem, LookupError) as error:
            problems.append(Problem((), f"{override}: {error.args[0]}"))
    return done, problems


def _parts(path: str) -> list[str]:
    """The keys of a path. The figures that a recipe expects have names with dots: `expect.wikitext2.kl.value`."""
    key = [part.strip() for part in path.split(".")]
    if key[0] != "expect" or len(key) < 3 or not all(key):
        return key
    inner = key[-1:] if key[-1] in ("value", "tolerance") else []
    return ["expect", ".".join(key[1 : len(key) - len(inner)]), *inner]


def _set(data: dict[str, Any], key: Sequence[str], value: Any) -> Key:
    """Write `value` at `key`, making sections on the way. Returns the outermost key that is new or changed."""
    container: Any = data
    parents: list[int | str] = []
    outermost: Key = ()
    for name in key[:-1]:
        place = _place(container, name, parents)
        parents.append(place)
        if isinstance(container, dict) and container.get(place) is None:
            container[place] = {}  # the section is absent, or there with nothing in it
            outermost = outermost or tuple(parents)
        container = container[place]
    place = _place(container, key[-1], parents)
    container[place] = value
    return outermost or (*parents, place)


def _place(container: Any, name: str, parents: Sequence[int | str]) -> int | str:
    """`name` as it indexes `container`. Raises LookupError if it cannot."""
    where = ".".join(map(str, parents))
    if isinstance(container, dict):
        return name
    if not isinstance(container, list):
        raise LookupError(f"{where} is a value, not a section")
    if name.isascii() and name.isdigit() and len(name) < 6 and int(name) < len(container):
        return int(name)
    raise LookupError(f"{where} is a list of {len(container)}; its items are numbered from 0")
