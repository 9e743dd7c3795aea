"""The command line: a frozen surface, errors as sentences, exit codes, and data alone on standard output."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from typer.testing import CliRunner

import qatcli
from qatcli import errors, interrupts
from qatcli.cli import app
from qatcli.directory import StageDirectory
from qatcli.stages import STAGES, choose_device

STAGE_OPTIONS = {"--run", "--from", "--set", "--restart", "--device", "--json", "-q", "--quiet", "-v", "--verbose"}
FROZEN = {
    **dict.fromkeys(["calibrate", "block-ap", "e2e-qp", "pack", "import"], STAGE_OPTIONS),
    # A model brings no recipe with it, so the options say what to measure.
    "eval": STAGE_OPTIONS
    | {"--text", "--seq-len", "--bos", "--windows", "--zero-shot", "--data", "--limit", "--against", "--no-speed"},
    "export": STAGE_OPTIONS | {"--format", "--verify", "--no-verify"},
    "run": STAGE_OPTIONS - {"--from"},
    "plan": {"--run", "--set", "--device", "--json"},
    "doctor": {"--json"},
    "inspect": {"--json"},
    "report": {"--watch", "--json"},
}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe that loads; the model and the text that it names are not there."""
    content = {
        "model": {"source": "owner/model"},
        "quant": {"bits": 2},
        "calibrate": {"data": [{"source": "owner/text"}]},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """A function that lets every stage return, or raise, what it is given; it returns the calls made."""

    def install(outcome: object) -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = []

        def run_one(stage: str, recipe: Path, overrides: list[str], **options: Any) -> object:
            calls.append({"stage": stage, "recipe": recipe, "overrides": overrides, **options})
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome

        monkeypatch.setattr("qatcli.chain.run_one", run_one)
        return calls

    return install


def qat(*arguments: str | Path, stdin: str | None = None) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


def options(command: Any) -> set[str]:
    return {
        name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts) if name[0] == "-"
    }


# The surface.


def test_the_help_lists_every_command() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert set(commands) >= set(STAGES) | {"run", "inspect"}
    for flag in ("--help", "-h"):
        shown = qat(flag)
        assert shown.exit_code == 0
        listed = {line.split()[0] for line in shown.output.splitlines() if line.startswith("  ") and line.strip()}
        assert listed >= set(commands)
    for name, command in commands.items():
        assert command.help, f"{name} does not say what it does"


