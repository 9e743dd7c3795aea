"""Activation streams: hidden states [samples, seq_len, hidden] on the device, in host memory, or in mapped files.

Block-AP keeps a stream of inputs and one or two of targets. For the paper's budget at hidden size 4096 each takes
64 GiB, so where they live is decided here and nowhere else: a stream is an ordinary tensor either way.

    for inputs, targets in read_batches((student, target), batches, device): ...      # rows, ahead of their use
    with write_back(stream, device) as write: write(start, hidden)                    # rows, behind their making

Next to a GPU the copies run on streams of their own, from and to pinned memory, and a thread moves what is in files:
neither direction makes the device wait. Only bytes are moved, so results do not depend on the place.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qatcli import machine
from qatcli.casting import all_finite
from qatcli.errors import DivergedError, ResourceError
from qatcli.models.blocks import BlockModel, run_block
from qatcli.recipe.schema import CacheSection
from qatcli.training import autocast

SWEEP_BATCH = 4  # windows per pass of a sweep whose batch size no recipe key sets
AHEAD = 2  # batches on their way to the device, or back, while one is computed
Place = Literal["device", "host", "file"]


@dataclass
class StreamBudget:
    """Bytes that activation streams may take on `device` and in host memory; the others become files in `directory`."""

    device: torch.device
    device_bytes: int
    host_bytes: int
    directory: Path

    def place(self, size: int) -> Place:
        """Where the next stream, of `size` bytes, goes; its bytes leave the budget."""
        if size <= self.device_bytes:
            self.device_bytes -= size
            return "device"
        if size <= self.host_bytes:
            self.host_bytes -= size
            return "host"
        return "file"

    def allocate(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialized tensor in the first place that holds it. ResourceError when the disk does not either."""
        size = math.prod(shape) * dtype.itemsize
        place = self.place(size)
        if place == "device":
            return torch.empty(shape, dtype=dtype, device=self.device)
        if place == "host":
            return torch.empty(shape, dtype=dtype) if self.device.type == "cpu" else _pinned(shape, dtype, self.device)
        return self._map_file(name, shape, dtype, size)

    def _map_file(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, size: int) -> Tensor:
        self.directory.mkdir(parents=True, exist_ok=True)
        free = machine.disk_space(self.directory)
        if size > free:
            raise ResourceError(
                f"activations need {size / 2**30:.1f} GiB: more than block_ap.cache.host_gb leaves "
                f"({self.host_bytes / 2**30:.1f} GiB) and than {self.directory} has free ({free / 2**30:.1f} GiB)",
                hint="set block_ap.cache.dir to a larger disk, raise block_ap.cache.host_gb, or use fewer samples",
            )
        file = self.directory / f"{os.getpid()}-{name}.activations"
        try:
            with open(file, "wb") as handle:  # reserved now: a full disk met through a mapping is a fatal signal
                os.posix_fallocate(handle.fileno(), 0, size)
            return torch.from_file(str(file), shared=True, size=math.prod(shape), dtype=dtype).view(shape)
        finally:
            file.unlink(missing_ok=True)  # the mapping keeps it; nothing is left behind however the process ends


def stream_budget(device: torch.device, cache: CacheSection, directory: Path) -> StreamBudget:
    """What a recipe allows; where it says nothing half of the memory that is free now, of the device and of the host,
    and files in `directory`.

    On a CPU the host's memory is the device's, and `cache.device_gb` has no meaning.
    """
    on_device = 0
    if device.type != "cpu":
        on_device = machine.device_memory(device) // 2 if cache.device_gb is None else int(cache.device_gb * 2**30)
    in_host = machine.host_memory() // 2 if cache.host_gb is None else int(cache.host_gb * 2**30)
    return StreamBudget(device, on_device, in_host, Path(cache.dir or directory))


def read_batches(
    streams: Sequence[Tensor], batches: Iterable[Tensor], device: torch.device
) -> Iterator[tuple[Tensor, ...]]:
    """For each int [B] of `batches`, these rows of every stream [B, T, H] on `device`: new tensors, in that order."""
    if all(_near(stream, device) for stream in streams):
        for rows in batches:
            yield tuple(_gather(stream, rows) for stream in streams)
        return
    side = _side_stream(device)
    with ThreadPoolExecutor(1, "qat-read") as reader:
        waiting: deque[Future[tuple[tuple[Tensor, ...], Any]]] = deque()
        left = iter(batches)
        try:
            while True:
                while len(waiting) < AHEAD and (batch := next(left, None)) is not None:
                    waiting.append(reader.submit(_load, streams, batch, device, side))
                if not waiting:
                    return
                tensors, loaded = waiting.popleft().result()
                if loaded is not None:
                    current = torch.cuda.current_stream(device)
                    current.wait_event(loaded)
                    for tensor in tensors:
                        tensor.record_stream(current)
                yield tensors
        finally:
            for future in waiting:
                future.cancel()


def in_order(count: int, batch_size: int) -> tuple[Tensor, ...]:
    """The rows 0..count-1 in batches, for `read_batches`."""
    return torch.arange(count).split(batch_size) if count else ()


