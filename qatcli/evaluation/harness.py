"""lm-eval on a model that is loaded already: its tasks, prompts, tokenization and metrics; rows of ours for the passes.

Imports lm-eval (the extra `eval`), which takes seconds; `zero_shot` is the way in.
"""

from __future__ import annotations

from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from qatcli.errors import InputError
from qatcli.evaluation.rows import Request, rows_of, score_row, share_prefixes, takes_rows
from qatcli.runlog import RunLog

_TYPICAL_TOKENS = 128  # of a request, to choose lm-eval's batch size where rows cannot be used


class RowModel(HFLM):
    """lm-eval's model of transformers, with multiple choice scored in rows (`qatcli.evaluation.rows`).

    A model that cannot take rows, and everything but multiple choice, goes through lm-eval's own code.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, batch_tokens: int, dtype: torch.dtype, log: RunLog, title: str
    ) -> None:
        model.tie_weights = lambda *_, **__: None  # which lm-eval calls: it would replace a head that the config ties
        try:
            super().__init__(
                pretrained=model,
                tokenizer=tokenizer,
                backend="causal",
                batch_size=max(1, batch_tokens // _TYPICAL_TOKENS),
                mixed_precision_dtype=None if dtype == torch.float32 else dtype,
                softmax_dtype=torch.float32,
            )
        finally:
            del model.tie_weights
        self._batch_tokens = batch_tokens
        self._dtype = dtype
        self._log = log
        self._title = title

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """As lm-eval, without its progress bars."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        # What lm-eval does with a request that is longer than the model's context: the left end goes.
        cut = self.max_length + 1
        longest = max((len(continuation) for _, _, continuation in requests), default=0)
        if longest >= cut:
            text = f"{self._title}: a choice has {longest} tokens, the model a context of {self.max_length}"
            raise InputError(text, hint="leave the task out, or choose a model with a longer context")
        asked = [Request((context + continuation)[-cut:], len(continuation)) for _, context, continuation in requests]
        rows = list(rows_of(share_prefixes(asked, self._batch_tokens), self._batch_tokens))
        settings = {"device": self.device, "dtype": self._dtype}
        if not rows or not takes_rows(self.model, rows, **settings):
            self._log.warn(f"{self._title}: this model cannot read several questions in one row, so it takes longer")
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        results: list[tuple[float, bool]] = []
        with self._log.progress(self._title, len(requests)) as bar:
            for row in rows:
                results += score_row(self.model, row, **settings)
                bar.advance(sum(len(group.requests) for group in row), tokens=sum(group.tokens for group in row))
        return results
