"""Compiles cpu.cpp for this machine on first use, and keeps the result in the user's cache.

Why not torch.compile: its kernels for fake quantization are as fast, but take 20 to 30 seconds to compile where g++
takes one, and its matrix-vector product over packed codes is not vectorized. OpenMP is the runtime that torch has
loaded, so both share one pool of threads. Where there is no compiler, `cpu` takes the reference.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).with_name("cpu.cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
SIGNATURES = {  # p: pointer, q: int64_t, i: int
    "qat_fake_quant": "ppppiqqii",
    "qat_fake_quant_backward": "pppppppiqqii",
    "qat_dequantize": "ppppiqqqqii",
    "qat_matmul": "pppppqqqqqii",
}
TIMEOUT_SECONDS = 120

_TYPES = {"p": ctypes.c_void_p, "q": ctypes.c_int64, "i": ctypes.c_int}
_logger = logging.getLogger("qat_kernels")


@cache
def library() -> ctypes.CDLL | None:
    """The compiled functions, or None (and one warning in the log) where they cannot be had."""
    try:
        loaded = _loaded()
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: no home directory
        detail = getattr(error, "stderr", None) or error
        _logger.warning("CPU kernels run in plain torch, several times slower: %s", detail)
        return None
    for name, letters in SIGNATURES.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = [_TYPES[letter] for letter in letters], None
    return loaded


def _loaded() -> ctypes.CDLL:
    path = _built()
    try:
        return ctypes.CDLL(str(path))
    except OSError:  # cut short, by a full disk perhaps
        path.unlink(missing_ok=True)
        return ctypes.CDLL(str(_built()))


def _built() -> Path:
    """The shared library in the cache; built there unless source, compiler and processor are those of one there."""
    compiler = _compiler()
    made_of = (SOURCE.read_text(), *FLAGS, compiler, str(os.stat(compiler).st_mtime_ns), _processor())
    digest = hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qat_kernels"
    target = folder / f"cpu-{digest}.so"
    if not target.is_file():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:  # renamed when whole: others may build it too
            made = Path(scratch, target.name)
            command = [compiler, *FLAGS, str(SOURCE), "-o", str(made)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
            made.replace(target)
    return target


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        found = shutil.which(name) if name else None
        if found:
            return found  # as it is called: a link to ccache compiles under the name of the link only
    raise FileNotFoundError("no C++ compiler (set CXX, or install g++ or clang++)")


def _processor() -> str:
    """What -march=native depends on: a cache in a shared home must not serve instructions that a machine lacks."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(
        sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    )
