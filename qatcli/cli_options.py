"""The arguments and options that commands share.

An empty one is refused: it comes from a variable that a script did not set, and would mean the current directory, or
be taken for an option that was not given.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

FORMAT_NAMES = "gptq, bitblas, native, gguf, awq, compressed-tensors, mlx, dense"


def _not_empty(text: str) -> str:
    if not text:
        raise typer.BadParameter("is empty: a variable that is not set?")
    return text


def _path(text: str) -> Path:
    return Path(os.path.expanduser(_not_empty(text)))


RecipeArgument = Annotated[Path, typer.Argument(help="The recipe, one YAML file.", show_default=False)]
RunOption = Annotated[
    Path | None,
    typer.Option("--run", metavar="DIR", help="Run directory.", show_default="runs/<folder>/<recipe>", parser=_path),
]
FromOption = Annotated[
    str | None,
    typer.Option(
        "--from",
        metavar="DIR",
        help="Input instead of the predecessor's directory; - reads it from stdin.",
        parser=_not_empty,
    ),
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY.PATH=VALUE", help="Override a recipe key; repeatable.")
]
RestartOption = Annotated[bool, typer.Option("--restart", help="Make the stage again, whatever is there.")]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        "--device", help="cpu, cuda or cuda:N.", show_default="cuda if there is one", metavar="TEXT", parser=_not_empty
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the directory.")]
JsonToo = Annotated[bool, typer.Option("--json", help="Print one JSON object beside the table.")]
QuietOption = Annotated[bool, typer.Option("-q", "--quiet", help="Print errors only.")]
VerboseOption = Annotated[bool, typer.Option("-v", "--verbose", help="Print every event.")]
DirectoryArgument = Annotated[
    Path, typer.Argument(help="A stage directory.", metavar="DIRECTORY", show_default=False, parser=_path)
]
RunArgument = Annotated[Path, typer.Argument(help="A run directory.", metavar="RUN", show_default=False, parser=_path)]
