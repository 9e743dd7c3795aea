"""Contradictions between keys that are each valid alone.

Each check says which keys it reads, so that the loader can leave it out when one of them is itself wrong, and
report the contradictions among the others together with the field errors.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

from qatcli.errors import RecipeError
from qatcli.recipe.locations import BUILT_IN_TEXTS, is_local
from qatcli.recipe.problems import Key, Problem, nearest
from qatcli.recipe.schema import BlockApSection, E2eQpSection, Recipe

FORMAT_BITS: Mapping[str, tuple[int, ...]] = {
    "gptq": (2, 3, 4, 8),
    "bitblas": (2, 3, 4, 8),
    "native": (2, 3, 4, 8),
    "compressed-tensors": (2, 3, 4, 8),
    "mlx": (2, 3, 4, 8),
    "dense": (2, 3, 4, 8),
    "awq": (4,),
    "gguf": (2, 3, 4),
}
"""Bits that each export format can carry, whatever the recipe's options."""
_AT_A_PRICE = {"awq": ((2, 3), "export.awq_promote"), "gguf": ((8,), "quant.zero_points: middle")}
"""Further bits, and what they need."""

_LARGEST_ABSOLUTE_RATE = 0.1
_SMALLEST_REACH = 1e-3
_OF_DATASETS = ("name", "split", "streaming")  # keys of a source that `datasets` loads as a whole

Check = Callable[[Recipe], Iterator[Problem]]


def carried_bits(recipe: Recipe) -> dict[str, tuple[int, ...]]:
    """Bits that each export format can carry with this recipe's options."""
    paid = {"awq": recipe.export.awq_promote, "gguf": recipe.quant.zero_points == "middle"}
    return {name: bits + (_AT_A_PRICE[name][0] if paid.get(name) else ()) for name, bits in FORMAT_BITS.items()}


def _format_carries_bits(recipe: Recipe) -> Iterator[Problem]:
    used = {recipe.quant.bits, *(override.bits for override in recipe.quant.overrides if override.bits)}
    carried = carried_bits(recipe)
    for index, name in enumerate(recipe.export.formats):
        too_many = sorted(used.difference(carried[name]))
        if too_many:
            able = ", ".join(other for other, bits in carried.items() if used.issubset(bits))
            more, price = _AT_A_PRICE.get(name, ((), ""))
            unless = f" without {price}" if used.issubset((*carried[name], *more)) else ""
            bits = " and ".join(str(bit) for bit in too_many)
            yield Problem(("export", "formats", index), f"cannot carry {bits} bits{unless}; these can: {able}", name)


def _revision_is_of_the_hub(recipe: Recipe) -> Iterator[Problem]:
    if recipe.model.revision is not None and is_local(recipe.model.source):
        yield Problem(("model", "revision"), "has no effect on local files", recipe.model.revision)


def _gguf_file_is_there(recipe: Recipe) -> Iterator[Problem]:
    source, name = recipe.model.source, recipe.model.gguf_file
    if name is None or not is_local(source):
        return
    if source.lower().endswith(".gguf"):
        yield Problem(("model", "gguf_file"), "model.source already names a GGUF file; leave this out", name)
    elif not os.path.exists(os.path.join(source, name)):
        yield Problem(("model", "gguf_file"), f"no such file in {source}", name)


def _micro_batch_divides(recipe: Recipe) -> Iterator[Problem]:
    whole, part = recipe.e2e_qp.batch_size, recipe.e2e_qp.micro_batch_size
    if whole % part:
        divisors = ", ".join(str(n) for n in range(1, whole + 1) if whole % n == 0)
        yield Problem(("e2e_qp", "micro_batch_size"), f"must divide batch_size {whole}: {divisors}", part)


def _data_keys_have_effect(recipe: Recipe) -> Iterator[Problem]:
    for section, sources in (("calibrate", recipe.calibrate.data), ("e2e_qp", recipe.e2e_qp.data or ())):
        for index, source in enumerate(sources):
            place = (section, "data", index)
            is_folder = os.path.isdir(source.source)  # `datasets` may find configurations and splits in it
            given = {key for key in ("name", "revision", "files") if getattr(source, key) is not None}
            given |= {"streaming"} if source.streaming else set()
            given |= {"split"} if source.split != type(source).model_fields["split"].default else set()
            for key in sorted(given.difference(_OF_DATASETS) if is_folder else given):
                if is_local(source.source):
                    yield Problem((*place, key), "has no effect on local files", getattr(source, key))
                elif source.files is not None and key in _OF_DATASETS:
                    yield Problem((*place, key), "has no effect beside `files`", getattr(source, key))