@contextmanager
def write_back(stream: Tensor, device: torch.device) -> Iterator[Callable[[int, Tensor], None]]:
    """A function (start, values [B, T, H] on `device`) that puts rows into `stream`; all are there on leaving."""
    if _near(stream, device):

        def put(start: int, values: Tensor) -> None:
            stream[start : start + len(values)] = values

        yield put
        return
    side = _side_stream(device)
    pinned = device.type != "cpu" and stream.is_pinned()
    with ThreadPoolExecutor(1, "qat-write") as writer:
        pending: deque[Future[None]] = deque()

        def write(start: int, values: Tensor) -> None:
            rows = stream[start : start + len(values)]
            staged, done = values.to(stream.dtype), None
            if side is not None:
                side.wait_stream(torch.cuda.current_stream(device))
                with torch.cuda.stream(side):
                    made = staged
                    staged = rows if pinned else torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
                    staged.copy_(made, non_blocking=True)
                    made.record_stream(side)
                    done = side.record_event(torch.cuda.Event(blocking=True))
            pending.append(writer.submit(_store, rows, staged, done))
            if len(pending) > AHEAD:
                pending.popleft().result()

        yield write
        for future in pending:
            future.result()


@torch.no_grad()
def fill_streams(
    streams: Sequence[Tensor], model: BlockModel, windows: Tensor, device: torch.device, dtype: torch.dtype
) -> None:
    """Write what the first block receives for `windows` int [S, T] into each of `streams` [S, T, H]."""
    with ExitStack() as stack:
        writers = [stack.enter_context(write_back(stream, device)) for stream in streams]
        for index, hidden in enumerate(each.to(dtype) for each in model.first_inputs(windows, device, torch.float32)):
            for write in writers:
                write(index, hidden)


@torch.no_grad()
def advance_stream(
    stream: Tensor,
    block: nn.Module,
    arguments: dict[str, Any],
    *,
    batch_size: int,
    device: torch.device,
    into: Tensor | None = None,
) -> None:
    """Write the block's outputs for the hidden states in `stream` to `into`, by default in their place.

    bf16 streams run under autocast.
    """
    batches = in_order(len(stream), batch_size)
    with write_back(stream if into is None else into, device) as write:
        for rows, (hidden,) in zip(batches, read_batches([stream], batches, device), strict=True):
            with autocast(device, stream.dtype):
                output = run_block(block, hidden, arguments)
            write(int(rows[0]), output)


def check_range(stream: Tensor, name: str) -> None:
    """DivergedError when a full-precision block's outputs are not finite, in fp16 for leaving its range, which nothing
    later would mend. A token may do that alone; weights that are not finite spoil the first window like all others."""
    half = stream.dtype == torch.float16
    if not all_finite(stream if half else stream[:1]):
        raise DivergedError(
            f"{name} of the full-precision model has outputs {'beyond float16' if half else 'that are not finite'}",
            hint="set block_ap.amp to bfloat16, or to float32 where the device has no bfloat16"
            if half
            else "check the model's files: `qat eval` measures it as it is",
        )


def _near(stream: Tensor, device: torch.device) -> bool:
    """Whether the device computes on the stream's memory as it is."""
    return stream.device.type == device.type and not _in_file(stream)


def _in_file(stream: Tensor) -> bool:
    return stream.device.type == "cpu" and stream.untyped_storage().filename is not None


def _gather(stream: Tensor, rows: Tensor) -> Tensor:
    """Rows of a stream in new memory. Not by an index tensor, which a GPU would have to wait for."""
    return torch.stack([stream[row] for row in rows.tolist()])


def _load(streams: Sequence[Tensor], rows: Tensor, device: torch.device, side: Any) -> tuple[tuple[Tensor, ...], Any]:
    """The reader's task: rows of every stream on the device, and the event after which they are there."""
    with nullcontext() if side is None else torch.cuda.stream(side):
        tensors = tuple(_fetch(stream, rows, device) for stream in streams)
        return tensors, None if side is None else side.record_event()


def _fetch(stream: Tensor, rows: Tensor, device: torch.device) -> Tensor:
    if _near(stream, device):
        return _gather(stream, rows)
    shape = (len(rows), *stream.shape[1:])
    if stream.is_pinned():
        batch = torch.empty(shape, dtype=stream.dtype, device=device)
    else:
        batch = torch.empty(shape, dtype=stream.dtype, pin_memory=device.type != "cpu")
    for place, row in zip(batch, rows.tolist(), strict=True):
        place.copy_(stream[row], non_blocking=True)
        _forget(stream[row])
    return batch.to(device, non_blocking=True)


def _store(rows: Tensor, staged: Tensor, done: Any) -> None:
    """The writer's task: wait until the device's copy is complete, then put it where it belongs."""
    if done is not None:
        done.synchronize()
    if staged is not rows:
        rows.copy_(staged)
        _forget(rows)


def _side_stream(device: torch.device) -> Any:
    """A CUDA stream for copies that starts where the current one is; None on a CPU."""
    if device.type == "cpu":
        return None
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    return side


def _forget(rows: Tensor) -> None:
    """Unmap the pages of a file's rows, which stay in the page cache: the process's memory does not grow with the file.

    Only ever on a shared mapping, where this loses nothing.
    """
    if not _in_file(rows):
        return
    start = rows.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    length = rows.data_ptr() + rows.numel() * rows.element_size() - start
    ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_DONTNEED)


class _PinnedMemory(mmap.mmap):
    """Anonymous memory that the CUDA driver has pinned. torch's own pinned memory is rounded up to a power of two."""

    address = 0

    def __del__(self) -> None:
        if self.address:
            torch.cuda.cudart().cudaHostUnregister(self.address)


def _pinned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialized host memory, pinned where the driver allows it; where not, copies take one step more."""
    size = math.prod(shape) * dtype.itemsize
    memory = _PinnedMemory(-1, size)
    stream = torch.frombuffer(memory, dtype=dtype).view(shape)
    if int(torch.cuda.cudart().cudaHostRegister(stream.data_ptr(), size, 1)) == 0:  # 1: in every CUDA context
        memory.address = stream.data_ptr()
    else:
        with suppress(RuntimeError):  # CUDA keeps the error for the next launch that asks: this one
            torch.ones(1, device=device)
    return stream
