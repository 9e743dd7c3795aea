"""Launch settings of the Triton kernels, as data: configs/*.json, one file per family of GPUs.

There is no `@triton.autotune`: it would time candidates in the middle of a run, give the same run different kernels,
and needs a GPU where the interpreter has none. `python -m qat_kernels.tune` times them when asked and writes a file.

A file names the devices it is for by the first words of their name; the longest match is taken, and default.json, with
one warning, where nothing matches. `settings` holds a list of rules for each kernel. A rule applies to `bits` (absent:
any) and to batches `up_to_m` (absent: any); of those that apply, the smallest `up_to_m` counts, and among equals the
nearest shape `n`, `k` (absent: farthest of all). `routes` says up to which batch a kernel serves an operation before
the next one does.
"""

import json
import math
import warnings
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

CONFIGS = Path(__file__).parent / "configs"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Table:
    """One file of settings. `timed` is false for settings that were chosen by reasoning."""

    path: Path
    devices: tuple[str, ...]
    timed: bool
    routes: dict[str, dict[str, int]]
    settings: dict[str, list[dict[str, Any]]]
    _picked: dict[tuple[str, int, int, int, int], dict[str, int]] = field(default_factory=dict, repr=False)

    def pick(self, kernel: str, *, bits: int, m: int, n: int, k: int) -> dict[str, int]:
        """The settings of a kernel for a weight [n, k] of bits and a batch of m rows; looked up once."""
        asked = (kernel, bits, m, n, k)
        if asked not in self._picked:
            self._picked[asked] = self._search(*asked)
        return self._picked[asked]

    def _search(self, kernel: str, bits: int, m: int, n: int, k: int) -> dict[str, int]:
        rules = [
            rule
            for rule in self.settings[kernel]
            if bits in rule.get("bits", (bits,)) and m <= rule.get("up_to_m", math.inf)
        ]
        if not rules:
            raise ValueError(f"{self.path}: no settings of {kernel} for {bits} bits and {m} rows")
        return min(rules, key=lambda rule: (rule.get("up_to_m", math.inf), _distance(rule, n, k)))["use"]

    def route(self, operation: str, m: int, *, without: str = "") -> str:
        """Which kernel serves an operation at a batch of m rows: the first whose limit is not passed, else "dense"."""
        limits = self.routes[operation].items()
        return next((kernel for kernel, limit in limits if m <= limit and kernel != without), "dense")


def load(path: Path) -> Table:
    """Read a file of settings. ValueError when it is not one."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format_version must be {FORMAT_VERSION}. Got: {data['format_version']}")
        return Table(path, tuple(data["devices"]), data["timed"], data["routes"], data["settings"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a file of kernel settings: {error!r}. Remove it, or tune again") from error


@cache
def table_for(device: torch.device) -> Table:
    """The settings for a device; in the interpreter, which runs on CPU tensors, the default ones."""
    return table_for_name(torch.cuda.get_device_name(device)) if device.type == "cuda" else default()


@cache
def default() -> Table:
    """The settings for GPUs that no file names."""
    return load(CONFIGS / "default.json")


@cache
def table_for_name(name: str) -> Table:
    """The settings for the GPU of this name; warns once for a name that no file has."""
    tables = map(load, sorted(CONFIGS.glob("*.json")))
    matches = {prefix: table for table in tables for prefix in table.devices if _names(prefix, name)}
    if matches:
        return matches[max(matches, key=len)]
    warnings.warn(
        f"no kernel settings for {name}; using safe ones. `python -m qat_kernels.tune` measures it once",
        stacklevel=2,
    )
    return default()


def _names(prefix: str, name: str) -> bool:
    """Whether whole words of a device's name begin with `prefix`: "NVIDIA A10" is no beginning of "NVIDIA A100"."""
    return name.startswith(prefix) and not name[len(prefix) : len(prefix) + 1].isalnum()


def _distance(rule: dict[str, Any], n: int, k: int) -> float:
    if "n" not in rule:
        return math.inf
    return abs(math.log2(rule["n"] / n)) + abs(math.log2(rule["k"] / k))
