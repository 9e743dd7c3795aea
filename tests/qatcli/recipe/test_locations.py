"""Variables, hub ids against paths, relative paths."""

from __future__ import annotations

import glob
from pathlib import Path

import pytest

from qatcli.recipe.locations import expand_variables, is_local, resolve_source, resolve_text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain $HOME {A}", "plain $HOME {A}"),
        ("${A}/x", "one/x"),
        ("${A}${B}", "onetwo"),
        ("${NOT:-fallback}", "fallback"),
        ("${NOT:-}", ""),
        ("${EMPTY:-fallback}", "fallback"),
        ("${A:-fallback}", "one"),
        ("$${A}", "${A}"),
    ],
)
def test_expansion(text: str, expected: str) -> None:
    assert expand_variables(text, {"A": "one", "B": "two", "EMPTY": ""}) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("${NOT}", "the environment variable NOT is not set"),
        ("${EMPTY}", "the environment variable EMPTY is not set"),
        ("${}", "neither"),
        ("${A-b}", "neither"),
    ],
)
def test_expansion_fails(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expand_variables(text, {"EMPTY": ""})


@pytest.mark.parametrize(
    "source", ["./model", "../model", "/model", "~/model", "text.jsonl", "a/b.txt", "a/*.json", "x/model.Q4_1.GGUF"]
)
def test_local(source: str) -> None:
    assert is_local(source)


@pytest.mark.parametrize("source", ["meta-llama/Llama-2-7b-hf", "gpt2", "Qwen/Qwen2.5-7B", "DKYoon/SlimPajama-6B"])
def test_hub(source: str, tmp_path: Path) -> None:
    assert not is_local(source)
    assert resolve_source(source, tmp_path) == source


def test_paths_become_absolute(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    (tmp_path / "b[1].txt").touch()
    (tmp_path / "recipes").mkdir()
    folder = tmp_path / "recipes"
    assert resolve_source("../a.txt", folder) == str(tmp_path / "a.txt")
    assert resolve_source("../*.txt", folder) == str(tmp_path / "*.txt")
    assert resolve_source("../b[1].txt", folder) == str(tmp_path / "b[1].txt")  # a real name with glob characters
    assert resolve_text("../a.txt", folder) == str(tmp_path / "a.txt")
    assert resolve_text("wikitext2", folder) == "wikitext2"


@pytest.mark.parametrize("source", ["./none", "none.gguf", "*.none", "./nul\0", "./" + "x" * 5000])
def test_what_is_not_there(source: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no file matches|no such file or folder"):
        resolve_source(source, tmp_path)


@pytest.mark.parametrize("source", ["models/llama/7b", "a b", "nul\0", "-flag", "https://huggingface.co/a/b"])
def test_neither_a_path_nor_a_hub_id(source: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a hub id"):
        resolve_source(source, tmp_path)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_hub_id_that_is_also_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elsewhere: bool) -> None:
    recipes, work = tmp_path / "recipes", tmp_path / "work"
    for folder in (recipes, work):
        folder.mkdir()
    monkeypatch.chdir(work)
    assert resolve_source("owner/name", recipes) == "owner/name"
    ((work if elsewhere else recipes) / "owner" / "name").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"and there is .*/owner/name; write a local path as \./path"):
        resolve_source("owner/name", recipes)


def test_a_text_is_a_path_unless_built_in(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file: "):
        resolve_text("wikitext3", tmp_path)
    with pytest.raises(ValueError, match="is not a file: "):
        resolve_text(".", tmp_path)


def test_a_pattern_is_what_the_recipe_says_and_not_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "runs[1]"
    folder.mkdir()
    (folder / "a.jsonl").touch()
    (match,) = glob.glob(resolve_source("./*.jsonl", folder))
    assert match == str(folder / "a.jsonl")
