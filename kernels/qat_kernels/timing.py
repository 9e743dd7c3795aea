"""Times of kernels that are shorter than their launch.

On a GPU the calls are captured in one CUDA graph and the graph is timed with events: what remains is what the device
does. Weights that fit in the L2 cache would be read from there by the second call; give `seconds` one call for each of
`copies` weights, so that each is read from memory as in a model. On a CPU the calls are simply repeated.
"""

import statistics
import time
from collections.abc import Callable, Sequence

import torch

Call = Callable[[], object]

REPLAYS = 15
MOST_COPIES = 32
LEAST_SECONDS = 0.1


def copies(device: torch.device, size: int) -> int:
    """How many tensors of size bytes exceed the device's L2 cache four times; 1 on a CPU."""
    if device.type != "cuda":
        return 1
    return min(MOST_COPIES, max(1, -(-4 * torch.cuda.get_device_properties(device).L2_cache_size // size)))


def seconds(device: torch.device, calls: Sequence[Call], *, repeats: int = REPLAYS) -> float:
    """Seconds of one call: the median of graph replays on a GPU, the shortest on a CPU."""
    return (_graph_times if device.type == "cuda" else _wall_times)(calls, repeats)


def _graph_times(calls: Sequence[Call], repeats: int) -> float:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:  # compiles kernels and fills cuBLAS's workspace, which a capture must not
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # what earlier graphs and streams had for themselves, which a capture cannot take
    with torch.cuda.stream(stream):
        graph.capture_begin()  # `torch.cuda.graph` would collect garbage first: a quarter of a second each time
        try:
            for call in calls:
                call()
        finally:
            graph.capture_end()
    for _ in range(3):
        graph.replay()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for before, after in events:
        before.record()
        graph.replay()
        after.record()
    torch.cuda.synchronize()
    return statistics.median(before.elapsed_time(after) for before, after in events) * 1e-3 / len(calls)


def _wall_times(calls: Sequence[Call], repeats: int) -> float:
    """The shortest of at least `repeats` times and LEAST_SECONDS: other processes only add to it."""
    best, count, end = float("inf"), 0, time.perf_counter() + LEAST_SECONDS
    for call in calls:
        call()
    while count < repeats or time.perf_counter() < end:
        start = time.perf_counter()
        for call in calls:
            call()
        best, count = min(best, (time.perf_counter() - start) / len(calls)), count + 1
    return best
