"""From a YAML file to a validated Recipe, with every error at once.

Order: read the file, apply `--set`, expand variables, validate, look for contradictions. Each step reports into one
list; the recipe is refused once, with all of it.

Left out on purpose: includes and inheritance between recipes. One file is one experiment; `--set` is for variants.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qatcli.errors import RecipeError
from qatcli.recipe.checks import contradictions
from qatcli.recipe.locations import expand_variables
from qatcli.recipe.overrides import apply
from qatcli.recipe.problems import Key, Problem, from_pydantic
from qatcli.recipe.schema import Recipe
from qatcli.recipe.text import YamlProblem, parse

_STAND_INS: Mapping[tuple[str, str], Any] = {
    ("model", "source"): "none",
    ("quant", "bits"): 4,
    ("calibrate", "data"): [{"source": "none"}],
}
"""Values for required keys that are missing or wrong, so that the rest can still be checked."""


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in the YAML file `path`, with `overrides` (`key.path=value`, the values in YAML) applied.

    Relative paths in it are read relative to the folder of `path`; `${NAME}` and `${NAME:-default}` are taken from
    the environment. Raises RecipeError, one line per problem: `file: key = value: problem`.
    """
    path = Path(path)
    data = _read(path)
    set_keys, problems = apply(data, overrides)
    problems += _expand(data)
    recipe, found = _validate(
        data, path.absolute().parent.resolve(), {problem.key for problem in problems if problem.key}
    )
    problems += found
    if problems or recipe is None:
        raise RecipeError(_message(path, problems, set_keys), hint="docs/recipe.md describes every key")
    return recipe


def recipe_name(path: str | os.PathLike[str]) -> str:
    """The name of a recipe's run directory: its path without `.yaml`, below the nearest folder called `recipes`.

    `recipes/llama-2-7b/w2g64.yaml` is `llama-2-7b/w2g64`. A file in no such folder is named by its own folder and
    itself, `experiments/try.yaml` by `experiments/try`.
    """
    parts = Path(os.path.abspath(path)).with_suffix("").parts
    folders = parts[1:-1]  # without the root
    if "recipes" in folders:
        below = len(folders) - folders[::-1].index("recipes")
        return "/".join((*folders[below:], parts[-1]))
    return "/".join((*folders[-1:], parts[-1]))


def _read(path: Path) -> dict[str, Any]:
    """The mapping in the file, unvalidated."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: byte {error.start}: not UTF-8 text") from error
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path}: {_why_unreadable(error)}", hint=_similar_files(path)) from error
    try:
        data = parse(text)
    except YamlProblem as error:
        raise RecipeError(f"{path}: {error}") from error
    if not isinstance(data, dict):
        what = "empty" if data is None else f"a {type(data).__name__}"
        raise RecipeError(f"{path}: must be a mapping of keys, but it is {what}", hint="docs/recipe.md has an example")
    return data


def _why_unreadable(error: OSError | ValueError) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


def _similar_files(path: Path) -> str | None:
    """A hint naming recipes beside `path`, or None."""
    try:
        names = sorted(str(other) for other in path.parent.glob("*.yaml"))
    except (OSError, ValueError):
        return None
    close = get_close_matches(str(path), names, n=3, cutoff=0.5) or names[:5]
    return f"there is {', '.join(close)}" if close else None


def _expand(data: dict[str, Any]) -> list[Problem]:
    """Expand the variables in every text below `data`, in place."""
    problems: list[Problem] = []
    pending: list[tuple[Key, dict[Any, Any] | list[Any]]] = [((), data)]
    while pending:
        key, container = pending.pop()
        for part, value in list(container.items() if isinstance(container, dict) else enumerate(container)):
            here = (*key, part)
            if isinstance(value, dict | list):
                pending.append((here, value))
            elif isinstance(value, str):
                try:
                    container[part] = expand_variables(value, os.environ)
                except ValueError as error:
                    problems.append(Problem(here, str(error), value))
    return sorted(problems, key=lambda problem: str(problem.key))


def _validate(data: dict[str, Any], folder: Path, known_wrong: set[Key]) -> tuple[Recipe | None, list[Problem]]:
    """The recipe and what is wrong with it, apart from the keys already known to be wrong."""
    try:
        recipe = Recipe.model_validate(data, context=folder)
        problems = []
    except ValidationError as error:
        # pydantic counts valid items only: a list of one wrong item is not also too short
        details = [d for d in error.errors() if not (d["type"] == "too_short" and d["input"])]
        problems = [problem for problem in map(from_pydantic, details) if problem.key not in known_wrong]
        try:
            rest = _without(data, {tuple(detail["loc"]) for detail in error.errors()})
            recipe = Recipe.model_validate(rest)
        except ValidationError:
            return None, problems
    wrong = known_wrong | {problem.key for problem in problems}
    return recipe, problems + contradictions(recipe, wrong)


def _without(data: dict[Any, Any], wrong: set[Key]) -> dict[str, Any]:
    """A copy of `data` where defaults and stand-ins take the place of the keys that are wrong, or wrong inside."""
    rest = copy.deepcopy(data)
    for section, *names in wrong:
        if names and isinstance(rest.get(section), dict):
            rest[section].pop(names[0], None)
        else:
            rest.pop(section, None)
    for (section, name), value in _STAND_INS.items():
        if not isinstance(rest.get(section), dict):
            rest[section] = {}
        rest[section].setdefault(name, value)
    return rest


def _message(path: Path, problems: Sequence[Problem], set_keys: Sequence[Key]) -> str:
    lines = []
    for problem in problems:
        from_command = not problem.key or any(problem.key[: len(key)] == key for key in set_keys)
        lines.append(problem.line("--set" if from_command else str(path)))
    return "\n".join(lines)
