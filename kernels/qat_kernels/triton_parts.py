"""Sums of parts that several programs have made of one result, in a fixed order: what atomics cannot promise."""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 256


def make_parts(out: Tensor, splits: int) -> Tensor:
    """Memory for the parts: out itself if there is one part, else fp32 [splits, *out.shape]."""
    if splits == 1:
        return out
    return torch.empty(splits, *out.shape, dtype=torch.float32, device=out.device)


def add_parts(parts: Tensor, out: Tensor) -> Tensor:
    """Add the parts of `make_parts` into out, in fp32 from the first to the last, and return it."""
    if parts is not out:
        with torch.cuda.device_of(out):
            _add_parts_kernel[(triton.cdiv(out.numel(), TILE),)](
                out, parts, out.numel(), SPLITS=parts.shape[0], TILE=TILE, enable_fp_fusion=True
            )
    return out


@triton.jit
def _add_parts_kernel(out_ptr, parts_ptr, length, SPLITS: tl.constexpr, TILE: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = place < length
    part_ptr = parts_ptr + place
    total = tl.zeros((TILE,), dtype=tl.float32)
    for _ in tl.static_range(SPLITS):
        total += tl.load(part_ptr, mask=mask, other=0.0)
        part_ptr += length
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=mask)
