"""Activation streams: hidden states [samples, seq_len, hidden] in memory, or in a memory-mapped file beyond a budget.

Block-AP keeps two streams (full-precision targets, quantized inputs). For the paper's budget at hidden size 4096
each takes 64 GiB, so where they live is decided here and nowhere else: a stream is an ordinary tensor either way.
"""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from qatcli.errors import ResourceError
from qatcli.models.blocks import BlockModel, run_block
from qatcli.training import autocast


@dataclass
class StreamBudget:
    """Host memory that activation streams may take, and where the files of the others go."""

    bytes_left: int
    directory: Path

    def allocate(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialized tensor; memory-mapped in `directory` when the budget does not hold it.

        ResourceError when the disk does not hold it either.
        """
        elements = math.prod(shape)
        size = elements * dtype.itemsize
        if size <= self.bytes_left:
            self.bytes_left -= size
            return torch.empty(shape, dtype=dtype)
        self.directory.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.directory).free
        if size > free:
            raise ResourceError(
                f"activations need {size / 2**30:.1f} GiB: more than block_ap.cache.host_gb leaves "
                f"({self.bytes_left / 2**30:.1f} GiB) and than {self.directory} has free ({free / 2**30:.1f} GiB)",
                hint="set block_ap.cache.dir to a larger disk, raise block_ap.cache.host_gb, or use fewer samples",
            )
        file = self.directory / f"{os.getpid()}-{name}.activations"
        try:
            with open(file, "wb") as handle:  # reserved now: a full disk met through a mapping is a fatal signal
                os.posix_fallocate(handle.fileno(), 0, size)
            return torch.from_file(str(file), shared=True, size=elements, dtype=dtype).view(shape)
        finally:
            file.unlink(missing_ok=True)  # the mapping keeps it; nothing is left behind however the process ends


def stream_budget(host_gb: float | None, directory: Path) -> StreamBudget:
    """A budget of `host_gb` GiB; None takes half of the memory that is available now."""
    available = psutil.virtual_memory().available // 2
    return StreamBudget(available if host_gb is None else int(host_gb * 2**30), directory)


@torch.no_grad()
def fill_stream(stream: Tensor, model: BlockModel, windows: Tensor, device: torch.device, dtype: torch.dtype) -> None:
    """Write what the first block receives for `windows` int [S, T] into `stream` [S, T, H]."""
    for index, hidden in enumerate(model.first_inputs(windows, device, torch.float32)):
        stream[index] = hidden[0].to(dtype)


@torch.no_grad()
def advance_stream(
    stream: Tensor, block: nn.Module, arguments: dict[str, Any], *, batch_size: int, device: torch.device
) -> None:
    """Replace the hidden states in `stream` by the block's outputs, in place. bf16 streams run under autocast."""
    for start in range(0, len(stream), batch_size):
        batch = stream[start : start + batch_size]
        with autocast(device, stream.dtype):
            output = run_block(block, batch.to(device), arguments)
        batch.copy_(output)
