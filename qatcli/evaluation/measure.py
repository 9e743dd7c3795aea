"""All figures of several models side by side, each loaded only while it is measured.

    perplexity   of every text
    divergence   from the reference on the first windows of every text
    zero_shot    accuracy on lm-eval's tasks
    speed        tokens per second, bytes of weights
    samples      greedy continuations of the prompts

Every figure has its protocol in the result: text, context, windows, dtype, tasks, device.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qatcli.casting import dtype_name
from qatcli.data import begin_windows, c4_windows, evaluation_windows, text_tokens
from qatcli.errors import InputError
from qatcli.evaluation.cache import remembered
from qatcli.evaluation.candidates import Candidate
from qatcli.evaluation.perplexity import compared, divergence, perplexity, window_logits
from qatcli.evaluation.speed import conditions, speed, weight_bytes
from qatcli.evaluation.zero_shot import Suite, load_suite, run_suite
from qatcli.finite import finite
from qatcli.linear import dense_linears
from qatcli.memory import part_peak, release_memory
from qatcli.recipe.schema import EvalSection, PerplexityText
from qatcli.runlog import RunLog
from qatcli.sizes import model_size
from qatcli.streaming import StreamedModel
from qatcli.training import autocast, compute_dtype

BATCH_TOKENS = 4096  # tokens per forward pass of a perplexity
MEMORY_OF_THEIR_OWN = ("cuda",)  # devices beside which full-precision logits are kept, in host memory
Expected = Callable[[str], Iterable[Tensor]]  # of a text: full-precision logits of its windows, see `divergence`


class Subject:
    """A candidate with its model and tokenizer, loaded when first asked for."""

    def __init__(self, candidate: Candidate, config: EvalSection) -> None:
        self.candidate = candidate
        self.name = candidate.name
        self._config = config

    @cached_property
    def model(self) -> Any:
        return self.candidate.load()

    @cached_property
    def streamed(self) -> StreamedModel | None:
        """The model block by block, where it does not fit."""
        return self.candidate.streamed() if self.candidate.streamed else None

    @property
    def architecture(self) -> Any:
        """The model, or what it is built like where it is never whole."""
        return self.streamed.model.skeleton if self.streamed else self.model

    @cached_property
    def tokenizer(self) -> Any:
        return self.candidate.tokenizer()

    @cached_property
    def windows(self) -> dict[str, Tensor]:
        """The windows of every text, int [W, T]."""
        return {text.name: _windows(text, self.tokenizer) for text in self._config.perplexity}

    def release(self) -> None:
        """Give the model's memory back."""
        self.__dict__.pop("model", None)
        release_memory()


def measure(
    candidates: Sequence[Candidate],
    config: EvalSection,
    *,
    reference: Candidate | None,
    sampled: Callable[[str], bool] = lambda name: True,
    device: torch.device,
    log: RunLog,
) -> dict[str, Any]:
    """Measure every candidate as `config` says.

    reference: what divergence is from, measured first if it is among the candidates; None measures no divergence.
    sampled: which candidates continue the prompts. Returns {models, protocol, zero_shot_protocol, speed_protocol,
    prompts}.
    """
    dtype = compute_dtype("auto", device)
    suite = _suite(config)  # before any model is loaded: what is missing is missed now
    base = Subject(reference, config) if reference is not None else None
    subjects = [base if base and candidate is reference else Subject(candidate, config) for candidate in candidates]
    settings = config.speed.model_dump() if config.speed else {}
    result: dict[str, Any] = {
        "models": {},
        "protocol": {text.name: _protocol(text, subjects, dtype) for text in config.perplexity},
        "zero_shot_protocol": suite.protocol | {"compute": dtype_name(dtype)} if suite else None,
        "speed_protocol": conditions(device, **settings) if settings else None,
        "prompts": list(config.prompts),
    }
    for subject in subjects:
        if subject.streamed and not config.perplexity:
            raise InputError(
                f"{subject.name} does not fit: nothing but perplexity and divergence of it can be measured",
                hint="name texts (--text, eval.perplexity), or use a device with more memory",
            )
    expected: Expected | None = None
    if base is not None:
        _check_tokenizers(subjects, base)
        subjects.sort(key=lambda subject: subject is not base)
        if subjects[0] is not base:
            _check_context(base, config, log)
            expected = expected_logits(base, device, dtype, log)
    for subject in subjects:
        started = time.monotonic()
        log.say(f"eval: {subject.name}")
        found: dict[str, Any] = {"loaded_as": subject.candidate.loaded_as, "size": None, "speed": None}
        if subject.streamed and (settings or suite or config.prompts):
            log.warn(f"{subject.name} does not fit: of it neither speed, tasks nor samples")
        if settings and not subject.streamed:  # first, while nothing but the model is there
            found["speed"] = _speed(subject, config, device, log)
        else:
            _check_context(subject, config, log)
        if subject.candidate.path is not None:
            found["size"] = model_size(subject.candidate.files or subject.candidate.path, subject.architecture)
        found |= _quality(subject, expected, suite, config, device=device, dtype=dtype, log=log)
        if config.prompts and sampled(subject.name) and not subject.streamed:
            found["samples"] = [_continue(subject, prompt, config, device, dtype) for prompt in config.prompts]
        found["seconds"] = round(time.monotonic() - started, 2)
        result["models"][subject.name] = found
        log.event("measured", model=subject.name, perplexity=found["perplexity"])
        if subject is not base:
            subject.release()
        elif len(subjects) > 1:
            expected = expected_logits(base, device, dtype, log)
    return dict(finite(result))