def _batches_fit_samples(recipe: Recipe) -> Iterator[Problem]:
    for section, size, samples in (
        ("block_ap", recipe.block_ap.batch_size, recipe.calibrate.samples),
        ("e2e_qp", recipe.e2e_qp.batch_size, recipe.e2e_qp.samples),
    ):
        if size > samples:
            yield Problem((section, "batch_size"), f"is more than the {samples} training windows", size)


def _moments_are_measured(recipe: Recipe) -> Iterator[Problem]:
    if recipe.calibrate.moment_samples:
        return
    if recipe.quant.init == "weighted":
        yield Problem(("quant", "init"), "needs calibrate.moment_samples above 0", "weighted")
    if recipe.block_ap.rounding == "gptq":
        yield Problem(("block_ap", "rounding"), "needs calibrate.moment_samples above 0", "gptq")


def _rates_match_units(recipe: Recipe) -> Iterator[Problem]:
    sections: dict[str, BlockApSection | E2eQpSection] = {"block_ap": recipe.block_ap, "e2e_qp": recipe.e2e_qp}
    for name, section in sections.items():
        for key, rate in section:
            if not key.startswith("lr_") or key == "lr_units":
                continue
            if section.lr_units == "absolute" and rate > _LARGEST_ABSOLUTE_RATE:
                text = f"is a reach, not an absolute rate (at most {_LARGEST_ABSOLUTE_RATE}); see {name}.lr_units"
                yield Problem((name, key), text, rate)
            if section.lr_units == "reach" and 0 < rate < _SMALLEST_REACH:
                text = f"is an absolute rate, not a reach (0, or at least {_SMALLEST_REACH}); see {name}.lr_units"
                yield Problem((name, key), text, rate)


def _trained_have_rates(recipe: Recipe) -> Iterator[Problem]:
    section = recipe.e2e_qp
    for what, rate in (("scales", section.lr_scales), ("norms", section.lr_norms)):
        if what in section.train and rate == 0:
            yield Problem(("e2e_qp", f"lr_{what}"), f"must be above 0, or take {what} out of e2e_qp.train", rate)
        if what not in section.train and what == "norms" and rate > 0:
            yield Problem(("e2e_qp", "lr_norms"), "has no effect: add norms to e2e_qp.train", rate)


def _metric_names_differ(recipe: Recipe) -> Iterator[Problem]:
    seen: set[str] = set()
    for index, text in enumerate(recipe.eval.perplexity):
        if text.name in seen:
            yield Problem(("eval", "perplexity", index, "name"), "is used by an earlier text", text.name)
        seen.add(text.name)


def _copies_are_of_built_in_texts(recipe: Recipe) -> Iterator[Problem]:
    for index, text in enumerate(recipe.eval.perplexity):
        if text.file is not None and text.source not in BUILT_IN_TEXTS:
            what = f"is a local copy of {' or '.join(BUILT_IN_TEXTS)}; `source` already is a file"
            yield Problem(("eval", "perplexity", index, "file"), what, text.file)


def _expected_is_measured(recipe: Recipe) -> Iterator[Problem]:
    section = recipe.eval
    texts = [text.name for text in section.perplexity]
    tasks = section.zero_shot.tasks if section.zero_shot else ()
    known = {*texts, *tasks, "bits_per_weight", "bits_per_parameter", *(("zero_shot",) if len(tasks) > 1 else ())}
    if section.kl:
        known |= {f"{text}.{figure}" for text in texts for figure in ("kl", "kl_99", "top1_agreement")}
    for name, expectation in recipe.expect.items():
        # a task of lm-eval may be a group, whose members it names after itself
        if name not in known and not any(name.startswith(f"{task}_") for task in tasks):
            yield Problem(("expect", name), f"is not measured by `eval`{nearest(name, known)}", expectation.value)


_RATES = ("lr_units", "lr_weights", "lr_scales", "lr_zero_points", "lr_norms")

