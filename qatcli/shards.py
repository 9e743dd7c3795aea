"""Safetensors shards: streaming writer, index, and the map from tensor name to file."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qatcli.errors import InputError, ResourceError
from qatcli.inputs import file_inside, read_json
from qatcli.writing import whole_file

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DIGEST = "sha256"
RESTORE = "restore the file, or make the directory it is in again, a stage with --restart"


class ShardWriter:
    """Collects tensors and writes a shard whenever `max_shard_bytes` is reached.

    Nothing carries its final name before `close`, so a reader never mistakes a part for the whole. With `resume`, the
    shards that a killed writer of the same tensors in the same order finished are kept; their tensors are `kept`.
    """

    def __init__(self, path: Path, *, max_shard_bytes: float = 5e9, resume: bool = False) -> None:
        self.kept: frozenset[str] = frozenset()
        self._path = path
        self._max_bytes = max_shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._bytes = 0
        self._added: set[str] = set()
        self._written: list[tuple[Path, list[str], int]] = []
        path.mkdir(parents=True, exist_ok=True)
        if resume:
            self._keep_finished()

    def add(self, name: str, tensor: Tensor) -> None:
        """Queue one tensor, unless it is kept; the same name twice is a bug and raises ValueError."""
        if name in self._added:
            raise ValueError(f"tensor {name} was added twice")
        self._added.add(name)
        if name in self.kept:
            return
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._bytes + size > self._max_bytes:
            self._flush()
        self._pending[name] = tensor.detach().cpu().contiguous()
        self._bytes += size

    def close(self) -> None:
        """Write what is queued, give the shards their final names and write the index."""
        self._flush()
        count = len(self._written)
        weight_map: dict[str, str] = {}
        for number, (temporary, names, _) in enumerate(self._written, start=1):
            final = SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            os.replace(temporary, self._path / final)
            weight_map.update(dict.fromkeys(names, final))
        if count > 1:
            write_index(self._path, weight_map, sum(size for _, _, size in self._written))

    def _keep_finished(self) -> None:
        """The shards of a killed writer, up to the first that is not there."""
        for file in map(self._temporary, itertools.count()):
            if not file.is_file():
                break
            entries = read_header(file)
            self._written.append((file, list(entries), sum(entry.bytes for entry in entries.values())))
            self.kept |= entries.keys()

    def _temporary(self, number: int) -> Path:
        return self._path / f"shard-{number}.tmp"

    def _flush(self) -> None:
        if not self._pending:
            return
        temporary = self._temporary(len(self._written))
        save_tensors(temporary, self._pending)
        self._written.append((temporary, list(self._pending), self._bytes))
        self._pending, self._bytes = {}, 0


def save_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    """Write one safetensors file so that it appears complete or not at all. ResourceError when it cannot be written."""
    with whole_file(file) as temporary:
        try:
            save_file(tensors, temporary, metadata={"format": "pt"})
        except SafetensorError as error:  # what it makes of every OSError, a full disk first of all
            hint = "free disk space, or choose another --run; the same command continues"
            raise ResourceError(f"cannot write {file}: {error}", hint=hint) from error
        # The library leaves a file that only its owner may read; a server often runs as somebody else.
        temporary.chmod(file.parent.stat().st_mode & 0o666)


def load_tensors(file: Path, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Tensors of one safetensors file, all without `names`. InputError when it is absent, damaged or lacks one."""
    try:
        with safe_open(file, framework="pt") as handle:
            return {name: handle.get_tensor(name) for name in (handle.keys() if names is None else names)}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} cannot be read: {error}", hint=RESTORE) from error


def save_state(file: Path, tensors: dict[str, Tensor]) -> None:
    """As `save_tensors`, their digest with them: for what is read again before a `stage.json` vouches for it."""
    save_tensors(file, {**tensors, DIGEST: _as_tensor(digest(tensors))})


def load_state(file: Path) -> dict[str, Tensor]:
    """What `save_state` wrote. InputError when it is absent or damaged."""
    tensors = load_tensors(file)
    expected = tensors.pop(DIGEST, None)
    if expected is None or not torch.equal(expected, _as_tensor(digest(tensors))):
        raise InputError(f"{file} is damaged: its tensors are not those that were written", hint=RESTORE)
    return tensors


def digest(tensors: dict[str, Tensor]) -> str:
    """sha256 over names and values."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _as_tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def write_index(path: Path, weight_map: dict[str, str], total_size: int) -> None:
    """Write the Hugging Face shard index."""
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    (path / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def index_shards(path: Path, files: Iterable[Path]) -> None:
    """Write the index of shards that are already there under their own names."""
    weight_map: dict[str, str] = {}
    total = 0
    for file in files:
        for name, entry in read_header(file).items():
            weight_map[name] = file.name
            total += entry.bytes
    write_index(path, weight_map, total)


def shard_map(path: Path) -> dict[str, str]:
    """Tensor name -> file name of a model directory, from its index or its single file.

    InputError when neither exists, when a shard is missing, or when a name points outside the directory.
    """
    index = path / INDEX
    if not index.is_file():
        if not (path / SINGLE).is_file():
            raise InputError(f"{path} has neither {INDEX} nor {SINGLE}", hint="only safetensors checkpoints are read")
        return dict.fromkeys(sorted(read_header(file_inside(path, SINGLE))), SINGLE)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(
            f"{index} is malformed: weight_map does not say which file holds which tensor",
            hint="copy or make the checkpoint again",
        )
    for name in set(weight_map.values()):
        if Path(name).name != name:
            raise InputError(f"{index} points outside its directory: {name!r}", hint="do not use this checkpoint")
        file_inside(path, name)
    return weight_map


@dataclass(frozen=True)
class TensorEntry:
    """What a safetensors header says of one tensor: type ("F16"), shape, and first and last + 1 byte in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def bytes(self) -> int:
        return self.end - self.begin


def read_header(file: Path) -> dict[str, TensorEntry]:
    """Tensor name -> entry of one safetensors file, without its data. InputError when it is absent or damaged."""
    try:
        with safe_open(file, framework="pt"):
            pass  # the library checks lengths, types and that the tensors fill the file without gap or overlap
        with open(file, "rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            header = json.loads(handle.read(length))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{file} is not a readable safetensors file: {error}", hint="copy or make the checkpoint again"
        ) from error
    header.pop("__metadata__", None)
    start = 8 + length
    return {
        name: TensorEntry(entry["dtype"], tuple(entry["shape"]), *(start + at for at in entry["data_offsets"]))
        for name, entry in header.items()
    }
