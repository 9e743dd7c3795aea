"""Every recipe that ships loads, is named after what it does, and is listed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qatcli.recipe import Recipe, load_recipe

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "recipes"
PATHS = sorted(RECIPES.rglob("*.y*ml"))
NAMES = [path.relative_to(RECIPES).as_posix() for path in PATHS]

PAPER = {
    f"{model}/{grid}.yaml"
    for model in ("llama-2-7b", "llama-2-13b", "llama-2-70b", "llama-3-8b", "llama-3-70b", "mistral-7b", "qwen2.5-7b")
    for grid in ("w2g64", "w2g128", "w3g128", "w4g128")
}
OTHERS = {
    *(f"demo/w{bits}g64.yaml" for bits in (2, 3, 4)),
    *(f"smoke/w{bits}g32.yaml" for bits in (2, 3, 4)),
    *(f"smollm2/w{bits}g64{variant}.yaml" for bits in (2, 3, 4) for variant in ("", "-efficientqat")),
    "gemma3-270m/w3g64.yaml",
    "llama-2-7b/w2g64-alpaca.yaml",
    "llama-3-8b/w2g64-alpaca.yaml",
    "smollm2/w3g64-alpaca.yaml",
    "smollm2/w3g64-large.yaml",
}


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """A function that loads a recipe by name in a place where all the files that it names exist."""
    files = ("data/calib/rp1t_c4.jsonl", "data/calib/alpaca_5000.json", "data/ppl/wiki.test.raw", "model/config.json")
    files += ("data/calib/enwiki_hotpot_17mb.jsonl", "tiny.jsonl")
    demo = (".demo/SmolLM2-135M-Instruct.Q4_1.gguf", ".demo/wiki.utf8", ".demo/wiki-heldout.txt")
    for file in (*files, *demo):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    monkeypatch.setenv("QAT_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("QAT_SMOLLM2", str(tmp_path / "model"))
    monkeypatch.setenv("QAT_GEMMA3", str(tmp_path / "model"))
    monkeypatch.setenv("QAT_SMOKE_MODEL", str(tmp_path / "model"))
    monkeypatch.setenv("QAT_SMOKE_TEXT", str(tmp_path / "tiny.jsonl"))

    def load_copy(name: str) -> Recipe:
        copy = tmp_path / "recipes" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes((RECIPES / name).read_bytes())
        return load_recipe(copy)

    return load_copy


def test_the_set() -> None:
    assert len(NAMES) >= 42
    assert set(NAMES) >= PAPER | OTHERS


@pytest.mark.parametrize("name", NAMES)
def test_loads_and_is_named_after_its_grid(load, name: str) -> None:  # type: ignore[no-untyped-def]
    recipe = load(name)
    grid = re.fullmatch(r"w(\d)g(\d+)(-[a-z0-9-]+)?", Path(name).stem)
    assert grid is not None
    assert (recipe.quant.bits, recipe.quant.group_size) == (int(grid[1]), int(grid[2]))
    if grid[3] == "-efficientqat":
        assert recipe.method == "efficientqat"
    assert (grid[3] in ("-alpaca", "-large")) == (recipe.e2e_qp.data is not None)


@pytest.mark.parametrize("name", NAMES)
def test_the_header_says_how_to_run_it(name: str) -> None:
    lines = (RECIPES / name).read_text(encoding="utf-8").splitlines()
    header = [line for line in lines[:15] if line.startswith("#")]
    assert f"#   qat run recipes/{name}" in header
    assert any(line.startswith("# Published") for line in header)
    assert any("Cost: " in line for line in header)
    assert max(len(line) for line in lines) <= 120


@pytest.mark.parametrize("name", sorted(PAPER))
def test_the_papers_budgets(load, name: str) -> None:  # type: ignore[no-untyped-def]
    recipe = load(name)
    calibrate, block_ap, e2e_qp = recipe.calibrate, recipe.block_ap, recipe.e2e_qp
    assert (calibrate.samples, calibrate.validation_samples, calibrate.seq_len) == (4096, 64, 2048)
    assert (block_ap.epochs, block_ap.batch_size) == (2, 2)
    assert (e2e_qp.samples, e2e_qp.seq_len, e2e_qp.epochs, e2e_qp.batch_size) == (4096, 4096, 1, 32)
    assert recipe.method == ("efficientqat" if name.startswith("llama-2") else "qat")


@pytest.mark.parametrize("name", NAMES)
def test_what_is_expected_is_measured_and_published(load, name: str) -> None:  # type: ignore[no-untyped-def]
    recipe = load(name)
    measured = {text.name: text for text in recipe.eval.perplexity}
    published = name in PAPER and name.startswith("llama")
    assert set(recipe.expect) <= set(measured)
    assert ("wikitext2" in recipe.expect) == published
    text = (RECIPES / name).read_text(encoding="utf-8")
    for metric, expectation in recipe.expect.items():
        label = {"wikitext2": "WikiText-2", "c4": "C4"}[metric]
        assert f"{label} {expectation.value:.2f}" in text  # the header says where the figure is from
        assert measured[metric].seq_len == 2048  # the context of the paper


def test_every_recipe_has_a_row() -> None:
    rows = re.findall(r"^\| \[(.+?)\]\((.+?)\) \|.*\| (.+?) \|$", (RECIPES / "README.md").read_text("utf-8"), re.M)
    assert sorted(target for _, target, _ in rows) == NAMES
    assert all(shown == target for shown, target, _ in rows)


@pytest.mark.parametrize("name", NAMES)
def test_the_row_shows_what_is_expected(load, name: str) -> None:  # type: ignore[no-untyped-def]
    row = next(line for line in (RECIPES / "README.md").read_text("utf-8").splitlines() if f"]({name})" in line)
    figures = [f"{expectation.value:.2f}" for expectation in load(name).expect.values()]
    assert all(figure in row for figure in figures)
    assert bool(figures) != any(word in row for word in ("not published", "| none |"))
