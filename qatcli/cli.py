"""The command surface of `qat`, and nothing else: options in, one line of data out, errors as sentences.

stdout carries data only (the stage's directory, or with --json one object); everything else goes to stderr.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

import typer

from qatcli import __version__
from qatcli.cli_options import (
    FORMAT_NAMES,
    DeviceOption,
    DirectoryArgument,
    FromOption,
    JsonOption,
    JsonToo,
    QuietOption,
    RecipeArgument,
    RestartOption,
    RunArgument,
    RunOption,
    SetOption,
    VerboseOption,
)
from qatcli.errors import QatError, ResourceError, UsageError
from qatcli.failures import explain
from qatcli.interrupts import arrived, install, interruptible

app = typer.Typer(
    help="Turn a pretrained causal LLM into a 2-, 3- or 4-bit one (EfficientQAT), and prove that the result is good.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

STAGE_HELP = {
    "calibrate": "Sample token windows and search the initial scales and zero points.",
    "block-ap": "Train each block (weights, scales, zero points) against the full-precision block.",
    "e2e-qp": "Train the scales end to end on frozen codes.",
    "pack": "Write the dense bit-packed checkpoint that transformers loads.",
    "import": "Turn a checkpoint of another tool (--from), as GPTQ, AWQ, MLX or EfficientQAT, into the packed form.",
}


def _stage_command(name: str) -> Callable[..., None]:
    def command(
        recipe: RecipeArgument,
        run: RunOption = None,
        source: FromOption = None,
        overrides: SetOption = None,
        restart: RestartOption = False,
        device: DeviceOption = None,
        as_json: JsonOption = False,
        quiet: QuietOption = False,
        verbose: VerboseOption = False,
    ) -> None:
        with _reported(name, recipe, verbose=verbose):
            from qatcli.chain import run_one

            result = run_one(
                name,
                recipe,
                overrides or [],
                run_dir=run,
                source=source,
                restart=restart,
                device=device,
                verbosity=_verbosity(quiet, verbose),
            )
            _print_result(result, as_json=as_json)

    if name == "calibrate":  # which has no predecessor, and says so
        command.__annotations__["source"] = Annotated[str | None, typer.Option("--from", hidden=True)]
    return command


for _name, _help in STAGE_HELP.items():
    app.command(_name, help=_help)(_stage_command(_name))


@app.command("eval")
def evaluate(
    targets: Annotated[
        list[str],
        typer.Argument(help="A recipe, or models: directories of any format, GGUF files, hub ids.", show_default=False),
    ],
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text", metavar="FILE", help="Models: text for perplexity, or wikitext2[=FILE], c4[=FILE]; repeatable."
        ),
    ] = None,
    seq_len: Annotated[int | None, typer.Option("--seq-len", help="Models: tokens per window.")] = None,
    windows: Annotated[int | None, typer.Option("--windows", help="Models: windows per text.")] = None,
    zero_shot: Annotated[
        str | None,
        typer.Option("--zero-shot", metavar="TASKS", help="Models: lm-eval tasks, by commas; paper is the usual five."),
    ] = None,
    data: Annotated[str | None, typer.Option("--data", metavar="DIR", help="Models: local rows of the five.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Models: rows per task.")] = None,
    against: Annotated[
        str | None, typer.Option("--against", metavar="MODEL", help="Models: full precision, to diverge from.")
    ] = None,
    no_speed: Annotated[bool, typer.Option("--no-speed", help="Models: leave speed and memory out.")] = False,
    bos: Annotated[
        bool, typer.Option("--bos", help="Models: begin every window with the beginning-of-text token (Gemma).")
    ] = False,
    run: RunOption = None,
    source: FromOption = None,
    overrides: SetOption = None,
    restart: RestartOption = False,
    device: DeviceOption = None,
    as_json: JsonToo = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Measure perplexity, divergence, zero-shot accuracy, speed and size of a recipe's result or of any models."""
    with _reported("eval", *targets, verbose=verbose):
        from qatcli.chain import run_eval
        from qatcli.evaluation.options import ModelOptions

        result = run_eval(
            targets,
            overrides or [],
            ModelOptions(text or (), seq_len, windows, zero_shot, data, limit, against, no_speed, bos),
            run_dir=run,
            source=source,
            restart=restart,
            device=device,
            verbosity=_verbosity(quiet, verbose),
        )
        _print_result(result, as_json=as_json)


