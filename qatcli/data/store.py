"""Token windows in a stage's directory: sampled once, read by whatever trains on them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qatcli.data.windows import WindowSet
from qatcli.directory import write_json
from qatcli.shards import load_state, save_state

FILE = "windows.safetensors"


@dataclass(frozen=True)
class Windows:
    """tokens int32 [S, T]; mask bool [S, T], true where a token is a training target."""

    tokens: Tensor
    mask: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: Tensor) -> Windows:
        return Windows(self.tokens[rows], self.mask[rows])

    @property
    def targets(self) -> int:
        """Predictions that count: the first token of a window is never predicted."""
        return int(self.mask[:, 1:].sum())


def save_windows(directory: Path, windows: WindowSet) -> None:
    """Write both splits to `windows.safetensors`, and where they come from to `data.json`."""
    splits = {
        "train": (windows.train, windows.loss_mask_train),
        "validation": (windows.validation, windows.loss_mask_validation),
    }
    tensors = {}
    for name, (tokens, mask) in splits.items():
        tensors[name] = tokens
        tensors[f"{name}_mask"] = torch.ones(tokens.shape, dtype=torch.bool) if mask is None else mask
    write_json(directory / "data.json", {"digest": windows.digest, **windows.stats})
    save_state(directory / FILE, tensors)


def load_windows(directory: Path) -> tuple[Windows, Windows]:
    """Training and validation windows. InputError when the file is absent or damaged."""
    tensors = load_state(directory / FILE)
    train, validation = (Windows(tensors[name], tensors[f"{name}_mask"]) for name in ("train", "validation"))
    return train, validation
