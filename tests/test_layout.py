"""The house rules a machine can check (CONTRIBUTING.md). Each test also asserts how much it looked at."""

from __future__ import annotations

import ast
import functools
import graphlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import qatcli
from qatcli.stages import STAGES

ROOT = Path(__file__).resolve().parents[1]
LONGEST_FILE = 400
CEILING = 21_500  # lines of qatcli and kernels together; raise it in the commit that needs it, and say why
LEAST_FILES = {"qatcli": 40, "kernels": 6}  # what must be found for a rule to have been checked at all
JUNK_NAMES = {"util", "utils", "helper", "helpers", "common", "misc"}
PARTS_OF_PYDANTIC = {"pydantic_core", "annotated_types"}
HEAVY = {"torch", "triton", "transformers", "datasets", "accelerate", "numpy", "safetensors"}


def sources(*folders: str) -> list[Path]:
    """Every Python file below the folders; fails if a folder holds suspiciously few."""
    found = []
    for folder in folders:
        files = sorted((ROOT / folder).rglob("*.py"))
        assert len(files) >= LEAST_FILES[folder], f"only {len(files)} files in {folder}"
        found += files
    return found


def module_name(path: Path) -> str:
    """The dotted name under which a source file is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path, *, top_level: bool = False) -> set[str]:
    """The modules a file imports; `from a import b` counts as both `a` and `a.b`. Those for type checkers do not count.

    With `top_level`, only those that run when the file is imported.
    """
    found = set()
    for node in _running_nodes(tree(path), into_functions=not top_level):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _running_nodes(node: ast.AST, *, into_functions: bool) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            continue
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not into_functions:
            continue
        yield child
        yield from _running_nodes(child, into_functions=into_functions)


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)


def test_files_are_short() -> None:
    lengths = {str(path): len(path.read_text(encoding="utf-8").splitlines()) for path in sources("qatcli", "kernels")}
    assert {path: lines for path, lines in lengths.items() if lines > LONGEST_FILE} == {}
    assert 1000 < sum(lengths.values()) <= CEILING


def test_no_file_is_a_junk_drawer() -> None:
    paths = sources("qatcli", "kernels")
    parts = {part for path in paths for part in path.relative_to(ROOT).with_suffix("").parts}
    assert parts & JUNK_NAMES == set()
    assert {"cli", "errors", "recipe", "stages", "reference"} <= parts


def test_the_kernels_folder_is_not_a_package() -> None:
    # Hugging Face's `kernels` has that import name: from the repository's root ours would hide it.
    assert (ROOT / "kernels" / "qat_kernels" / "__init__.py").is_file()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_sources_are_finished_and_ascii() -> None:
    text = {path: path.read_text(encoding="utf-8") for path in sources("qatcli", "kernels")}
    unfinished = re.compile(r"\b(TODO|FIXME|XXX)\b|raise NotImplementedError")
    assert [str(path) for path, content in text.items() if unfinished.search(content)] == []
    assert [str(path) for path, content in text.items() if not content.isascii()] == []


def test_help_loads_nothing_heavy() -> None:
    code = f"""
import sys
from qatcli.cli import main
sys.argv = ["qat", "--help"]
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
print(*sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr)
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert "block-ap" in done.stdout
    assert done.stderr.split() == []


def test_importing_the_kernels_needs_no_triton_and_touches_no_device() -> None:
    code = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch
import qat_kernels
assert not torch.cuda.is_initialized()
codes = torch.arange(8, dtype=torch.uint8).reshape(2, 4) % 4
assert torch.equal(qat_kernels.unpack(qat_kernels.pack(codes, bits=2), bits=2, length=4), codes)
print(*sorted(name for name in sys.modules if name.split(".")[0] == "qatcli"), "imported")
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["imported"]


def test_the_kernels_know_nothing_of_qatcli() -> None:
    files = [path for path in sources("kernels") if "qat_kernels" in path.parts]
    used = {name.split(".")[0] for path in files for name in imports(path)} - sys.stdlib_module_names
    assert {"torch", "qat_kernels"} <= used <= {"torch", "triton", "qat_kernels"}


