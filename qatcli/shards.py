"""Safetensors shards: streaming writer, index, and the map from tensor name to file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qatcli.errors import InputError, ResourceError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class ShardWriter:
    """Collects tensors and writes a shard whenever `max_shard_bytes` is reached.

    Nothing carries its final name before `close`, so a reader never mistakes a part for the whole.
    """

    def __init__(self, path: Path, *, max_shard_bytes: float = 5e9) -> None:
        self._path = path
        self._max_bytes = max_shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._bytes = 0
        self._written: list[tuple[Path, list[str], int]] = []
        path.mkdir(parents=True, exist_ok=True)

    def add(self, name: str, tensor: Tensor) -> None:
        """Queue one tensor; the same name twice is a bug and raises ValueError."""
        if name in self._pending or any(name in names for _, names, _ in self._written):
            raise ValueError(f"tensor {name} was added twice")
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

    def _flush(self) -> None:
        if not self._pending:
            return
        temporary = self._path / f"shard-{len(self._written)}.tmp"
        save_tensors(temporary, self._pending)
        self._written.append((temporary, list(self._pending), self._bytes))
        self._pending, self._bytes = {}, 0


def save_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    """Write one safetensors file so that it appears complete or not at all. ResourceError when it cannot be written."""
    temporary = file.with_name(file.name + ".writing")
    try:
        save_file(tensors, temporary, metadata={"format": "pt"})
    except SafetensorError as error:  # what it makes of every OSError, a full disk first of all
        raise ResourceError(f"cannot write {file}: {error}", hint="free disk space, or choose another --run") from error
    with open(temporary, "rb") as handle:
        os.fsync(handle.fileno())
    os.replace(temporary, file)


def load_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file. InputError when it is absent or damaged."""
    try:
        with safe_open(file, framework="pt") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} cannot be read: {error}") from error


def write_index(path: Path, weight_map: dict[str, str], total_size: int) -> None:
    """Write the Hugging Face shard index."""
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    (path / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def index_shards(path: Path, files: Iterable[Path]) -> None:
    """Write the index of shards that are already there under their own names."""
    weight_map: dict[str, str] = {}
    total = 0
    for file in files:
        for name, tensor in load_tensors(file).items():
            weight_map[name] = file.name
            total += tensor.numel() * tensor.element_size()
    write_index(path, weight_map, total)


def shard_map(path: Path) -> dict[str, str]:
    """Tensor name -> file name of a model directory, from its index or its single file.

    InputError when neither exists, when a shard is missing, or when a name points outside the directory.
    """
    index = path / INDEX
    if not index.is_file():
        if not (path / SINGLE).is_file():
            raise InputError(f"{path} has neither {INDEX} nor {SINGLE}", hint="only safetensors checkpoints are read")
        return dict.fromkeys(tensor_names(path / SINGLE), SINGLE)
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = set(weight_map.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index} is malformed: {error!r}") from error
    for name in files:
        if not isinstance(name, str) or Path(name).name != name:
            raise InputError(f"{index} points outside its directory: {name!r}")
        if not (path / name).is_file():
            raise InputError(f"{path} is incomplete: {name} is missing", hint="copy or make the checkpoint again")
    return dict(weight_map)


def tensor_names(file: Path) -> list[str]:
    """Names in one safetensors file. InputError when it is damaged."""
    try:
        with safe_open(file, framework="pt") as handle:
            return list(handle.keys())
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is not a readable safetensors file: {error}") from error
