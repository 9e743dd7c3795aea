"""The recipe's `quant` section: the grid, and which linear has which."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Literal

from pydantic import model_validator

from qatcli.recipe.fields import GroupSize, Name, Section

Bits = Literal[2, 3, 4, 8]


class ModuleOverride(Section):
    """Other bits or another group size for some of the linears."""

    pattern: Name
    """Shell pattern on the full module name, for example `*.mlp.down_proj`; a later match wins over an earlier one."""
    bits: Bits | None = None
    """Bits of the matching linears; null keeps `quant.bits`."""
    group_size: GroupSize | None = None
    """Group size of the matching linears, positive or -1; null keeps `quant.group_size`."""

    @model_validator(mode="after")
    def _changes_something(self) -> ModuleOverride:
        if self.bits is None and self.group_size is None:
            raise ValueError("must set bits, group_size or both")
        return self


class QuantSection(Section):
    """The quantization grid: `W = (q - zero_point) * scale`, one scale and zero point per group of inputs."""

    bits: Bits
    """Bits per weight."""
    group_size: GroupSize = 64
    """Consecutive inputs of one output row that share a scale and a zero point: a positive divisor of the inputs, or -1
    for the whole row."""
    zero_points: Literal["any", "central", "middle"] = "any"
    """Zero points that a group may have: any of the grid; the central two, `2^(bits-1) - 1` and `2^(bits-1)`, with
    which 2-bit models fit GGUF's Q2_0 (2.25 bits per weight) exactly; or only the latter, a symmetric grid."""
    init: Literal["minmax", "absmax", "percentile", "entropy", "mse", "weighted"] = "weighted"
    """Search for the first scale and zero point of a group; `weighted` minimises the squared error weighted by the
    second moments of the layer's inputs, `entropy` the divergence between the distributions of a layer's weights."""
    overrides: tuple[ModuleOverride, ...] = ()
    """Exceptions by module name, applied in order."""
    skip: tuple[Name, ...] = ("lm_head",)
    """Shell patterns of linears that stay in full precision. Embeddings and norms always do."""

    def for_module(self, name: str) -> tuple[int, int] | None:
        """`(bits, group_size)` of the linear `name`, or None if it stays in full precision."""
        if any(fnmatchcase(name, pattern) for pattern in self.skip):
            return None
        bits: int = self.bits
        group_size = self.group_size
        for override in self.overrides:
            if fnmatchcase(name, override.pattern):
                bits = bits if override.bits is None else override.bits
                group_size = group_size if override.group_size is None else override.group_size
        return bits, group_size