CHECKS: tuple[tuple[Check, tuple[str, ...]], ...] = (
    (
        _format_carries_bits,
        ("quant.bits", "quant.overrides", "quant.zero_points", "export.formats", "export.awq_promote"),
    ),
    (_revision_is_of_the_hub, ("model.source", "model.revision")),
    (_gguf_file_is_there, ("model.source", "model.gguf_file")),
    (_data_keys_have_effect, ("calibrate.data", "e2e_qp.data")),
    (_micro_batch_divides, ("e2e_qp.batch_size", "e2e_qp.micro_batch_size")),
    (_batches_fit_samples, ("block_ap.batch_size", "calibrate.samples", "e2e_qp.batch_size", "e2e_qp.samples")),
    (_moments_are_measured, ("quant.init", "block_ap.rounding", "calibrate.moment_samples")),
    (_rates_match_units, ("method", *(f"{s}.{key}" for s in ("block_ap", "e2e_qp") for key in _RATES))),
    (_trained_have_rates, ("e2e_qp.train", "e2e_qp.lr_scales", "e2e_qp.lr_norms")),
    (_metric_names_differ, ("eval.perplexity",)),
    (_copies_are_of_built_in_texts, ("eval.perplexity",)),
    (_expected_is_measured, ("eval", "expect")),
)
"""Every check with the keys that it reads."""


def contradictions(recipe: Recipe, wrong: set[Key]) -> list[Problem]:
    """The contradictions in `recipe` that involve none of the `wrong` keys."""
    problems: list[Problem] = []
    for check, reads in CHECKS:
        if not any(_overlap(tuple(read.split(".")), key) for read in reads for key in wrong):
            problems += check(recipe)
    return problems


def _overlap(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    shared = min(len(one), len(other))
    return one[:shared] == other[:shared]


def check_group_sizes(recipe: Recipe, in_features: Mapping[str, int]) -> None:
    """Raise RecipeError if the group size of a quantized linear does not divide its inputs.

    `in_features` maps the name of every linear in the model to its number of inputs. The message names some of the
    linears concerned and the hint the group sizes that divide them all.
    """
    wrong: dict[tuple[int, int], list[str]] = {}
    quantized: list[int] = []
    for name, features in in_features.items():
        setting = recipe.quant.for_module(name)
        if setting is None:
            continue
        quantized.append(features)
        if setting[1] != -1 and features % setting[1]:
            wrong.setdefault((setting[1], features), []).append(name)
    if not wrong:
        return
    lines = [
        f"group size {size} does not divide the {features} inputs of {_some(names)}"
        for (size, features), names in wrong.items()
    ]
    common = math.gcd(*quantized)
    fitting = [str(size) for size in range(8, common + 1) if common % size == 0]
    hint = f"set quant.group_size to one of {', '.join([*fitting, '-1'])}, or quant.overrides for these layers"
    raise RecipeError("\n".join(lines), hint=hint)


def check_patterns(recipe: Recipe, in_blocks: Collection[str], others: Collection[str]) -> None:
    """Raise RecipeError for a pattern of `quant` that no linear of the model has: it would do nothing, without a word;
    or when all linears are skipped, or there are none.

    `in_blocks` are the names of the linears that are quantized where nothing is said, `others` those outside of blocks,
    which `quant.skip` may name; its default names one that not all models have.
    """
    if not in_blocks:
        raise RecipeError("model.source has no nn.Linear in its blocks", hint="its family (GPT-2) is not supported")
    default = type(recipe.quant).model_fields["skip"].default
    skips = [(f"quant.skip.{i}", each) for i, each in enumerate(recipe.quant.skip) if each not in default]
    overrides = [(f"quant.overrides.{i}.pattern", each.pattern) for i, each in enumerate(recipe.quant.overrides)]
    lines = [
        f"{key}: `{pattern}` matches no linear of the model"
        for patterns, names in ((overrides, in_blocks), (skips, {*in_blocks, *others}))
        for key, pattern in patterns
        if not any(fnmatchcase(name, pattern) for name in names)
    ]
    if lines:
        hint = f"patterns are of whole names (`*.down_proj`); the model has {_some(sorted(in_blocks))}"
        raise RecipeError("\n".join(lines), hint=hint)
    if all(any(fnmatchcase(name, pattern) for pattern in recipe.quant.skip) for name in in_blocks):
        raise RecipeError("quant.skip names every linear of the model", hint="leave one out: nothing is quantized")


def check_context(recipe: Recipe, section: Literal["calibrate", "e2e_qp"], context: int | None) -> None:
    """Raise RecipeError if the windows of `section` are longer than the model's context; None is one without a limit.

    Models with learned positions have none for the tokens beyond, and the others were never trained there.
    """
    seq_len = getattr(recipe, section).seq_len
    if context is not None and seq_len > context:
        raise RecipeError(
            f"{section}.seq_len = {seq_len}: the model has a context of {context} tokens (max_position_embeddings)",
            hint=f"set {section}.seq_len to {context} or less",
        )


def _some(names: Sequence[str], shown: int = 3) -> str:
    more = f" and {len(names) - shown} others" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
