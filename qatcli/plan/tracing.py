"""How much memory one pass of a block takes, found by running it on tensors without data.

The block is the model's own and so are the operations: torch's fake tensors go through the very kernels' shapes and
autograd graph, so no family of models needs formulas of ours. Only the quantized linears stand here once more, with
`qat_kernels`' autograd functions over a backend that returns shapes: the reference walks over row blocks, which costs
a fake operation each.
Left out: the scratch memory inside of kernels and of the allocator, which is small beside what is counted.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from qat_kernels.autograd import FakeQuant, QuantizedMatmul
from qat_kernels.dispatch import REFERENCE
from qatcli.errors import QatError
from qatcli.models.blocks import run_block
from qatcli.packed import ModuleQuant
from qatcli.training import active_dtype, autocast

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Passes:
    """Bytes beside the parameters and the hidden states that go in.

    forward   peak of a pass without gradients
    kept      what a pass with gradients keeps for its backward pass
    training  peak of both, the gradients of the parameters included
    """

    forward: int
    kept: int
    training: int


class UntraceableError(QatError):
    """A block whose operations cannot all run on tensors without data: what it takes cannot be predicted."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors made while it is active: `now`, and `peak` since it was last set."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_iter(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self._known:
                    self._known.add(key)
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._freed, key, size)
        return result

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


@contextmanager
def without_data() -> Iterator[LiveBytes]:
    """Tensors made inside have shapes and no memory. UntraceableError for whatever torch raises about that."""
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # it writes down what it raises
    try:
        with torch.random.fork_rng(devices=[]), FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live:
            yield live
    except QatError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UntraceableError(
            f"a block of this model does not run without data: {reason}",
            hint="memory cannot be predicted for it; the stages run nevertheless",
        ) from error


def trace(
    live: LiveBytes,
    block: nn.Module,
    arguments: dict[str, Any],
    *,
    shape: tuple[int, int, int],
    stream_dtype: torch.dtype,
    dtype: torch.dtype,
) -> Passes:
    """Passes of a block on hidden states `shape` [B, T, H] of `stream_dtype`, computing in `dtype`."""

    def run(hidden: Tensor) -> Tensor:
        with autocast(CPU, dtype):
            return run_block(block, hidden, arguments)

    hidden = torch.empty(shape, dtype=stream_dtype)
    before = live.peak = live.now
    with torch.no_grad():
        output = run(hidden)
    forward = live.peak - before
    del output
    hidden.requires_grad_(stream_dtype == torch.float32)  # a stream on its way through a whole model
    live.peak = live.now
    output = run(hidden)
    kept = live.now - before
    if output.requires_grad:
        (output.float() - hidden.detach()).square().mean().backward()
    return Passes(forward, kept, live.peak - before)


class TracedFakeQuantLinear(nn.Module):
    """The parameters and the graph of `FakeQuantLinear`."""

    def __init__(self, linear: nn.Linear, quant: ModuleQuant) -> None:
        super().__init__()
        groups = (quant.out_features, quant.groups)
        self.weight = nn.Parameter(torch.empty(quant.out_features, quant.in_features))
        self.scale, self.zero_point = (nn.Parameter(torch.empty(groups)) for _ in range(2))
        self.bias, self.quant = linear.bias, quant

    def forward(self, x: Tensor) -> Tensor:
        quant, grid, dtype = self.quant, (self.scale, self.zero_point), active_dtype(self.weight)
        return F.linear(x, FakeQuant.apply(self.weight, *grid, quant.bits, quant.group_size, dtype, SHAPES), self.bias)


class TracedPackedLinear(nn.Module):
    """The parameters and the graph of `PackedLinear`, its unpacked zero points included."""

    def __init__(self, linear: nn.Linear, quant: ModuleQuant) -> None:
        super().__init__()
        groups = (quant.out_features, quant.groups)
        self.packed = torch.empty(quant.out_features, -(-quant.in_features * quant.bits // 32), dtype=torch.int32)
        self.zero_point = torch.empty(groups, dtype=torch.uint8)
        self.scale = nn.Parameter(torch.empty(groups))
        self.bias, self.quant = linear.bias, quant

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(active_dtype(x))
        grid = (self.packed, self.scale, self.zero_point)
        x_MK = x.reshape(-1, x.shape[-1])
        y: Tensor = QuantizedMatmul.apply(x_MK, *grid, self.quant.bits, self.quant.group_size, SHAPES)
        y = y.view(*x.shape[:-1], y.shape[1])
        return y if self.bias is None else y + self.bias.to(y.dtype)


LINEARS: dict[str, Callable[[nn.Linear, ModuleQuant], nn.Module]] = {
    "fake_quant": TracedFakeQuantLinear,
    "packed": TracedPackedLinear,
}


def _matrix(packed: Tensor, *_: Tensor, in_features: int, dtype: torch.dtype, **_shape: int) -> Tensor:
    return torch.empty(packed.shape[0], in_features, dtype=dtype)


def _times_weight(x: Tensor, packed: Tensor, *_: Tensor, **_shape: int) -> Tensor:
    return F.linear(x, _matrix(packed, in_features=x.shape[1], dtype=x.dtype))


def _input_grad(grad_out: Tensor, packed: Tensor, *_: Tensor, in_features: int, **_shape: int) -> Tensor:
    return grad_out @ _matrix(packed, in_features=in_features, dtype=grad_out.dtype)


# What no pass of a block calls stays the reference.
SHAPES = replace(
    REFERENCE,
    fake_quant=lambda weight, *_, out_dtype, **_shape: torch.empty_like(weight, dtype=out_dtype),
    fake_quant_backward=lambda _, *inputs, **_shape: tuple(torch.empty_like(tensor) for tensor in inputs),
    quantized_matmul=_times_weight,
    input_grad=_input_grad,
    scale_grad=lambda _grad, _x, _packed, zero_point, **_shape: torch.empty_like(zero_point, dtype=torch.float32),
)
