"""Run `qat` with one thing going wrong at a chosen file operation. Nothing of this is in the shipped package.

    python faults.py '{"under": DIR, "kind": "replace", "at": 3, "fault": "ENOSPC"}' block-ap recipe.yaml --run DIR
    python faults.py --serve      one JSON object {"fault", "arguments", "output"} per line in, {"code", "cpu"} out

Operations are counted by kind, those on paths below `under` only:
    open    a file opened for writing          write   a write to it            copy     a file copied
    save    a safetensors file written         fsync   a file or folder synced  replace  rename  mkdir  unlink
Faults:
    kill              SIGKILL in the middle of it: half of the bytes are there, the rename is not
    kill-after        SIGKILL directly after it
    ENOSPC EIO EROFS  half of the bytes are there, the call fails, and so does every later one: the disk stays full
    SIGINT SIGTERM    arrive in the middle of it
    pause             it takes until the file "until" exists
With "largest_file" the kernel itself refuses to make a file larger than that, after a short write.
Served commands run in a fork of a process that has imported everything, which saves seconds for each.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import json
import os
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

KINDS = ("open", "write", "copy", "save", "fsync", "replace", "rename", "mkdir", "unlink")
FREEING = ("unlink",)  # what works on a full disk


class Disk:
    """Counts operations and strikes at the chosen one."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.under = os.path.realpath(spec["under"]) + os.sep
        self.kind, self.at, self.fault = spec.get("kind"), spec.get("at"), spec.get("fault")
        self.counts: Counter[str] = Counter()
        self.broken = False
        self.trace, self.until = spec.get("trace"), spec.get("until")
        self._busy = False

    def operation(self, kind: str, path: object, do: Callable[[], Any], half: Callable[[], Any] | None = None) -> Any:
        """Do it, or what the fault makes of it. `half` does the first half."""
        if self._busy or not os.path.realpath(os.fspath(path)).startswith(self.under):  # type: ignore[call-overload]
            return do()
        self.counts[kind] += 1
        if self.trace:
            self._count()
        struck = kind == self.kind and self.counts[kind] == self.at
        if self.broken and (kind not in FREEING or self.fault == "EROFS"):
            raise self._error(path)
        if not struck:
            return do()
        if self.fault in ("SIGINT", "SIGTERM"):
            os.kill(os.getpid(), getattr(signal, self.fault))
            return do()
        if self.fault == "pause":
            while not os.path.exists(self.until):
                time.sleep(0.05)
            return do()
        if self.fault == "kill-after":
            with contextlib.suppress(OSError):
                do()
        elif half is not None:
            self._busy = True
            half()
            self._busy = False
        if self.fault in ("kill", "kill-after"):
            os.kill(os.getpid(), signal.SIGKILL)
        self.broken = True
        raise self._error(path)

    def _error(self, path: object) -> OSError:
        number = getattr(errno, self.fault)
        return OSError(number, os.strerror(number), str(path))

    def _count(self) -> None:
        self._busy = True
        Path(self.trace).write_text(json.dumps(self.counts))
        self._busy = False


class WatchedFile:
    """A file whose every write is an operation."""

    def __init__(self, disk: Disk, file: Any, path: object) -> None:
        self._disk, self._file, self._path = disk, file, path

    def write(self, data: Any) -> Any:
        def half() -> None:
            self._file.write(data[: len(data) // 2])
            self._file.flush()

        return self._disk.operation("write", self._path, lambda: self._file.write(data), half)

    def __enter__(self) -> WatchedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __iter__(self) -> Any:
        return iter(self._file)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def install(disk: Disk) -> None:
    """Put the disk between the program and the file system."""
    import safetensors.torch
    from safetensors import SafetensorError

    real_open, real_fsync = builtins.open, os.fsync
    real_save = safetensors.torch.save_file

    def watched_open(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if isinstance(file, int) or not set(mode) & set("wax+"):
            return real_open(file, mode, *arguments, **options)
        opened = disk.operation("open", file, lambda: real_open(file, mode, *arguments, **options))
        inside = os.path.realpath(os.fspath(file)).startswith(disk.under)
        return WatchedFile(disk, opened, file) if inside and not disk._busy else opened

    def watched_fsync(descriptor: int) -> None:
        disk.operation("fsync", os.readlink(f"/proc/self/fd/{descriptor}"), lambda: real_fsync(descriptor))

    def watched_copy(source: Any, target: Any, **options: Any) -> Any:
        content = Path(source).read_bytes()

        def write(count: int) -> None:
            with real_open(target, "wb") as handle:
                handle.write(content[:count])

        return disk.operation("copy", target, lambda: write(len(content)), lambda: write(len(content) // 2))

    def watched_save(tensors: Any, file: Any, **options: Any) -> None:
        def half() -> None:
            real_save(tensors, file, **options)
            os.truncate(file, os.path.getsize(file) // 2)

        try:
            disk.operation("save", file, lambda: real_save(tensors, file, **options), half)
        except OSError as error:  # as the library reports it
            message = f"Error while serializing: I/O error: {error.strerror} (os error {error.errno})"
            raise SafetensorError(message) from error

    def watched(kind: str, real: Callable[..., Any], place: int) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if options.get("dir_fd") is not None:  # the inside of shutil.rmtree
                return real(*arguments, **options)
            return disk.operation(kind, arguments[place], lambda: real(*arguments, **options))

        return call

    builtins.open = io.open = watched_open  # type: ignore[assignment]
    os.fsync, shutil.copyfile, safetensors.torch.save_file = watched_fsync, watched_copy, watched_save
    for kind, place in (("replace", 1), ("rename", 1), ("mkdir", 0), ("unlink", 0)):
        setattr(os, kind, watched(kind, getattr(os, kind), place))
    if "qatcli.shards" in sys.modules:
        sys.modules["qatcli.shards"].save_file = watched_save  # type: ignore[attr-defined]


def run(spec: dict[str, Any] | None, arguments: list[str]) -> None:
    """The command line, ending the process."""
    if spec:
        install(Disk(spec))
        if "largest_file" in spec:
            resource.setrlimit(resource.RLIMIT_FSIZE, (spec["largest_file"], spec["largest_file"]))
    from qatcli.cli import main

    sys.argv = ["qat", *arguments]
    main()


def serve() -> None:
    """Run every command of standard input in a fork of this process."""
    import importlib

    from qatcli.stages import STAGES

    ours = ("chain", "formats", "hf", "data", "plan", *(f"stages.{stage.module}" for stage in STAGES.values()))
    libraries = ("datasets", "transformers.models.llama.modeling_llama", "transformers.generation")
    for module in (*(f"qatcli.{name}" for name in ours), *libraries):
        importlib.import_module(module)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            _serve_one(request)
        _, status, used = os.wait4(child, 0)
        answer = {"code": os.waitstatus_to_exitcode(status), "cpu": used.ru_utime + used.ru_stime}
        print(json.dumps(answer), flush=True)


def _serve_one(request: dict[str, Any]) -> None:
    code = 1
    try:
        for number, name in ((0, os.devnull), (1, request["output"] + ".out"), (2, request["output"] + ".err")):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
        run(request["fault"], request["arguments"])
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve()
    else:
        run(json.loads(sys.argv[1]), sys.argv[2:])
