"""Building the CPU library: once per source, compiler and processor; a machine without a compiler is told once."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from qat_kernels import cpu_build


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpu_build.library.cache_clear()
    yield
    cpu_build.library.cache_clear()


@pytest.fixture
def compiler() -> str:
    """The C++ compiler that is found here."""
    try:
        return cpu_build._compiler()
    except FileNotFoundError:
        pytest.skip("no C++ compiler")


def built(cache: Path) -> list[Path]:
    return sorted((cache / "qat_kernels").iterdir())


def test_it_is_built_once_and_then_taken_from_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if cpu_build.library() is None:
        pytest.skip("no C++ compiler")
    (library,) = built(tmp_path)
    cpu_build.library.cache_clear()
    monkeypatch.setattr(cpu_build.subprocess, "run", lambda *_, **__: pytest.fail("built again"))
    assert cpu_build.library() is not None
    assert built(tmp_path) == [library]


def test_another_processor_gets_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if cpu_build.library() is None:
        pytest.skip("no C++ compiler")
    cpu_build.library.cache_clear()
    monkeypatch.setattr(cpu_build, "_processor", lambda: "another")
    assert cpu_build.library() is not None
    assert len(built(tmp_path)) == 2


@pytest.mark.usefixtures("compiler")
def test_a_damaged_one_is_built_again(tmp_path: Path) -> None:
    library = cpu_build._built()
    library.write_bytes(b"")  # as a full disk leaves it; before it is loaded, which a process does once for each path
    assert cpu_build.library() is not None
    assert built(tmp_path) == [library]
    assert library.stat().st_size


def test_a_compiler_is_called_by_the_name_it_was_found_under(
    compiler: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """ccache and others that stand in a compiler's place go by that name."""
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "wrapper").write_text(f'#!/bin/sh\ncase $0 in */c++) exec {compiler} "$@" ;; *) exit 1 ;; esac\n')
    (programs / "wrapper").chmod(0o755)
    (programs / "c++").symlink_to("wrapper")
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.delenv("CXX", raising=False)
    assert cpu_build.library() is not None


@pytest.mark.parametrize("program", [None, "exit 1", "touch made-nothing"])
def test_without_a_working_compiler_there_is_one_warning(
    program: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    if program is not None:
        compiler = programs / "c++"
        compiler.write_text(f"#!/bin/sh\necho broken >&2\n{program}\n")
        compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.delenv("CXX", raising=False)
    with caplog.at_level(logging.WARNING, logger="qat_kernels"):
        assert cpu_build.library() is None
        assert cpu_build.library() is None
    assert len(caplog.records) == 1
    assert "plain torch" in caplog.text
    if program == "exit 1":
        assert "broken" in caplog.text
