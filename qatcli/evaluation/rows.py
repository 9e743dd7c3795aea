"""Log-likelihoods of continuations, many questions per forward pass and nothing computed twice.

The choices of a question share their context, so the context is read once: a row holds each context followed by its
continuations, question after question without padding, and the attention mask shows every token its own context and
continuation only. Logits are computed where a continuation is predicted, nowhere else. The results are those of one
pass per choice up to the rounding of sums.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from qatcli.training import autocast

SHORTEST_PREFIX = 8  # tokens; sharing less saves nothing worth a group
_LOGIT_ROWS = 256  # positions whose logits are in fp32 at a time


@dataclass(frozen=True)
class Request:
    """The last `scored` of `tokens` are predicted from those before them."""

    tokens: list[int]
    scored: int

    @property
    def inputs(self) -> list[int]:
        """What the model reads: the last token is only predicted."""
        return self.tokens[:-1]


@dataclass
class Shared:
    """Requests whose inputs begin with the same `prefix` tokens."""

    requests: list[Request]
    prefix: int

    @property
    def tokens(self) -> int:
        """How many tokens the model reads for them."""
        return self.prefix + sum(len(request.inputs) - self.prefix for request in self.requests)

    def with_request(self, request: Request) -> Shared:
        """This group and one more request."""
        first = self.requests[0].tokens[: self.prefix]
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, request.inputs, strict=False)))
        return Shared([*self.requests, request], common)

    @property
    def saved(self) -> int:
        """Tokens that are not read again."""
        return self.prefix * (len(self.requests) - 1)


def share_prefixes(requests: Sequence[Request], most_tokens: int) -> list[Shared]:
    """Group neighbours, as the choices of one question are, as long as every member saves more than it costs."""
    groups: list[Shared] = []
    for request in requests:
        if groups:
            joined = groups[-1].with_request(request)
            if joined.prefix >= SHORTEST_PREFIX and joined.saved > groups[-1].saved and joined.tokens <= most_tokens:
                groups[-1] = joined
                continue
        groups.append(Shared([request], len(request.inputs)))
    return groups


def rows_of(groups: Sequence[Shared], most_tokens: int) -> Iterator[list[Shared]]:
    """Groups in order, as many as fit into a row of `most_tokens`; a longer group has a row of its own."""
    row: list[Shared] = []
    for group in groups:
        if row and sum(member.tokens for member in row) + group.tokens > most_tokens:
            yield row
            row = []
        row.append(group)
    if row:
        yield row


@dataclass
class _Layout:
    """A row as it is built: token ids, positions, the group and branch of every token, and what is predicted where."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    branches: list[int] = field(default_factory=list)
    sources: list[list[int]] = field(default_factory=list)  # of every request: where its scored tokens are predicted
    targets: list[list[int]] = field(default_factory=list)

    def read(self, tokens: Sequence[int], start: int, group: int, branch: int) -> int:
        """Append tokens at positions from `start` on; the row index of the first."""
        first = len(self.ids)
        self.ids += tokens
        self.positions += range(start, start + len(tokens))
        self.groups += [group] * len(tokens)
        self.branches += [branch] * len(tokens)
        return first

    def mask(self) -> Tensor:
        """bool [T, T]: row attends to column."""
        group, branch, position = (torch.tensor(values) for values in (self.groups, self.branches, self.positions))
        same = (group[:, None] == group) & ((branch == 0) | (branch[:, None] == branch))
        return same & (position <= position[:, None])


def _lay_out(row: Sequence[Shared]) -> _Layout:
    layout = _Layout()
    for number, group in enumerate(row):
        prefix = group.requests[0].tokens[: group.prefix]
        context = layout.read(prefix, 0, number, 0)
        for branch, request in enumerate(group.requests, start=1):
            own = layout.read(request.inputs[group.prefix :], group.prefix, number, branch)
            # token k is predicted at input k - 1, which lies in the shared context or in the request's own part
            before = range(len(request.tokens) - request.scored - 1, len(request.tokens) - 1)
            layout.sources.append([context + k if k < group.prefix else own + k - group.prefix for k in before])
            layout.targets.append(request.tokens[-request.scored :])
    return layout


@torch.no_grad()
def score_row(
    model: Any, row: Sequence[Shared], *, device: torch.device, dtype: torch.dtype
) -> list[tuple[float, bool]]:
    """(log-likelihood in nats, whether greedy decoding gives it) of every request of a row, in order."""
    layout = _lay_out(row)
    sources = torch.tensor([at for places in layout.sources for at in places])
    targets = torch.tensor([token for tokens in layout.targets for token in tokens], device=device)
    keep, back = torch.unique(sources, return_inverse=True)
    with autocast(device, dtype):
        logits = model(
            input_ids=torch.tensor([layout.ids], device=device),
            position_ids=torch.tensor([layout.positions], device=device),
            attention_mask=layout.mask()[None, None].to(device),
            logits_to_keep=keep.to(device),
            use_cache=False,
        ).logits[0]
    likelihood, greedy = [], []
    for part, target in zip(back.to(device).split(_LOGIT_ROWS), targets.split(_LOGIT_ROWS), strict=True):
        chosen = logits[part].float()
        likelihood.append(chosen.gather(1, target[:, None])[:, 0] - chosen.logsumexp(-1))
        greedy.append(chosen.argmax(-1) == target)
    counts = [len(tokens) for tokens in layout.targets]
    sums = [float(each.sum()) for each in torch.cat(likelihood).double().split(counts)]
    return list(zip(sums, [bool(each.all()) for each in torch.cat(greedy).split(counts)], strict=True))


@torch.no_grad()
def score_alone(model: Any, request: Request, *, device: torch.device, dtype: torch.dtype) -> float:
    """The log-likelihood of one request by a plain forward pass."""
    with autocast(device, dtype):
        logits = model(input_ids=torch.tensor([request.inputs], device=device), use_cache=False).logits[0]
    chosen = logits[-request.scored :].float().log_softmax(-1)
    return float(chosen.gather(1, torch.tensor(request.tokens[-request.scored :], device=device)[:, None]).sum())


def takes_rows(model: Any, rows: Sequence[Sequence[Shared]], *, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the model honours the masks and the positions of all rows, found by scoring a part of them both ways.

    A recurrent layer ignores the mask, a sliding window is not in it, and some attention code takes masks of numbers
    only.
    """
    parameters = inspect.signature(model.forward).parameters
    attention = getattr(model.config, "_attn_implementation", None)
    window = getattr(model.config.get_text_config(), "sliding_window", None) or float("inf")
    far = max((group for row in rows for group in row), key=_longest)
    if attention != "sdpa" or not {"position_ids", "logits_to_keep"} <= parameters.keys() or _longest(far) > window:
        return False
    # the longest too: attention may be bounded in a way that the configuration does not call a window
    probes = [max(rows, key=len)[:2], [far]]
    asked = [request for row in probes for group in row for request in group.requests]
    alone = [score_alone(model, request, device=device, dtype=dtype) for request in asked]
    packed = [found for row in probes for found, _ in score_row(model, row, device=device, dtype=dtype)]
    apart = sum(abs(one - other) for one, other in zip(alone, packed, strict=True))
    return apart <= 0.02 * sum(map(abs, alone))  # rounding moves a sum by less than 1 %, a wrong mask by far more


def _longest(group: Shared) -> int:
    return max(len(request.tokens) for request in group.requests)