def test_stages_do_not_import_each_other() -> None:
    modules = {stage.module for stage in STAGES.values()}
    assert modules >= {"calibrate", "block_ap", "e2e_qp", "pack", "export", "evaluate"}
    checked = 0
    for module in modules:
        others = {f"qatcli.stages.{other}" for other in modules - {module}}
        folder, file = ROOT / "qatcli/stages" / module, ROOT / f"qatcli/stages/{module}.py"
        for path in [file] if file.is_file() else sorted(folder.rglob("*.py")):
            assert imports(path) & others == set(), path
            checked += 1
    assert checked >= len(modules)


def test_the_parts_of_qatcli_depend_on_each_other_in_one_direction() -> None:
    graph: dict[str, set[str]] = {}
    for path in sources("qatcli"):
        part = ".".join(module_name(path).split(".")[:2])
        used = {".".join(name.split(".")[:2]) for name in imports(path) if name.startswith("qatcli.")}
        graph[part] = graph.get(part, set()) | used - {part}
    graph = {part: used & graph.keys() for part, used in graph.items()}  # `qatcli.__version__` is no part
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError
    assert graph["qatcli.errors"] == set()
    assert graph["qatcli.recipe"] == {"qatcli.errors"}
    assert [part for part, used in graph.items() if "qatcli.cli" in used] == ["qatcli.__main__"]
    assert order.index("qatcli.errors") < order.index("qatcli.recipe") < order.index("qatcli.cli")


def test_the_command_line_has_no_logic_of_its_own() -> None:
    path = ROOT / "qatcli" / "cli.py"
    at_import = imports(path, top_level=True)
    third_party = {name.split(".")[0] for name in at_import} - sys.stdlib_module_names
    assert {"typer", "qatcli"} <= third_party <= {"typer", "rich", "qatcli"}
    ours = {".".join(name.split(".")[:2]) for name in at_import if name.startswith("qatcli.")}
    assert ours <= {
        "qatcli.cli_options",
        "qatcli.errors",
        "qatcli.failures",
        "qatcli.interrupts",
        "qatcli.recipe",
        "qatcli.stages",
        "qatcli.runlog",
        "qatcli.__version__",
    }
    assert {name.split(".")[0] for name in imports(path)} & HEAVY == set()
    assert "import click" not in path.read_text(encoding="utf-8")  # typer carries its own


def writes_to_stdout(node: ast.AST) -> bool:
    """Whether a node prints to standard output, or reaches for the stream itself."""
    if isinstance(node, ast.Attribute):
        return ast.unparse(node) in ("sys.stdout.write", "sys.stdout.buffer")
    if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "typer.echo", "rich.print"):
        return not {"file", "err"} & {keyword.arg for keyword in node.keywords}
    return False


def test_only_the_command_line_writes_to_standard_output() -> None:
    writers = set()
    for path in sources("qatcli"):
        nodes = list(ast.walk(tree(path)))
        if any(map(writes_to_stdout, nodes)):
            writers.add(module_name(path))
        prints = [node.lineno for node in nodes if isinstance(node, ast.Name) and node.id == "print"]
        assert path.name == "cli.py" or not prints, f"{path}:{prints[0]} prints"
    assert writers == {"qatcli.cli"}


def test_the_declared_packages_are_the_imported_ones() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    core, *extras = (
        {normalized(re.split(r"[<>=;\[ ]", requirement)[0]) for requirement in requirements}
        for requirements in (project["dependencies"], *project["optional-dependencies"].values())
    )
    imported = {name.split(".")[0] for path in sources("qatcli", "kernels") for name in imports(path)}
    imported -= sys.stdlib_module_names | {"qatcli", "qat_kernels"} | PARTS_OF_PYDANTIC
    owners = packages_distributions()  # yaml -> PyYAML; an extra that is not installed has no row
    distributions = {name: set(map(normalized, [name, *owners.get(name, [])])) for name in imported}
    assert [name for name, known in distributions.items() if not known & core.union(*extras)] == []
    assert core - set().union(*distributions.values()) == set(), "declared, but nothing imports them"


def normalized(distribution: str) -> str:
    return distribution.lower().replace("_", "-")


def test_the_changelog_starts_with_this_version() -> None:
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[:1] == [qatcli.__version__]


@pytest.mark.parametrize("target", ["demo", "test", "test-gpu", "bench", "lint", "fmt", "loc", "wheel", "clean"])
def test_the_makefile_offers(target: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony is not None
    assert target in phony[1].split()
    assert re.search(rf"^{target}:.* ## ", makefile, re.MULTILINE), f"`make help` does not list {target}"
