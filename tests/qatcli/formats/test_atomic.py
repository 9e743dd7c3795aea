"""An export appears complete under its name or not at all: full disks, kills, and what they leave."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qatcli.errors import InputError, ResourceError
from qatcli.formats import FORMATS, ExportOptions
from qatcli.packed import PackedCheckpoint

Packed = Callable[..., PackedCheckpoint]
INTEGERS_ONLY = ExportOptions(runtimes=False)


@pytest.mark.parametrize(
    ("name", "function", "error"),
    [
        ("gptq", "qatcli.shards.save_file", OSError(errno.ENOSPC, "No space left on device")),
        ("gguf", "gguf.GGUFWriter.write_tensor_data", OSError("Not enough free space to write 64 bytes")),
        ("gguf", "gguf.GGUFWriter.write_tensor_data", OSError("64 requested and 7 written")),
    ],
)
def test_nothing_is_left_when_the_disk_is_full(
    packed: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, function: str, error: OSError
) -> None:
    def no_space(*_: object, **__: object) -> None:
        raise error

    checkpoint = packed(2)  # written before the disk is full
    monkeypatch.setattr(function, no_space)
    with pytest.raises(ResourceError, match="no space left"):
        FORMATS[name].write(checkpoint, tmp_path / "out", INTEGERS_ONLY)
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from unittest.mock import patch
from qatcli.formats import FORMATS, ExportOptions
from qatcli.packed import PackedCheckpoint

calls = 0
def kill(*_, **__):
    global calls
    calls += 1
    if calls == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*_, **__)

name, function, packed, out = sys.argv[1:]
target, _, attribute = function.rpartition(".")
real = getattr(__import__("pkgutil").resolve_name(target), attribute)
with patch(function, kill):
    options = ExportOptions(runtimes=False, max_shard_bytes=50_000)
    FORMATS[name].write(PackedCheckpoint.open(Path(packed)), Path(out), options)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "function"),
    [("awq", "qatcli.shards.save_file"), ("gguf", "gguf.GGUFWriter.write_tensor_data")],
)
def test_a_kill_leaves_no_half_export_under_the_final_name(
    packed: Packed, tmp_path: Path, name: str, function: str
) -> None:
    command = [sys.executable, "-c", KILLED, name, function, str(packed(4).path), str(tmp_path / "out")]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    FORMATS[name].write(packed(4), tmp_path / "out", INTEGERS_ONLY)
    assert FORMATS[name].verify(packed(4), tmp_path / "out", INTEGERS_ONLY).passed
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_left_over_of_a_killed_run_is_replaced_and_a_finished_export_is_not(packed: Packed, tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "half").write_text("x")
    FORMATS["native"].write(packed(2), tmp_path / "out", INTEGERS_ONLY)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert not (tmp_path / "out" / "half").exists()
    with pytest.raises(InputError, match="exists already"):
        FORMATS["native"].write(packed(2), tmp_path / "out", INTEGERS_ONLY)
