"""`qat doctor`: what this environment can do, and the fix for everything it cannot.

A finding is `ok`, `note` (works, but slower, smaller or not at all for something optional) or `broken`: no stage can
run, or would compute something wrong. Only `broken` makes the command fail.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table

from qatcli import machine
from qatcli.runlog import wide

GIB = 2**30
OLDEST_PYTHON = (3, 11)
LITTLE_DISK, LITTLE_MEMORY = 10 * GIB, 4 * GIB  # what a small model needs
BRINGS = {
    "eval": "zero-shot tasks",
    "gguf": "models from GGUF files, and their export",
    "gptq": "loading GPTQ, BitBLAS and AWQ exports to prove them",
    "runtimes": "loading compressed-tensors, MLX and GGUF exports to prove them",
    "tracking": "live curves in TensorBoard or Weights & Biases",
    "dev": "tests and linters",
}
_COLUMNS = 64  # of the weight that kernels are tried on
INSTALL_TORCH = "install a CUDA build: https://pytorch.org/get-started/locally"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `fix` is what to do about it, empty when nothing needs doing."""

    area: str
    name: str
    state: Literal["ok", "note", "broken"]
    text: str
    fix: str = ""


def examine() -> dict[str, Any]:
    """Look at everything and print a table on stderr: {findings, broken}, the latter the names that prevent running."""
    findings = [
        finding for look in (_python, _packages, _devices, _kernels, _memory, _caches, _disk) for finding in _safe(look)
    ]
    table = Table(title="qat doctor", title_justify="left")
    for name in ("", "what", "found"):
        table.add_column(name)
    for f in findings:
        table.add_row(f.state, f"{f.area}: {f.name}", f"{f.text}\n-> {f.fix}" if f.fix else f.text)
    broken = [f"{f.area}: {f.name}" for f in findings if f.state == "broken"]
    notes = sum(f.state == "note" for f in findings)
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    wide(console).print(table)
    console.print(_verdict(broken, notes))
    return {"findings": [asdict(finding) for finding in findings], "broken": broken}


def _verdict(broken: list[str], notes: int) -> str:
    """The last line: whether qat runs here."""
    if broken:
        return f"qat does not run here before this is mended: {', '.join(broken)}"
    return f"qat runs here; {notes or 'no'} note{'s' * (notes != 1)} on what is optional, small or slow"


def _safe(look: Callable[[], Iterator[Finding]]) -> list[Finding]:
    """What a look finds; an exception is a finding, too: the others still have to be looked at."""
    found: list[Finding] = []
    try:
        found.extend(look())
    except Exception as error:
        name = look.__name__.strip("_")
        found.append(Finding(name, "examination", "broken", f"{type(error).__name__}: {error}", "report this"))
    return found


def _python() -> Iterator[Finding]:
    new = sys.version_info >= OLDEST_PYTHON
    fix = "" if new else f"use Python {'.'.join(map(str, OLDEST_PYTHON))} or newer"
    text = f"{platform.python_version()} on {platform.machine()} {platform.system()}"
    yield Finding("python", "version", "ok" if new else "broken", text, fix)


def _packages() -> Iterator[Finding]:
    """The declared requirements against what is installed; an extra is as good as its worst package."""
    try:
        declared = [Requirement(text) for text in requires("qatcli") or ()]
        extras = metadata("qatcli").get_all("Provides-Extra") or []
    except PackageNotFoundError:
        yield Finding("packages", "qatcli", "note", "runs from its sources; requirements unknown", "pip install -e .")
        return
    yield Finding("packages", "qatcli", "ok", version("qatcli"))
    core = [item for item in declared if item.marker is None or item.marker.evaluate({"extra": ""})]
    for item in core:
        problem = _unmet(item)
        if problem:
            yield Finding("packages", item.name, "broken", problem, f"pip install '{item.name}{item.specifier}'")
    yield Finding("packages", "core", "ok", ", ".join(f"{i.name} {_version(i.name) or 'absent'}" for i in core))
    for extra in extras:
        own = [item for item in declared if item.marker and item not in core and item.marker.evaluate({"extra": extra})]
        problems = [problem for item in own if (problem := _unmet(item))]
        fix = f"pip install 'qatcli[{extra}]'" if problems else ""
        text = f"{BRINGS.get(extra, ', '.join(item.name for item in own))}: {', '.join(problems) or 'installed'}"
        yield Finding("extras", extra, "note" if problems else "ok", text, fix)