@pytest.mark.parametrize("name", FROZEN)
def test_no_new_options(name: str) -> None:
    """Knobs belong into the recipe; an option says which and where. Change this table only for the latter."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert options(commands[name]) == FROZEN[name]
    arguments = [parameter.name for parameter in commands[name].params if parameter.param_type_name == "argument"]
    others = {"inspect": ["directory"], "report": ["run"], "eval": ["targets"], "doctor": []}
    assert arguments == others.get(name, ["recipe"])


def test_every_stage_has_a_command_with_the_same_options() -> None:
    assert set(FROZEN) >= set(STAGES)
    assert all(FROZEN[name] >= STAGE_OPTIONS for name in STAGES)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("block-ap", "Make the stage again"),
        ("run", "Make every stage again"),
        ("inspect", "instead of text"),
        ("report", "instead of the page's path"),
        ("eval", "beside the table"),
        ("export", "JSON object per format"),
    ],
)
def test_the_help_says_what_the_option_does_there(command: str, said: str) -> None:
    assert said in " ".join(qat(command, "--help").output.split())


def test_only_the_first_stage_hides_an_input(recipe: Path) -> None:
    assert "--from" in qat("block-ap", "--help").output
    assert "--from" not in qat("calibrate", "--help").output
    refused = qat("calibrate", recipe, "--from", "x", "--run", recipe.parent / "run", "--device", "cpu")
    assert "the first stage takes no --from" in refused.stderr


def test_the_version() -> None:
    shown = qat("--version")
    assert (shown.exit_code, shown.stdout) == (0, f"qat {qatcli.__version__}\n")


@pytest.mark.parametrize("arguments", [["blockap"], ["block-ap"], ["block-ap", "r.yaml", "--bits", "2"]])
def test_a_wrong_command_line_exits_2(arguments: list[str]) -> None:
    done = qat(*arguments)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr


# What goes out.


def test_standard_output_is_the_directory(recipe: Path, stub: Callable[..., list[dict[str, Any]]]) -> None:
    calls = stub({"stage": "block-ap", "path": "runs/x/block-ap", "seconds": 1.5, "metrics": {}})
    done = qat("block-ap", recipe)
    assert (done.exit_code, done.stdout, done.stderr) == (0, "runs/x/block-ap\n", "")
    expected = {"stage": "block-ap", "recipe": recipe, "overrides": [], "run_dir": None, "source": None}
    assert calls == [{**expected, "restart": False, "device": None, "verbosity": 0}]


def test_json_is_one_object_on_one_line(recipe: Path, stub: Callable[..., Any]) -> None:
    result = {"stage": "pack", "path": "runs/x/pack", "seconds": 1.5, "metrics": {"a": [1, None], "b": "x\ny"}}
    stub(result)
    done = qat("pack", recipe, "--json")
    assert done.stdout.count("\n") == 1
    assert json.loads(done.stdout) == result


def test_every_option_arrives(recipe: Path, tmp_path: Path, stub: Callable[..., list[dict[str, Any]]]) -> None:
    calls = stub({"path": "x"})
    given = ["--run", tmp_path / "r", "--from", tmp_path / "f", "--set", "a.b=1", "--set", "c=2", "--restart"]
    qat("e2e-qp", recipe, *given, "--device", "cuda:1", "-q")
    qat("e2e-qp", recipe, "-v")
    assert calls[0] == {
        "stage": "e2e-qp",
        "recipe": recipe,
        "overrides": ["a.b=1", "c=2"],
        "run_dir": tmp_path / "r",
        "source": str(tmp_path / "f"),
        "restart": True,
        "device": "cuda:1",
        "verbosity": -1,
    }
    assert calls[1]["verbosity"] == 1


def test_from_reads_standard_input(recipe: Path, tmp_path: Path) -> None:
    done = qat("block-ap", recipe, "--from", "-", "--device", "cpu", "--run", tmp_path, stdin="runs/x/calibrate\n")
    assert done.exit_code == 3
    assert "runs/x/calibrate is not a stage directory" in done.output


@pytest.mark.parametrize("as_json", [False, True])
def test_an_export_is_printed_when_it_is_finished_and_not_when_all_are(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    def run_stage(_stage: str, _recipe: object, run_dir: Path, *, variant: str, **_: object) -> StageDirectory:
        if variant == "awq":
            raise errors.QatError("awq cannot")
        return StageDirectory(run_dir / variant, {"seconds": 1.0, "metrics": {}})

    monkeypatch.setattr("qatcli.chain.run_stage", run_stage)
    given = ["--set", "quant.bits=4", "--run", "r", "--format", "gptq,native,awq", *(["--json"] if as_json else [])]
    done = qat("export", recipe, *given)
    assert (done.exit_code, done.stderr) == (1, "error: awq cannot\n")
    lines = done.stdout.splitlines()
    assert [json.loads(line)["path"] if as_json else line for line in lines] == ["r/gptq", "r/native"]


@pytest.mark.parametrize(
    ("given", "override"),
    [([], []), (["--verify"], ["export.verify=true"]), (["--no-verify"], ["export.verify=false"])],
)
def test_an_export_is_verified_as_the_option_says_or_else_the_recipe(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, given: list[str], override: list[str]
) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr("qatcli.chain.run_exports", lambda _, overrides, *__, **___: calls.append(overrides) or [])
    assert qat("export", recipe, *given).exit_code == 0
    assert calls == [override]


# What goes wrong.


@pytest.mark.parametrize("names", ["", " ", "gptq,"])
def test_an_empty_format_is_not_an_export_of_nothing(recipe: Path, names: str) -> None:
    done = qat("export", recipe, "--format", names)
    assert done.exit_code == 2
    assert "--format names no format" in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    ("redirected", "code", "said"),
    [
        ("--help >/dev/full", 6, "error: cannot write to standard output: No space left on device"),
        ("--version >/dev/full", 6, "error: cannot write to standard output: No space left on device"),
        ("--version >&-", 2, "error: standard output is closed"),
        ("block-ap {recipe} --from - <&-", 2, "error: --from -: standard input is empty"),
    ],
)
def test_streams_that_are_full_or_closed(recipe: Path, redirected: str, code: int, said: str) -> None:
    command = f'"{sys.executable}" -m qatcli {redirected.format(recipe=recipe)}'
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert done.stderr.splitlines()[0] == said
    assert "Traceback" not in done.stderr


def test_a_result_that_cannot_be_written_names_the_stream(
    recipe: Path, stub: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    stub({"path": "runs/x/pack"})
    echo = typer.echo

    def full(message: str, *, err: bool = False) -> None:
        if not err:
            raise OSError(errno.ENOSPC, "No space left on device")
        echo(message, err=True)

    monkeypatch.setattr(typer, "echo", full)
    done = qat("pack", recipe)
    assert done.exit_code == 6
    assert done.stderr.startswith("error: cannot write to standard output: No space left on device\n\nhint: what is")


@pytest.mark.parametrize("option", ["--run", "--from", "--device"])
def test_an_empty_option_is_not_one_that_was_left_out(recipe: Path, option: str) -> None:
    done = qat("e2e-qp", recipe, option, "")
    assert done.exit_code == 2
    assert option in done.output
    assert "empty" in done.output


@pytest.mark.parametrize("command", ["inspect", "report"])
def test_names_that_no_directory_has(command: str) -> None:
    assert qat(command, "").exit_code == 2
    done = qat(command, "x" * 400)
    assert done.exit_code == 3
    assert "unforeseen" not in done.output


def test_the_recipe_is_looked_at_before_a_pipe_is_waited_for(recipe: Path) -> None:
    done = qat("block-ap", recipe, "--from", "-", "--set", "block_ap.epochz=3", stdin="{}")
    assert "epochz" in done.output
    assert "--from" not in done.output
    done = qat("block-ap", recipe, "--from", "-", stdin='{"path": "runs/x"}\n')
    assert done.exit_code == 2
    assert "--json" in done.output


def test_a_format_that_does_not_exist_is_one_of_the_option(recipe: Path) -> None:
    done = qat("export", recipe, "--format", "gptq,gguff")
    assert done.exit_code == 2
    assert "--format gguff" in done.output


@pytest.mark.parametrize("stdin", ["", "\n"])
def test_an_empty_pipe(recipe: Path, stdin: str) -> None:
    done = qat("block-ap", recipe, "--from", "-", stdin=stdin)
    assert done.exit_code == 2
    assert "standard input is empty" in done.stderr
    assert "hint: pipe" in done.stderr
    assert done.stdout == ""


def test_a_wrong_recipe_names_file_and_keys(recipe: Path) -> None:
    recipe.write_text(recipe.read_text().replace("bits: 2", "bits: 5\n  colour: red"))
    for command in ("calibrate", "run", "export"):
        done = qat(command, recipe)
        assert done.exit_code == 2, command
        assert done.stdout == ""
        assert done.stderr.startswith("error: ")
        for said in (str(recipe), "quant.bits", "quant.colour"):
            assert said in done.stderr


def test_a_wrong_override_names_the_key(recipe: Path) -> None:
    done = qat("calibrate", recipe, "--set", "quant.bits=7")
    assert done.exit_code == 2
    assert "--set" in done.stderr
    assert "quant.bits" in done.stderr


@pytest.mark.parametrize("content", [None, "folder", b"\xff\xfe\x00\x01", b"a: [", b"", b"- 1"])
def test_an_unreadable_recipe(tmp_path: Path, content: bytes | str | None) -> None:
    path = tmp_path / "broken.yaml"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "folder":
        path.mkdir()
    done = qat("calibrate", path)
    assert done.exit_code == 2
    assert f"error: {path}" in done.stderr
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    ("device", "said"),
    [("nonsense", "not a device"), ("cpu:x", "not a device"), ("meta", "not supported"), ("cuda", "no CUDA device")],
)
def test_a_device_that_is_not_there(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, said: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    partial = tmp_path / "run" / "calibrate.partial"
    partial.mkdir(parents=True)
    (partial / "resume.json").write_text("{}")
    done = qat("calibrate", recipe, "--run", tmp_path / "run", "--device", device, "--restart")
    assert done.exit_code == 2
    assert f"--device {device}" in done.stderr
    assert said in done.stderr
    assert "hint: use" in done.stderr
    assert (partial / "resume.json").is_file(), "a slip of the keyboard costs no finished work"


def test_a_gpu_beyond_the_last_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert choose_device("cuda:1") == torch.device("cuda:1")
    assert current == [torch.device("cuda:1")], "by which libraries and figures of memory go"
    with pytest.raises(errors.UsageError, match="--device cuda:2: there are 2"):
        choose_device("cuda:2")


def test_a_missing_input_exits_3(recipe: Path, tmp_path: Path) -> None:
    done = qat("block-ap", recipe, "--run", tmp_path / "run", "--device", "cpu")
    assert done.exit_code == 3
    assert "hint: run `qat calibrate`" in done.stderr
    assert qat("inspect", tmp_path).exit_code == 3


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.QatError, 1),
        (errors.RecipeError, 2),
        (errors.UsageError, 2),
        (errors.InputError, 3),
        (errors.VerificationError, 4),
        (errors.DivergedError, 5),
        (errors.ResourceError, 6),
    ],
)
def test_every_error_has_its_exit_code(
    recipe: Path, stub: Callable[..., Any], error: type[errors.QatError], code: int
) -> None:
    stub(error("what happened", hint="what to do"))
    done = qat("pack", recipe)
    assert done.exit_code == code
    assert done.stdout == ""
    assert done.stderr == "error: what happened\n\nhint: what to do\n"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "/runs/x/model.safetensors"),
        OSError(errno.EDQUOT, "Disk quota exceeded", "/runs/x/model.safetensors"),
        PermissionError(errno.EACCES, "Permission denied", "/runs/x/model.safetensors"),
        OSError(errno.EROFS, "Read-only file system", "/runs/x/model.safetensors"),
    ],
)
def test_a_disk_that_cannot_be_written_exits_6(recipe: Path, stub: Callable[..., Any], error: OSError) -> None:
    stub(error)
    done = qat("pack", recipe)
    assert done.exit_code == 6
    what = "access" if error.errno == errno.EACCES else "write"
    assert done.stderr.startswith(f"error: cannot {what} (/runs/x/model.safetensors): ")
    assert "hint: " in done.stderr


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 64.0 GiB"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nSee documentation"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried 8 bytes"
        ),
    ],
)
def test_too_little_memory_exits_6(recipe: Path, stub: Callable[..., Any], error: Exception) -> None:
    stub(error)
    done = qat("block-ap", recipe)
    assert done.exit_code == 6
    assert done.stderr.startswith("error: out of memory: ")
    assert "hint: free memory or lower block_ap.cache.host_gb" in done.stderr
    assert "See documentation" not in done.stderr


@pytest.mark.parametrize("error", [RuntimeError("a bug"), OSError(errno.ENOENT, "No such file"), ValueError("a bug")])
def test_what_no_one_foresaw_is_one_sentence_and_keeps_its_traceback(
    recipe: Path, stub: Callable[..., Any], error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    stub(error)
    done = qat("block-ap", recipe)
    assert done.exit_code == 1
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: unforeseen {type(error).__name__}: ")
    assert "Traceback" not in done.stderr
    (saved,) = tmp_path.glob("qat-traceback-*.txt")
    assert str(saved) in done.stderr
    assert "Traceback" in saved.read_text()
    assert "Traceback" in qat("block-ap", recipe, "-v").stderr
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    assert "Traceback" in qat("block-ap", recipe).stderr


def test_an_interrupt_exits_130_and_says_how_to_continue(recipe: Path, stub: Callable[..., Any]) -> None:
    stub(KeyboardInterrupt())
    done = qat("block-ap", recipe)
    assert done.exit_code == 130
    assert done.stdout == ""
    assert f"continue with `qat block-ap {recipe}`" in done.stderr


def test_a_reader_that_is_gone_is_no_interrupt(recipe: Path, stub: Callable[..., Any]) -> None:
    stub(BrokenPipeError())
    done = qat("block-ap", recipe)
    assert done.exit_code == 141
    assert "interrupted" not in done.stderr
    assert "what is finished stays" in done.stderr
    assert f"`qat block-ap {recipe}` and the same options" in done.stderr


@pytest.fixture
def signals(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Both signals handled as in a process of `qat`, none of them come yet."""
    monkeypatch.setattr(interrupts, "_arrived", [])
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    handlers = {number: signal.getsignal(number) for number in interrupts.SIGNALS}
    interrupts.install()
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_an_interrupt(recipe: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals) -> None:
    monkeypatch.setattr("qatcli.chain.run_one", lambda *_, **__: signal.raise_signal(number))
    assert qat("calibrate", recipe).exit_code == 130


