"""Every exception becomes a sentence and an exit code."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from qatcli.errors import InputError
from qatcli.failures import UNWRITABLE, explain, own_error


def test_an_error_for_the_user_is_kept() -> None:
    error = InputError("x is missing", hint="make it")
    assert explain(error, verbose=False) is error


@pytest.mark.parametrize("number", UNWRITABLE)
def test_a_disk_that_cannot_be_written_is_a_lack_of_resources(number: int) -> None:
    error = explain(OSError(number, os.strerror(number), "/runs/model.safetensors"), verbose=False)
    what = "access" if number in (errno.EACCES, errno.EPERM) else "write"  # which may have been to read
    text = f"cannot {what} (/runs/model.safetensors): {os.strerror(number)}"
    assert (error.exit_code, error.message) == (6, text)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("unable to allocate"),
        RuntimeError("CUDA out of memory. Tried to allocate 2 GiB\nand more"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_lack_of_memory_names_the_knobs(error: Exception) -> None:
    found = explain(error, verbose=False)
    assert found.exit_code == 6
    assert "\n" not in found.message
    assert "batch_size" in str(found.hint)


def test_a_current_directory_that_is_gone_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(FileNotFoundError) as caught:
        Path().absolute()
    found = explain(caught.value, verbose=False)
    assert (found.exit_code, found.message) == (2, "the current directory does not exist any more")


def test_what_nobody_foresaw_leaves_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    found = explain(ZeroDivisionError("division\nby zero"), verbose=False)
    assert (found.exit_code, found.message) == (1, "unforeseen ZeroDivisionError: division by zero")
    (file,) = tmp_path.iterdir()
    assert str(file) in str(found.hint)
    assert "ZeroDivisionError" in file.read_text()
    assert capsys.readouterr().err == ""


def test_a_traceback_that_cannot_be_kept_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr("tempfile.NamedTemporaryFile", full)
    found = explain(OSError(errno.ENOENT, "gone"), verbose=False)  # to be read, not written: nobody foresaw it
    assert "stands above" in str(found.hint)
    assert "gone" in capsys.readouterr().err


def test_a_librarys_error_may_be_of_this_machine() -> None:
    """A full disk during a download is no fault of the hub; a connection that is denied, without a file, is."""
    full, outer = OSError(errno.ENOSPC, "No space left on device"), RuntimeError("generating the data set failed")
    outer.__cause__ = full
    assert own_error(outer) is full
    assert explain(full, verbose=False).exit_code == 6
    assert own_error(PermissionError(errno.EACCES, "denied", "/cache/x")) is not None
    assert own_error(PermissionError(errno.EACCES, "denied")) is None
    assert own_error(ConnectionError("refused")) is None