def _unmet(item: Requirement) -> str:
    """Why a requirement is not met; empty when it is."""
    found = _version(item.name)
    if found is None:
        return f"{item.name} is not installed"
    return "" if item.specifier.contains(found, prereleases=True) else f"{item.name} {found} is not {item.specifier}"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _devices() -> Iterator[Finding]:
    import torch

    from qatcli.casting import dtype_name
    from qatcli.training import compute_dtype

    cpu = dtype_name(compute_dtype("auto", torch.device("cpu")))
    text = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads in use, computes in {cpu}"
    yield Finding("devices", "cpu", "ok", text)
    driver = Path("/proc/driver/nvidia/version")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.device("cuda", index)
            properties = torch.cuda.get_device_properties(device)
            text = f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
            text += f"{machine.device_memory(device) / GIB:.1f} of {properties.total_memory / GIB:.1f} GiB free"
            half = compute_dtype("auto", device) == torch.bfloat16
            fix = "" if half else "it computes in float32; a newer GPU is several times faster"
            yield Finding("devices", f"cuda:{index}", "ok" if half else "note", text, fix)
        yield Finding("devices", "CUDA", "ok", f"torch {torch.__version__} for CUDA {torch.version.cuda}")
    elif driver.exists() or shutil.which("nvidia-smi"):
        built = f"is for CUDA {torch.version.cuda}" if torch.version.cuda else "is a CPU build"
        text = f"there is an NVIDIA driver, but torch sees no GPU: torch {torch.__version__} {built}"
        fix = "update the driver, or check CUDA_VISIBLE_DEVICES" if torch.version.cuda else INSTALL_TORCH
        yield Finding("devices", "CUDA", "note", text, fix)
    else:
        fix = "quantize models beyond about a billion parameters on a machine with an NVIDIA GPU"
        yield Finding("devices", "CUDA", "note", "no GPU: every stage runs on the CPU", fix)


def _kernels() -> Iterator[Finding]:
    import torch

    from qat_kernels.dispatch import REFERENCE, backend_for

    wrong = _wrong(torch.device("cpu"))
    fix = "this torch computes wrongly on this CPU: install the versions of constraints.txt" if wrong else ""
    yield Finding("kernels", "reference", "broken" if wrong else "ok", wrong or "packs, unpacks and rounds right", fix)
    yield _compiled()
    if not torch.cuda.is_available():
        yield Finding("kernels", "triton", "ok", f"{_version('triton') or 'not installed'}; used on a GPU only")
        return
    device = torch.device("cuda")
    if backend_for(torch.empty(1, device=device)) is REFERENCE:
        yield Finding("kernels", "triton", "note", "not in use: the GPU runs the slow reference", "pip install triton")
        return
    if shutil.which(os.environ.get("CC", "cc")) is None and shutil.which("gcc") is None:
        yield Finding("kernels", "C compiler", "broken", "Triton needs one to start a kernel", "install gcc, or set CC")
    try:
        wrong = _wrong(device)
    except Exception as error:  # compilers fail in any way there is
        wrong = f"does not compile: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    fix = "set QAT_KERNELS=reference, or install the triton of constraints.txt" if wrong else ""
    yield Finding("kernels", "triton", "broken" if wrong else "ok", wrong or "compiles, equals the reference", fix)
    yield _kernel_settings(torch.cuda.get_device_name(device))