@pytest.mark.usefixtures("signals")
def test_a_signal_while_libraries_load_is_an_interrupt_whatever_they_make_of_it(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise ImportError("half a library") from None

    monkeypatch.setattr("qatcli.chain.run_one", load)
    done = qat("calibrate", recipe)
    assert done.exit_code == 130
    assert "half a library" not in done.stderr


@pytest.mark.usefixtures("signals")
def test_a_signal_from_before_the_command_is_not_lost(recipe: Path, stub: Callable[..., Any]) -> None:
    signal.raise_signal(signal.SIGTERM)
    calls = stub({"path": "somewhere"})
    assert qat("calibrate", recipe).exit_code == 130
    assert calls == []


# eval takes recipes and models.


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The calls of `compare`, which returns figures of no model."""
    calls: list[dict[str, Any]] = []

    def compare(targets: list[str], config: Any, **options: Any) -> dict[str, Any]:
        calls.append({"targets": targets, "config": config, **options})
        return {"models": {}, "protocol": {}, "zero_shot_protocol": None, "speed_protocol": None, "prompts": []}

    monkeypatch.setattr("qatcli.evaluation.compare.compare", compare)
    return calls


def test_a_recipe_is_evaluated_as_a_stage(recipe: Path, stub: Callable[..., list[dict[str, Any]]]) -> None:
    calls = stub({"stage": "eval", "path": "runs/x/eval", "seconds": 1.0, "metrics": {}})
    assert qat("eval", recipe, "--set", "eval.kl=false").stdout == "runs/x/eval\n"
    assert (calls[0]["stage"], calls[0]["recipe"], calls[0]["overrides"]) == ("eval", recipe, ["eval.kl=false"])


def test_models_are_compared(tmp_path: Path, compared: list[dict[str, Any]]) -> None:
    (tmp_path / "text").touch()
    given = [
        "--text",
        str(tmp_path / "text"),
        "--windows",
        "3",
        "--zero-shot",
        "piqa",
        "--limit",
        "5",
        "--against",
        "full",
    ]
    done = qat("eval", "runs/x/pack", "model.gguf", *given, "--device", "cpu", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["stage"] == "eval"
    (call,) = compared
    assert call["targets"] == ["runs/x/pack", "model.gguf"]
    assert call["against"] == "full"
    assert call["config"].perplexity[0].windows == 3
    assert call["config"].zero_shot.limit == 5
    assert qat("eval", "model.gguf", "-q").stdout == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["r.yaml", "runs/x/pack"], "a recipe is evaluated by itself"),
        (["r.yaml", "--limit", "3"], "--limit is for models"),
        (["r.yaml", "--seq-len", "64"], "--seq-len is for models"),
        (["r.yaml", "--bos"], "--bos is for models"),
        (["runs/x/pack", "--set", "eval.kl=false"], "are for a recipe"),
        (["runs/x/pack", "--restart"], "are for a recipe"),
        (["runs/x/pack", "--limit", "3"], "--limit needs --zero-shot"),
    ],
)
def test_options_of_the_other_kind_are_refused(
    arguments: list[str], message: str, compared: list[dict[str, Any]]
) -> None:
    done = qat("eval", *arguments)
    assert done.exit_code == 2
    assert message in done.stderr
    assert compared == []
