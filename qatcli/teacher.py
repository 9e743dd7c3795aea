"""What the end-to-end stage learns of the full-precision model: its distribution of every next token.

Made before the student is there, block by block, so that no more than one block of the model is ever in memory; kept
in files, a few weighted tokens of each distribution. Half of them are the likeliest, with their probabilities; the
others are drawn from the rest, as likely as they are, and share its probability. So the expected gradient is that of
the whole distribution: 64 tokens teach as well as all do, where the 64 likeliest with the rest as one event taught a
2-bit model less (LOG.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from qatcli.casting import all_finite
from qatcli.errors import DivergedError
from qatcli.losses import ROWS, TINY, SparseTarget
from qatcli.progress import Bar
from qatcli.shards import load_state, save_state
from qatcli.streaming import PART, StreamedModel

KEPT_BYTES, ENTROPY_BYTES = 6, 4  # of a kept token, its number and its weight; of each position


@dataclass(frozen=True)
class Teacher:
    """`kept` tokens of every position's distribution in `windows` {split: int [S, T]}, in files in `directory`.

    A file holds PART windows, and is what an interrupted `make` continues from. Distributions are over the first
    `vocabulary` tokens, which the student knows: some tools pad the vocabulary of their checkpoints.
    """

    directory: Path
    windows: Mapping[str, Tensor]
    vocabulary: int
    kept: int
    seed: int
    device: torch.device

    def parts(self) -> list[tuple[Path, Tensor]]:
        """Every file with the windows that it is of."""
        return [
            (self._file(split, index), part)
            for split, windows in self.windows.items()
            for index, part in enumerate(windows.split(PART) if len(windows) else ())
        ]

    def make(self, model: StreamedModel, dtype: torch.dtype, bar: Bar) -> None:
        """Compute and write the files that are not there yet. `bar` counts the steps of all windows.

        InputError when a file that is there is damaged, DivergedError when the logits are not finite.
        """
        for part, (file, windows) in enumerate(self.parts()):
            if file.is_file():
                load_state(file)  # which compares its digest
                bar.advance(model.steps(windows), reused=True)
            else:
                generator = torch.Generator(self.device).manual_seed(self.seed * 1_000_003 + part)
                save_state(file, self._distributions(windows, model.logits(windows, dtype, bar), generator))

    def __call__(self, split: str, rows: Tensor) -> SparseTarget:
        """Those of the windows `rows` int [B], one position of a window behind the other."""
        found = []
        for index, place in (divmod(row, PART) for row in rows.tolist()):
            with safe_open(self._file(split, index), framework="pt") as handle:
                found.append([handle.get_slice(field.name)[place] for field in fields(SparseTarget)])
        parts = (torch.cat(each).to(self.device, non_blocking=True) for each in zip(*found, strict=True))
        kept = SparseTarget(*parts)
        return replace(kept, weights=F.normalize(kept.weights.float(), p=1, dim=-1))  # but for fp16's rounding it is so

    def _distributions(
        self, windows: Tensor, logits: Iterable[Tensor], generator: torch.Generator
    ) -> dict[str, Tensor]:
        """What a file holds, of the logits [T, V] of its windows. In memory of its own from the start: small tensors
        between large ones that come and go kept C's allocator from giving 3.6 GiB back once."""
        held: dict[str, Tensor] = {}
        for row, each in enumerate(logits):
            known = each[:, : self.vocabulary]
            for name, kept in vars(keep_tokens(known, self.kept, generator)).items():
                if name not in held:
                    held[name] = kept.new_empty(len(windows), *kept.shape)
                held[name][row] = kept
        return held

    def _file(self, split: str, index: int) -> Path:
        return self.directory / f"resume.teacher-{split}-{index:05d}.safetensors"


def keep_tokens(logits: Tensor, kept: int, generator: torch.Generator) -> SparseTarget:
    """`kept` tokens, or all if there are no more, of each of the distributions of logits [T, V]; weights are in fp16.

    DivergedError when logits are not finite.
    """
    if not all_finite(logits):
        raise DivergedError(
            "the logits of the full-precision model are not finite",
            hint="--restart with e2e_qp.amp bfloat16 or float32, or check the model's files",
        )
    drawn = kept // 2 if kept < logits.shape[-1] else 0
    found = []
    for rows in logits.split(ROWS):  # few of them in fp32 at a time
        log_p = F.log_softmax(rows.float(), dim=-1)
        p = log_p.exp()
        entropy = -torch.linalg.vecdot(p, log_p)
        weights, tokens = p.topk(min(kept, p.shape[-1]) - drawn)
        if drawn:
            rest = p.scatter_(1, tokens, 0).clamp_min_(TINY)
            tokens = torch.cat([tokens, rest.multinomial(drawn, replacement=True, generator=generator)], -1)
            share = (1 - weights.sum(-1, keepdim=True)).clamp_min(0) / drawn
            weights = torch.cat([weights, share.expand(-1, drawn)], -1)
        found.append((tokens.int(), weights.half(), entropy))
    return SparseTarget(*(torch.cat(each).cpu() for each in zip(*found, strict=True)))