def _compiled() -> Finding:
    """Whether large weights go through compiled C++ on this CPU, and rightly."""
    import torch

    from qat_kernels import cpu, cpu_build
    from qat_kernels.dispatch import CPU, backend_for

    if backend_for(torch.empty(1)) is not CPU:
        return Finding("kernels", "C++", "note", "not in use: QAT_KERNELS is set", "unset it")
    if cpu_build.library() is None:
        text = "not compiled, the log says why: a CPU computes several times slower"
        return Finding("kernels", "C++", "note", text, "install g++ or clang++, or set CXX")
    wrong = _wrong(torch.device("cpu"), rows=-(-cpu.SMALLEST // _COLUMNS))
    fix = "set QAT_KERNELS=reference, or CXX to another compiler" if wrong else ""
    return Finding("kernels", "C++", "broken" if wrong else "ok", wrong or "compiles, equals the reference", fix)


def _kernel_settings(name: str) -> Finding:
    """Whether the kernels' launch settings were timed on this GPU."""
    from qat_kernels import tuning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it would warn of is the finding
        table = tuning.table_for_name(name)
    if table.timed:
        return Finding("kernels", "settings", "ok", f"timed for {', '.join(table.devices)}")
    return Finding("kernels", "settings", "note", f"not timed for {name}", "python -m qat_kernels.tune")


def _wrong(device: Any, *, rows: int = 16) -> str:
    """What the kernels on a device compute otherwise than they should of so many rows; empty when nothing."""
    import torch

    from qat_kernels import dequantize, fake_quant, pack, quantize, unpack

    weight = torch.sin(torch.arange(float(rows * _COLUMNS))).reshape(rows, _COLUMNS)
    scale, zero_point = weight.abs().amax(1, keepdim=True) / 2, torch.full((rows, 1), 1.0)
    for bits in (2, 3, 4, 8):
        shape: dict[str, Any] = {"bits": bits, "group_size": -1}
        step = scale * 4 / 2**bits
        # By hand, in double precision: what every backend has to give.
        level = (weight.double() / step.double()).round().add(1).clamp(0, 2**bits - 1)
        codes = quantize(weight.to(device), step.to(device), zero_point.to(device), **shape).cpu()
        if not torch.equal(codes.double(), level):
            return f"quantize gives other codes at {bits} bits"
        packed = pack(codes.to(device), bits=bits)
        if not torch.equal(unpack(packed, bits=bits, length=_COLUMNS).cpu(), codes):
            return f"pack and unpack lose codes at {bits} bits"
        zero = zero_point.to(device, torch.uint8)
        dense = dequantize(packed, step.to(device), zero, **shape, in_features=_COLUMNS).cpu()
        trained = fake_quant(weight.to(device), step.to(device), zero_point.to(device), **shape).cpu()
        expected = ((level - 1) * step.double()).float()
        if not (torch.allclose(dense, expected, rtol=1e-6) and torch.allclose(trained, expected, rtol=1e-6)):
            return f"weights differ at {bits} bits"
    return ""


def _memory() -> Iterator[Finding]:
    there = machine.host_memory()
    limit = machine.cgroup_memory()
    text = f"{there / GIB:.1f} GiB available"
    if limit is not None:
        text += f", {limit / GIB:.1f} GiB within the control group's limit"
    small = there < LITTLE_MEMORY
    yield Finding(
        "memory", "host", "note" if small else "ok", text, "raise the limit or close programs" if small else ""
    )
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        text = f"address space is limited to {soft / GIB:.1f} GiB, mapped checkpoints included"
        yield Finding("memory", "ulimit -v", "note", text, "ulimit -v unlimited")


def _caches() -> Iterator[Finding]:
    from huggingface_hub import constants

    from qatcli.models.gguf import cache_directory

    triton = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
    named = {"converted models": cache_directory(), "hub": Path(constants.HF_HUB_CACHE), "triton": triton}
    for name, path in named.items():
        variable = {"hub": "HF_HOME", "triton": "TRITON_CACHE_DIR"}.get(name, "XDG_CACHE_HOME")
        yield _writable("caches", name, path, "note", f"set {variable} to a folder that can be written")
    if constants.HF_HUB_OFFLINE:
        yield Finding("caches", "HF_HUB_OFFLINE", "note", "is set: only what is in the cache is found", "unset it")


def _disk() -> Iterator[Finding]:
    found = _writable("disk", "run directories", Path("runs"), "broken", "work in another folder, or give --run")
    if found.state == "ok" and machine.disk_space(Path("runs")) < LITTLE_DISK:
        found = Finding(found.area, found.name, "note", found.text, "free space, or give --run on another disk")
    yield found


def _writable(area: str, name: str, path: Path, otherwise: Literal["note", "broken"], fix: str) -> Finding:
    """Whether files can be made in `path`, and the space there."""
    there = machine.existing(path)
    text = f"{path}, {machine.disk_space(path) / GIB:.1f} GiB free"
    if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
        return Finding(area, name, "ok", text)
    return Finding(area, name, otherwise, f"{text}, but not writable", fix)
