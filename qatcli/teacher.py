"""What the end-to-end stage learns of the full-precision model: its distribution of every next token.

    Beside           its logits, computed next to the student whenever they are asked for
    KeptTeacher      the likeliest tokens of each distribution, made before the student is there and read from files

The second needs one block of the model in memory, not all of it. What it does not keep of a distribution counts as one
event, whose probability is kept (`qatcli.losses.Likeliest`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from qatcli.activations import SWEEP_BATCH, StreamBudget, advance_stream, check_range, fill_streams
from qatcli.losses import ROWS, Likeliest
from qatcli.models.blocks import BlockModel
from qatcli.progress import Bar
from qatcli.shards import load_state, save_state
from qatcli.training import autocast

PART = 256  # windows that go through the blocks together: so often all weights are read, so large is the stream
KEPT_BYTES = 6  # of a kept token: its number and its log-probability
Teacher = Callable[[str, Tensor], Tensor | Likeliest]  # of rows of the windows "train" or "validation"


@dataclass(frozen=True)
class Beside:
    """Logits [B, T, V] of the whole model, which stays in memory."""

    model: Any
    windows: Mapping[str, Tensor]
    device: torch.device
    dtype: torch.dtype

    @torch.no_grad()
    def __call__(self, split: str, rows: Tensor) -> Tensor:
        tokens = self.windows[split][rows].to(self.device, torch.long, non_blocking=True)
        with autocast(self.device, self.dtype):
            logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits


@dataclass(frozen=True)
class KeptTeacher:
    """The `top_k` likeliest tokens of every position of `windows` {split: int [S, T]}, in files in `directory`.

    A file holds PART windows, and is what an interrupted `make` continues from.
    """

    directory: Path
    windows: Mapping[str, Tensor]
    top_k: int
    device: torch.device

    def parts(self) -> list[tuple[Path, Tensor]]:
        """Every file with the windows that it is of."""
        return [
            (self._file(split, index), part)
            for split, windows in self.windows.items()
            for index, part in enumerate(windows.split(PART) if len(windows) else ())
        ]

    @torch.no_grad()
    def make(self, model: BlockModel, budget: StreamBudget, dtype: torch.dtype, bar: Bar) -> None:
        """Compute and write the files that are not there yet. `bar` counts the blocks of all parts.

        InputError when a file that is there is damaged, DivergedError when fp16 does not hold the hidden states.
        """
        parts = self.parts()
        missing = [(file, tokens) for file, tokens in parts if not self._is_there(file)]
        bar.advance(len(model) * (len(parts) - len(missing)), reused=True)
        if not missing:
            return
        shape = (max(len(tokens) for _, tokens in missing), missing[0][1].shape[1], model.hidden_size)
        stream = budget.allocate("full-precision", shape, dtype)
        arguments = model.block_arguments(shape[1], self.device, torch.float32)
        for file, tokens in missing:
            hidden = stream[: len(tokens)]
            fill_streams([hidden], model, tokens, self.device, dtype)
            for index, given in enumerate(arguments):
                block = model.load_block(index, self.device, dtype)
                advance_stream(hidden, block, given, batch_size=SWEEP_BATCH, device=self.device)
                del block  # before the next is there
                bar.advance(tokens=tokens.numel())
            check_range(hidden, "the last block")
            found = list(self._likeliest(model, hidden, dtype))
            names = ("tokens", "log_probabilities")
            save_state(
                file, {name: torch.stack(each) for name, each in zip(names, zip(*found, strict=True), strict=True)}
            )

    def __call__(self, split: str, rows: Tensor) -> Likeliest:
        """Those of the windows `rows` int [B], one position of a window behind the other."""
        tokens, log_probabilities = [], []
        for index, place in (divmod(row, PART) for row in rows.tolist()):
            with safe_open(self._file(split, index), framework="pt") as handle:
                tokens.append(handle.get_slice("tokens")[place])
                log_probabilities.append(handle.get_slice("log_probabilities")[place])
        return Likeliest(*(torch.cat(each).to(self.device, non_blocking=True) for each in (tokens, log_probabilities)))

    def _file(self, split: str, index: int) -> Path:
        return self.directory / f"resume.teacher-{split}-{index:05d}.safetensors"

    def _is_there(self, file: Path) -> bool:
        return file.is_file() and bool(load_state(file))

    def _likeliest(self, model: BlockModel, hidden: Tensor, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each window's last hidden states, the likeliest tokens int32 [T, k] and their log-probabilities fp16."""
        with model.head(self.device, dtype) as head:
            for window in hidden:
                with autocast(self.device, dtype):
                    logits = head(window[None].to(self.device))[0]
                count = min(self.top_k, logits.shape[-1])
                best = [F.log_softmax(rows.float(), dim=-1).topk(count) for rows in logits.split(ROWS)]
                tokens, values = (torch.cat([each[at] for each in best]).cpu() for at in (1, 0))
                yield tokens.int(), values.half()
