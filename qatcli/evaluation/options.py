"""What the options of `qat eval MODEL...` ask for, as the section `eval` that a recipe would have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from qatcli.errors import UsageError
from qatcli.recipe.locations import BUILT_IN_TEXTS, RELATIVE
from qatcli.recipe.problems import Problem, from_pydantic
from qatcli.recipe.schema import EvalSection

PAPER = "paper"  # stands for the default tasks
OPTIONS = {"name": "--text", "source": "--text", "file": "--text", "tasks": "--zero-shot"}  # by key, if not --KEY


@dataclass(frozen=True)
class ModelOptions:
    """Options that only models have; None and () are those that were not given."""

    text: Sequence[str] = ()
    seq_len: int | None = None
    windows: int | None = None
    zero_shot: str | None = None
    data: str | None = None
    limit: int | None = None
    against: str | None = None
    no_speed: bool = False
    bos: bool = False

    def given(self) -> list[str]:
        """The options that were given, as they are written."""
        given = [name for name, value in vars(self).items() if not (value is None or value is False or value == ())]
        return [f"--{name.replace('_', '-')}" for name in given]


def is_recipe(target: str) -> bool:
    """Whether a target of `qat eval` is a recipe and no model."""
    return Path(target).suffix in (".yaml", ".yml")


def section(options: ModelOptions) -> EvalSection:
    """The section; without texts and tasks, the perplexity of wikitext2. UsageError for what no recipe could say."""
    for option, value in (("--data", options.data), ("--limit", options.limit)):
        if options.zero_shot is None and value is not None:
            raise UsageError(f"{option} needs --zero-shot", hint="add --zero-shot paper")
    if options.zero_shot is not None and not _tasks(options.zero_shot):
        raise UsageError("--zero-shot names no task", hint="`--zero-shot paper` is the usual five")
    texts = list(options.text) or ([] if options.zero_shot else ["wikitext2"])
    window = {"seq_len": options.seq_len, "windows": options.windows, "bos": "window" if options.bos else None}
    asked = {key: value for key, value in window.items() if value is not None}
    perplexity = {}
    for text in texts:
        keys = _text(text)
        if keys["name"] in perplexity:
            hint = "figures go by the name of a text's file: rename or link one of them, or measure them one by one"
            raise UsageError(f"--text {text}: an earlier text is called {keys['name']}, too", hint=hint)
        perplexity[keys["name"]] = {**keys, **asked}
    content = {
        "perplexity": list(perplexity.values()),
        "kl": options.against is not None,
        "zero_shot": None if options.zero_shot is None else _zero_shot(options),
        **({"speed": None} if options.no_speed else {}),
    }
    try:
        return EvalSection.model_validate(content, context=Path.cwd())
    except ValidationError as error:
        lines = dict.fromkeys(_line(from_pydantic(detail)) for detail in error.errors())  # one for all texts
        raise UsageError("\n".join(lines), hint="`qat eval --help` lists the options") from error


def _line(problem: Problem) -> str:
    """What is wrong, said of the option that gave the key."""
    key = next(str(part) for part in reversed(problem.key) if isinstance(part, str))
    option = OPTIONS.get(key, f"--{key.replace('_', '-')}")
    return f"{option} {problem.value}: {problem.text.removesuffix(RELATIVE)}"


def _text(given: str) -> dict[str, str]:
    """`wikitext2`, `wikitext2=FILE` for a local copy of what it reads, or a file."""
    name, _, file = given.partition("=")
    if name not in BUILT_IN_TEXTS:
        return {"name": Path(given).stem, "source": given}
    return {"name": name, "source": name, **({"file": file} if file else {})}


def _zero_shot(options: ModelOptions) -> dict[str, object]:
    tasks = _tasks(options.zero_shot or "")
    named = {} if tasks == [PAPER] else {"tasks": tasks}
    return {**named, "data": options.data, "limit": options.limit}


def _tasks(given: str) -> list[str]:
    return [name.strip() for name in given.split(",") if name.strip()]