def expected_logits(base: Subject, device: torch.device, dtype: torch.dtype, log: RunLog) -> Expected:
    """What divergence is from, by the name of a text.

    Computed when it is asked for, or at once and kept, and the model is released: where one model fits on a GPU, two of
    them may not, and what is read block by block is not read again for every model.
    """

    def compute(text: str) -> Iterator[Tensor]:
        return _logits(base, compared(base.windows[text]), device, dtype, log)

    if device.type not in MEMORY_OF_THEIR_OWN and not base.streamed:
        return compute
    kept = {text: [logits.cpu() for logits in compute(text)] for text in base.windows}
    base.release()
    return kept.__getitem__


def _check_tokenizers(subjects: Sequence[Subject], base: Subject) -> None:
    """InputError where a text has other tokens for a model than for the reference, before anything is measured."""
    for subject in subjects:
        for name, windows in subject.windows.items():
            if not torch.equal(windows, base.windows[name]):
                raise InputError(
                    f"{subject.name} and {base.name} have different tokenizers: their distributions do not compare",
                    hint="measure no divergence (leave out --against, or set eval.kl to false), or choose another "
                    "full-precision model",
                )


def _check_context(subject: Subject, config: EvalSection, log: RunLog) -> None:
    """A model is measured on windows longer than its context, as asked, but not without a word. InputError where its
    positions are a table, which ends there."""
    context, table = _context(subject.architecture)
    asked = [(f"windows of {text.seq_len} ({text.name})", text.seq_len) for text in config.perplexity]
    if table:
        asked += [
            (f"the prompt {prompt[:20]!r}", len(subject.tokenizer(prompt)["input_ids"])) for prompt in config.prompts
        ]
        asked += [("speed", config.speed.prompt_tokens + config.speed.new_tokens)] if config.speed else []
    for what, tokens in asked:
        if context and tokens > context:
            text = f"{subject.name} has a context of {context} tokens and is measured on {what}"
            if table:
                hint = f"ask for {context} or less: --seq-len, eval.prompts, eval.speed.prompt_tokens, or --no-speed"
                raise InputError(f"{text}: it has no positions beyond", hint=hint)
            log.warn(f"{text}, for which it was not trained: ask for {context} or less")


