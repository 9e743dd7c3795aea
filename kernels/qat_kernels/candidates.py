"""Launch settings worth timing, pruned by shape: what `qat_kernels.tune` tries."""

from collections.abc import Iterator
from itertools import product

Settings = dict[str, int]


def candidates(kernel: str, *, bits: int, m: int, n: int, k: int) -> list[Settings]:
    """Settings of a kernel for a weight [n, k] and a batch of m rows, at least one."""
    makers = {
        "gemv": _gemv,
        "matmul": _matmul,
        "input_grad": _input_grad,
        "scale_grad": _scale_grad,
        "fake_quant": _elementwise,
        "fake_quant_backward": _elementwise,
    }
    return list(makers[kernel](bits, m, n, k))


def _elementwise(bits: int, m: int, n: int, k: int) -> Iterator[Settings]:
    for elements, warps in product((1024, 2048, 4096), (2, 4, 8)):
        if 8 <= elements // (32 * warps) <= 32:  # values per thread
            yield {"elements": elements, "num_warps": warps}


def _gemv(bits: int, m: int, n: int, k: int) -> Iterator[Settings]:
    """Eight accumulators for each row of W and of x must fit in registers, and every program needs columns to read."""
    batch = 1 << (min(m, 4) - 1).bit_length()
    for rows, splits, warps in product((1, 2, 4, 8), (1, 2, 4), (1, 2)):
        fits = 2 <= rows * batch <= 8 and splits * warps * 2048 <= max(k, 2048)
        fills = n // rows * splits * warps >= min(1024, n // 4)  # warps for the device
        if fits and fills:
            yield {"rows": rows, "batch": batch, "splits": splits, "num_warps": warps}


def _matmul(bits: int, m: int, n: int, k: int) -> Iterator[Settings]:
    """Few rows: long steps, and splits until there is work for every multiprocessor. Many: large tiles."""
    if m <= 16:
        for block_n, block_k, splits in product((32, 64), (64, 128), (1, 2, 4, 8)):
            if splits == 1 or n // block_n * splits <= 1024:
                yield _tile(16, block_n, block_k, 4, 3) | {"splits": splits}
    else:
        for block_m, block_n, warps in ((32, 64, 4), (64, 64, 4), (64, 128, 8), (128, 64, 8), (128, 128, 8)):
            if block_m < 2 * m:
                for stages, splits in product((2, 3), (1, 2) if m <= 64 else (1,)):
                    yield _tile(block_m, block_n, 64, warps, stages) | {"splits": splits}


def _input_grad(bits: int, m: int, n: int, k: int) -> Iterator[Settings]:
    for block_m, block_n, block_k, warps in ((16, 32, 64, 4), (64, 32, 64, 4), (64, 32, 128, 8), (128, 32, 128, 8)):
        if block_m < 2 * max(m, 16):
            for stages in (2, 3):
                yield _tile(block_m, block_n, block_k, warps, stages)


def _scale_grad(bits: int, m: int, n: int, k: int) -> Iterator[Settings]:
    for block_n, block_k, warps in ((64, 64, 4), (64, 128, 8), (128, 64, 8), (128, 128, 8)):
        for block_m, stages in ((32, 3), (64, 2), (64, 3)):
            yield _tile(block_m, block_n, block_k, warps, stages)


def _tile(block_m: int, block_n: int, block_k: int, num_warps: int, num_stages: int) -> Settings:
    names = ("block_m", "block_n", "block_k", "num_warps", "num_stages")
    return dict(zip(names, (block_m, block_n, block_k, num_warps, num_stages), strict=True))
