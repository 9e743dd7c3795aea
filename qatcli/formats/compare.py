"""Integer comparison of an export with the checkpoint it was made from: exact equality, no tolerance.

Every tensor of the export is accounted for: quantized linears through the independent readers, all others value for
value against their cast source. Types count, of scales as well: a runtime may load another one and compute otherwise.
An unexpected or missing tensor is a difference, too. So is a config that says of any linear, quantized or not, what is
not so, and any other file that is not its source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qatcli.errors import InputError
from qatcli.formats import source
from qatcli.formats.contract import Verification
from qatcli.formats.model_directory import bias_and_dense, model_config
from qatcli.formats.readback import Triple
from qatcli.inputs import read_json
from qatcli.packed import PackedCheckpoint, companion_files, read_config
from qatcli.shards import load_tensors, shard_map

READER = "qat's independent reader"
AT_A_TIME = 2**20  # values compared together: decoded, or in double precision, a value takes up to 50 bytes


@dataclass(frozen=True)
class TensorFiles:
    """The tensors of a safetensors directory, read one at a time."""

    path: Path
    shards: Mapping[str, str]

    @classmethod
    def open(cls, path: Path) -> TensorFiles:
        """InputError when `path` has no readable safetensors file."""
        return cls(path, shard_map(path))

    def tensor(self, name: str) -> Tensor:
        """One tensor. KeyError when it is not there, InputError when its file is damaged."""
        return load_tensors(self.path / self.shards[name], [name])[name]

    def array(self, name: str) -> NDArray[Any]:
        """One tensor as numpy."""
        return self.tensor(name).numpy()


Settings = dict[str, Any]  # what the export's own config.json says of its quantization, {} when it says nothing
Kind = tuple[int, int]  # bits and group size
ReadLinear = Callable[[Settings, TensorFiles, str], Triple]
Declared = Callable[[Settings, str], Kind | None]


@dataclass
class Tally:
    """Differences found so far, by kind."""

    modules: int = 0
    codes: list[str] = field(default_factory=list)
    zero_points: list[str] = field(default_factory=list)
    scales: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)

    def compare(self, name: str, found: Triple, expected: source.Arrays) -> None:
        """Compare one linear; shapes and types count."""
        self.modules += 1
        for kind, left, right in (
            (self.codes, found.codes, expected.codes),
            (self.zero_points, found.zero_point, expected.zero_point),
            (self.scales, found.scale, expected.scale),
        ):
            if left.dtype != right.dtype:
                kind.append(f"{name}: {left.dtype} instead of {right.dtype}")
            elif left.shape != right.shape:
                kind.append(f"{name}: shape {list(left.shape)} instead of {list(right.shape)}")
            elif not np.array_equal(left, right):
                kind.append(f"{name}: {np.count_nonzero(left != right)} of {right.size} values differ")

    def verification(self, format_name: str, *, notes: Iterable[str] = ()) -> Verification:
        """The result so far."""
        named = (("codes", self.codes), ("zero points", self.zero_points), ("scales", self.scales))
        differences = [f"{kind} of {entry}" for kind, entries in named for entry in entries] + self.others
        return Verification(
            format_name,
            READER,
            self.modules,
            codes_equal=not self.codes,
            zero_points_equal=not self.zero_points,
            scales_equal=not self.scales,
            differences=tuple(differences),
            notes=tuple(notes),
        )


def parts_of(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices of whole rows of a vector or matrix, `AT_A_TIME` values each."""
    rows = max(1, AT_A_TIME // int(np.prod(shape[1:])))
    return (slice(start, start + rows) for start in range(0, shape[0], rows))


def compare_directory(
    checkpoint: PackedCheckpoint,
    out: Path,
    format_name: str,
    read_linear: ReadLinear,
    declared: Declared,
    *,
    suffixes: Iterable[str],
    kinds: Mapping[str, Kind] | None = None,
    expected: Callable[[str], source.Arrays] | None = None,
    dtype: torch.dtype = torch.float16,
    settings_beside: str | None = None,
    settings_key: str = "quantization_config",
) -> Verification:
    """Compare all files of the export `out`, the model card excepted.

    `read_linear` reads one linear with independent code; `declared` is what the export's settings say of a linear, None
    for one that is not quantized, and `kinds` what they should say; `suffixes` are the names its tensors may have;
    `expected` overrides what the linear should be (groups that were expanded); `settings_beside` names a second file
    that repeats the settings; `settings_key` is where in config.json they are.
    """
    expected = expected or (lambda name: source.arrays(checkpoint, name))
    kinds = own_kinds(checkpoint) if kinds is None else kinds
    tally = Tally()
    try:
        files, config = TensorFiles.open(out), read_config(out)
        beside = read_json(out / settings_beside) if settings_beside else None
    except InputError as error:
        tally.others.append(error.message)
        return tally.verification(format_name)
    settings: Settings = config.pop(settings_key, {})
    if beside is not None and beside != settings:
        tally.others.append(f"{settings_beside} differs from the {settings_key} in config.json")
    if config != model_config(checkpoint, dtype):
        tally.others.append("config.json differs from its source")
    tally.others += _companion_differences(checkpoint, out)
    tally.others += _kind_differences(checkpoint, settings, declared, kinds)
    for name in checkpoint.modules:
        try:
            tally.compare(name, read_linear(settings, files, name), expected(name))
        except KeyError as error:
            tally.others.append(f"{name}: {error.args[0]} is missing")
        except (ValueError, TypeError, InputError) as error:  # TypeError: numpy has no bf16
            tally.others.append(f"{name} cannot be read: {error}")
    copies = bias_and_dense(checkpoint, dtype)
    for name, read in copies.items():
        if name not in files.shards:
            tally.others.append(f"tensor {name} is missing")
            continue
        found, wanted = files.tensor(name), read()
        if found.dtype != wanted.dtype:
            tally.others.append(f"tensor {name} is {found.dtype} instead of {wanted.dtype}")
        elif not torch.equal(found, wanted):
            tally.others.append(f"tensor {name} differs from its source")
    known = {f"{name}.{suffix}" for name in checkpoint.modules for suffix in suffixes} | copies.keys()
    tally.others += [f"tensor {name} is unexpected" for name in files.shards if name not in known]
    return tally.verification(format_name)


def own_kinds(checkpoint: PackedCheckpoint) -> dict[str, Kind]:
    """Bits and group size of every quantized linear, as the checkpoint has them."""
    return {name: quant.kind for name, quant in checkpoint.modules.items()}


def _kind_differences(
    checkpoint: PackedCheckpoint, settings: Settings, declared: Declared, kinds: Mapping[str, Kind]
) -> Iterator[str]:
    """Linears of which the export's settings say something else than they should."""
    for name in (*checkpoint.modules, *source.dense_linears(checkpoint)):
        try:
            said = declared(settings, name)
        except (KeyError, TypeError, AttributeError) as error:
            yield f"config.json does not say how {name} is quantized: {error!r}"
            return
        if said != kinds.get(name):
            yield f"config.json says of {name} {_kind(said)}, it is {_kind(kinds.get(name))}"


def _kind(kind: Kind | None) -> str:
    return "not quantized" if kind is None else f"{kind[0]} bits in groups of {kind[1]}"


def _companion_differences(checkpoint: PackedCheckpoint, out: Path) -> Iterator[str]:
    """Tokenizer and other files that are not what lies beside the checkpoint."""
    for file in companion_files(checkpoint.path):
        copy = out / file.name
        if not copy.is_file():
            yield f"file {file.name} is missing"
        elif copy.read_bytes() != file.read_bytes():
            yield f"file {file.name} differs from its source"