def _context(model: Any) -> tuple[int | None, bool]:
    """The context that a model was made for, and whether its positions are an embedding, which ends there."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    tokens = model.get_input_embeddings()  # may have as many rows: Mistral 7B v0.3 has 32,768 tokens and positions
    others = [each for each in model.modules() if isinstance(each, nn.Embedding) and each is not tokens]
    found = context is not None and any(context <= each.num_embeddings <= context + 2 for each in others)
    return context, found  # OPT's table has two rows more


def _speed(subject: Subject, config: EvalSection, device: torch.device, log: RunLog) -> dict[str, Any]:
    """Speed, and the memory of loading and running: bytes of weights, and the peak of all that was added."""
    assert config.speed is not None
    settings = config.speed.model_dump()
    with part_peak(device) as peak, log.progress(f"speed {subject.name}", settings["repeats"]) as bar:
        model = subject.model
        _check_context(subject, config, log)
        found = speed(model, device=device, progress=bar.advance, **settings)
    return found | {"dtype": dtype_name(model.dtype), "weight_bytes": weight_bytes(model), "peak": peak}


def _quality(
    subject: Subject,
    expected: Expected | None,
    suite: Suite | None,
    config: EvalSection,
    *,
    device: torch.device,
    dtype: torch.dtype,
    log: RunLog,
) -> dict[str, Any]:
    """Perplexity and divergence of every text, and zero-shot accuracy."""
    path = subject.candidate.path

    def kept(protocol: dict[str, Any], get: Callable[[], Any]) -> Any:
        # Block by block numbers round otherwise, and depend on more code than a kept one is checked against.
        if not (config.cache and subject.candidate.keep and path is not None) or subject.streamed:
            return get()
        return remembered({**protocol, "compute": dtype_name(dtype)}, path, device, get)

    found: dict[str, Any] = {"perplexity": {}, "divergence": {}, "zero_shot": None}
    for name, windows in subject.windows.items():
        digest = hashlib.sha256(windows.long().numpy().tobytes()).hexdigest()
        protocol = {"perplexity": digest, "windows": list(windows.shape)}
        found["perplexity"][name] = kept(protocol, partial(_perplexity, subject, name, windows, device, dtype, log))
        if expected is not None:
            ours = _logits(subject, compared(windows), device, dtype, log)
            apart = divergence(ours, expected(name), device)
            found["divergence"][name] = asdict(apart)
    if suite is not None and config.zero_shot is not None and not subject.streamed:
        tokens = config.zero_shot.batch_tokens
        found["zero_shot"] = kept(
            {"zero_shot": suite.protocol},
            lambda: run_suite(
                suite,
                _fast(subject, device, dtype),
                subject.tokenizer,
                batch_tokens=tokens,
                dtype=dtype,
                log=log,
                title=f"zero-shot {subject.name}",
            ),
        )
    return found


def _perplexity(
    subject: Subject, text: str, windows: Tensor, device: torch.device, dtype: torch.dtype, log: RunLog
) -> float:
    if subject.streamed:
        return perplexity(_logits(subject, windows, device, dtype, log), windows)
    batch = max(1, BATCH_TOKENS // windows.shape[1])
    with log.progress(f"perplexity {subject.name} {text}", len(windows)) as bar:
        model = _fast(subject, device, dtype)
        logits = window_logits(
            model,
            windows,
            batch_size=batch,
            device=device,
            dtype=dtype,
            progress=lambda count: bar.advance(count, tokens=count * windows.shape[1]),
        )
        return perplexity(logits, windows)


def _logits(
    subject: Subject, windows: Tensor, device: torch.device, dtype: torch.dtype, log: RunLog
) -> Iterator[Tensor]:
    """Of each of the windows, from the model or block by block."""
    if subject.streamed is None:
        yield from window_logits(_fast(subject, device, dtype), windows, device=device, dtype=dtype)
        return
    with log.progress(f"{subject.name}, block by block", subject.streamed.steps(windows)) as bar:
        yield from subject.streamed.logits(windows, dtype, bar)


def _fast(subject: Subject, device: torch.device, dtype: torch.dtype) -> Any:
    """The model as quality is measured: all of it in `dtype` if that is fp32, whatever it is stored in.

    On a CPU packed weights are unpacked once instead of in every pass, which computes the same.
    """
    if device.type == "cpu":
        dense_linears(subject.model, dtype)
    if dtype == torch.float32:
        nn.Module.float(subject.model)  # transformers' own refuses a model that was loaded from packed codes
    return subject.model


def check_ahead(config: EvalSection, tokenizer: Any) -> None:
    """InputError for texts and tasks that `measure` will not find, or find too short; the model is not looked at."""
    _suite(config)
    for text in config.perplexity:
        _windows(text, tokenizer)


def _suite(config: EvalSection) -> Suite | None:
    asked = config.zero_shot
    if asked is None:
        return None
    return load_suite(asked.tasks, data=Path(asked.data) if asked.data else None, limit=asked.limit)


def _windows(text: PerplexityText, tokenizer: Any) -> Tensor:
    cut = _cut(text, tokenizer)
    return begin_windows(cut, tokenizer) if text.bos == "window" else cut


def _cut(text: PerplexityText, tokenizer: Any) -> Tensor:
    if text.source == "c4":
        windows = torch.as_tensor(c4_windows(tokenizer, text.seq_len, file=text.file))
        if (text.windows or 0) > len(windows):
            raise InputError(f"c4 has {len(windows)} windows by its protocol, not {text.windows}", hint="ask for fewer")
        return windows[: text.windows]
    tokens = text_tokens(text.source, tokenizer, file=text.file)
    name = f"the text {text.name} ({text.file or text.source})"
    return torch.as_tensor(evaluation_windows(tokens, text.seq_len, text.windows, name=name))


def _protocol(text: PerplexityText, subjects: Sequence[Subject], dtype: torch.dtype) -> dict[str, Any]:
    """How a text was read and cut; `windows` is a number by model where tokenizers make other numbers of it."""
    windows = {subject.name: len(subject.windows[text.name]) for subject in subjects}
    alike = len(set(windows.values())) == 1
    read = {"wikitext2": "test split, lines joined by two newlines", "c4": "first validation shard"}
    first = "all windows" if text.windows is None else "the first windows"
    return {
        "source": text.source,
        "file": text.file,
        "read": read.get(text.source, "the whole file"),
        "context": text.seq_len,
        "windows": next(iter(windows.values())) if alike else windows,
        "cut": "random places of random documents, seed 0" if text.source == "c4" else f"{first}, none overlap",
        "bos": text.bos,
        "compute": dtype_name(dtype),
    }


@torch.no_grad()
def _continue(subject: Subject, prompt: str, config: EvalSection, device: torch.device, dtype: torch.dtype) -> str:
    """Greedy continuation of a prompt."""
    inputs = subject.tokenizer(prompt, return_tensors="pt").to(device)
    context, table = _context(subject.model)
    left = context - inputs["input_ids"].shape[1] if table and context else config.max_new_tokens
    with autocast(device, dtype):
        output = _fast(subject, device, dtype).generate(
            **inputs,
            max_new_tokens=max(1, min(left, config.max_new_tokens)),
            do_sample=False,
            use_cache=True,
            pad_token_id=subject.tokenizer.eos_token_id,
        )
    # Decoded together with the prompt: some tokenizers drop the space in front of what is decoded.
    before, after = (
        str(subject.tokenizer.decode(tokens, skip_special_tokens=True))
        for tokens in (inputs["input_ids"][0], output[0])
    )
    return after.removeprefix(before)