@app.command("export")
def export(
    recipe: RecipeArgument,
    formats: Annotated[
        list[str] | None,
        typer.Option("--format", metavar="NAME", help=f"{FORMAT_NAMES}; repeatable, or separated by commas."),
    ] = None,
    verify: Annotated[
        bool | None,
        typer.Option(
            "--verify/--no-verify", help="Read back and compare what was written.", show_default="as the recipe says"
        ),
    ] = None,
    run: RunOption = None,
    source: FromOption = None,
    overrides: SetOption = None,
    restart: RestartOption = False,
    device: DeviceOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object per format, not its directory.")] = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Write the formats that other runtimes serve, each read back and proven."""
    with _reported("export", recipe, verbose=verbose):
        from qatcli.chain import run_exports

        results = run_exports(
            recipe,
            [*(overrides or []), *([] if verify is None else [f"export.verify={str(verify).lower()}"])],
            _format_names(formats or []),
            run_dir=run,
            source=source,
            restart=restart,
            device=device,
            verbosity=_verbosity(quiet, verbose),
        )
        for result in results:
            _put(json.dumps(result) if as_json else result["path"])


@app.command("run")
def run_chain(
    recipe: RecipeArgument,
    run: RunOption = None,
    overrides: SetOption = None,
    restart: Annotated[bool, typer.Option("--restart", help="Make every stage again, whatever is there.")] = False,
    device: DeviceOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Run the chain, calibrate to eval, continuing wherever it stopped. `qat export` comes after it."""
    with _reported("run", recipe, verbose=verbose):
        from qatcli.chain import run_all

        result = run_all(
            recipe,
            overrides or [],
            run_dir=run,
            restart=restart,
            device=device,
            verbosity=_verbosity(quiet, verbose),
        )
        _print_result(result, as_json=as_json)


@app.command("plan")
def plan(
    recipe: RecipeArgument,
    run: RunOption = None,
    overrides: SetOption = None,
    device: DeviceOption = None,
    as_json: JsonToo = False,
) -> None:
    """Predict memory, disk and time of every stage before any of it is spent, and say what runs the result."""
    with _reported("plan", recipe):
        from qatcli.chain import run_plan

        result = run_plan(recipe, overrides or [], run_dir=run, device=device)
        if as_json:
            _put(json.dumps(result))


@app.command("doctor")
def doctor(
    as_json: JsonToo = False,
) -> None:
    """Examine this environment (devices, packages, kernels, memory, caches, disk) and say how to fix it."""
    with _reported("doctor"):
        from qatcli.doctor import examine

        result = examine()
        if as_json:
            _put(json.dumps(result))
        if result["broken"]:
            raise typer.Exit(1)


@app.command("inspect")
def inspect(
    directory: DirectoryArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Say what a stage directory is, and verify the digest of every file."""
    with _reported("inspect", directory):
        from qatcli.chain import describe

        _put(describe(directory, as_json=as_json))


@app.command("report")
def report(
    run: RunArgument,
    watching: Annotated[
        bool, typer.Option("--watch", help="Write it again every few seconds until no stage is at work.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the page's path.")] = False,
) -> None:
    """Write report.html and report.json about a run, finished or not."""
    with _reported("report", run):
        from qatcli.report import HTML, INTERVAL, watch, write_report

        if watching:
            typer.echo(f"{run / HTML} is written every {INTERVAL} s until no stage is at work", err=True)
        facts = (watch if watching else write_report)(run)
        _print_result({**facts, "path": str(run / HTML)}, as_json=as_json)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(f"qat {__version__}")
        raise typer.Exit


@contextmanager
def _reported(*words: object, verbose: bool = False) -> Iterator[None]:
    """Turn failures into `error:` and `hint:` on stderr and the exit code of the contract; `words` say what runs."""
    command = shlex.join(["qat", *map(str, words)])
    try:
        with interruptible():
            yield
    except KeyboardInterrupt:
        _interrupted(command)
    except BrokenPipeError:
        _unread(command)
    except typer.Exit:
        raise
    except Exception as error:
        if arrived():  # what failed may have failed because of the signal: a library that was being imported
            _interrupted(command)
        _fail(explain(error, verbose=verbose))


def _interrupted(command: str) -> NoReturn:
    typer.echo(f"\ninterrupted; continue with {_same(command)}", err=True)
    raise typer.Exit(130) from None


def _unread(command: str) -> NoReturn:
    typer.echo(f"\nnothing reads the output any more; what is finished stays. To go on: {_same(command)}", err=True)
    raise typer.Exit(141) from None  # what a shell says of a process that SIGPIPE ended


def _same(command: str) -> str:
    return f"`{command}` and the same options{', but without --restart' if '--restart' in sys.argv else ''}"


def _fail(error: QatError) -> NoReturn:
    typer.echo(f"error: {error.message}", err=True)
    if error.hint:
        typer.echo(f"\nhint: {error.hint}", err=True)
    sys.exit(error.exit_code)


def _print_result(result: dict[str, Any], *, as_json: bool) -> None:
    """The data of a command on stdout; then the error of a result that misses what its recipe expects."""
    from qatcli.expectations import require

    if as_json:
        _put(json.dumps(result))
    elif "path" in result:
        _put(result["path"])
    require(result.get("expectations", []))


def _put(data: str) -> None:
    """Data on stdout. ResourceError when it cannot be written."""
    try:
        typer.echo(os.fsencode(data))  # names of files are bytes
    except BrokenPipeError:
        raise
    except OSError as error:
        raise _unwritten(error) from error


def _unwritten(error: OSError) -> ResourceError:
    hint = "what is finished stays: the same command prints it to another place"
    return ResourceError(f"cannot write to standard output: {error.strerror}", hint=hint)


def _format_names(given: list[str]) -> list[str]:
    """The formats of every --format. UsageError for an empty name: a variable that a script did not set."""
    names = [name.strip() for option in given for name in option.split(",")]
    if not all(names):
        raise UsageError("--format names no format", hint=f"give some of {FORMAT_NAMES}, or leave it out")
    for name in names:
        if name not in FORMAT_NAMES.split(", "):
            raise UsageError(f"--format {name}: there is no such format", hint=f"give some of {FORMAT_NAMES}")
    return names


def _verbosity(quiet: bool, verbose: bool) -> int:
    return -1 if quiet else int(verbose)


def main() -> None:
    """Entry point of the console script."""
    install()
    if sys.stdout is None:  # the next file that is opened would take its place
        _fail(UsageError("standard output is closed", hint="redirect it to a file, or to /dev/null"))
    try:
        app()
    except OSError as error:  # from what typer prints: the help, the version
        _fail(_unwritten(error))
    finally:
        _drop_unwritten()


def _drop_unwritten() -> None:
    """Drop what stdout did not take: Python would try once more when it exits, and show a traceback."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
