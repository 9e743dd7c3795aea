"""Contradictions between keys, and group sizes against a model's layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from qatcli.errors import RecipeError
from qatcli.recipe import FORMAT_BITS, Recipe, check_group_sizes, check_patterns, load_recipe
from qatcli.recipe.checks import CHECKS, contradictions
from qatcli.recipe.schema import Format

CASES: list[tuple[dict[str, Any], str, str]] = [
    (
        {"quant": {"bits": 8}, "export": {"formats": ["awq"]}},
        "export.formats.0",
        "cannot carry 8 bits; these can: gptq",
    ),
    (
        {"quant": {"bits": 3}, "export": {"formats": ["awq"]}},
        "export.formats.0",
        "cannot carry 3 bits without export.awq_promote; these can: gptq",
    ),
    (
        {"quant": {"bits": 8}, "export": {"formats": ["gptq", "gguf"]}},
        "export.formats.1",
        "cannot carry 8 bits without quant.zero_points: middle; these can: gptq",
    ),
    (
        {"quant": {"overrides": [{"pattern": "*", "bits": 8}]}, "export": {"formats": ["gguf"]}},
        "export.formats.0",
        "cannot carry 8 bits",
    ),
    ({"e2e_qp": {"micro_batch_size": 3}}, "e2e_qp.micro_batch_size", "must divide batch_size 32: 1, 2, 4, 8, 16, 32"),
    ({"block_ap": {"batch_size": 5000}}, "block_ap.batch_size", "more than the 4096 training windows"),
    ({"e2e_qp": {"samples": 31}}, "e2e_qp.batch_size", "more than the 31 training windows"),
    (
        {"calibrate": {"moment_samples": 0}, "quant": {"init": "mse"}, "block_ap": {"rounding": "gptq"}},
        "block_ap.rounding",
        "needs calibrate.moment",
    ),
    ({"calibrate": {"moment_samples": 0}}, "quant.init", "needs calibrate.moment"),
    ({"block_ap": {"lr_weights": 2e-5}}, "block_ap.lr_weights", "is an absolute rate, not a reach"),
    ({"method": "efficientqat", "block_ap": {"lr_scales": 1.0}}, "block_ap.lr_scales", "is a reach, not an absolute"),
    ({"e2e_qp": {"train": ["scales", "norms"]}}, "e2e_qp.lr_norms", "must be above 0, or take norms out of"),
    ({"e2e_qp": {"lr_scales": 0}}, "e2e_qp.lr_scales", "must be above 0, or take scales out of"),
    ({"e2e_qp": {"lr_norms": 0.02}}, "e2e_qp.lr_norms", "has no effect: add norms"),
    ({"eval": {"perplexity": [{"name": "a", "source": "c4"}] * 2}}, "eval.perplexity.1.name", "used by an earlier"),
    (
        {"eval": {"perplexity": [{"name": "a", "source": "./a.txt", "file": "./b.txt"}]}},
        "eval.perplexity.0.file",
        "local copy of wikitext2 or c4",
    ),
    ({"expect": {"wikitxt2": {"value": 6.8}}}, "expect.wikitxt2", "not measured by `eval`; did you mean wikitext2?"),
    ({"expect": {"piqa": {"value": 0.7}}}, "expect.piqa", "not measured by `eval`"),
    (
        {"eval": {"kl": False}, "expect": {"wikitext2.kl": {"value": 0.1}, "wikitext2": {"value": 6.8}}},
        "expect.wikitext2.kl",
        "not measured by `eval`",
    ),
    ({"model": {"source": "/m.gguf", "gguf_file": "a"}}, "model.gguf_file", "model.source already names a GGUF file"),
    ({"model": {"source": "./m", "revision": "main"}}, "model.revision", "has no effect on local files"),
    ({"model": {"source": "/none", "gguf_file": "a"}}, "model.gguf_file", "no such file in /none"),
    ({"calibrate": {"data": [{"source": "./a.txt", "name": "en"}]}}, "calibrate.data.0.name", "no effect on local"),
    ({"calibrate": {"data": [{"source": "./*.txt", "split": "test"}]}}, "calibrate.data.0.split", "no effect on local"),
    (
        {"e2e_qp": {"data": [{"source": "a/b"}, {"source": "a/b", "files": "*", "streaming": True}]}},
        "e2e_qp.data.1.streaming",
        "no effect beside `files`",
    ),
]


@pytest.mark.parametrize(("sections", "key", "message"), CASES)
def test_contradictions(build: Callable[..., Recipe], sections: dict[str, Any], key: str, message: str) -> None:
    problems = contradictions(build(**sections), set())
    assert len(problems) == 1
    assert problems[0].line("r.yaml").startswith(f"r.yaml: {key} = ")
    assert message in problems[0].text


def test_every_check_is_tested(build: Callable[..., Recipe]) -> None:
    silent = {check for check, _ in CHECKS} - {
        check for check, _ in CHECKS for sections, _, _ in CASES if list(check(build(**sections)))
    }
    assert silent == set()


@pytest.mark.parametrize("method", ["qat", "efficientqat"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_defaults_do_not_contradict(build: Callable[..., Recipe], method: str, bits: int) -> None:
    assert contradictions(build(method=method, quant={"bits": bits}), set()) == []


def test_promoted_codes_ride_in_awq(build: Callable[..., Recipe]) -> None:
    assert contradictions(build(export={"formats": ["awq"], "awq_promote": True}), set()) == []


def test_symmetric_codes_of_eight_bits_go_to_gguf(build: Callable[..., Recipe]) -> None:
    quant = {"bits": 8, "zero_points": "middle"}
    assert contradictions(build(quant=quant, export={"formats": ["gguf"]}), set()) == []
    (problem,) = contradictions(build(quant=quant, export={"formats": ["awq"], "awq_promote": True}), set())
    assert "these can: gptq, bitblas, native, compressed-tensors, mlx, dense, gguf" in problem.text


def test_a_symmetric_grid_takes_any_init(build: Callable[..., Recipe]) -> None:
    assert contradictions(build(quant={"zero_points": "middle", "init": "minmax"}), set()) == []


def test_every_figure_that_is_measured_may_be_expected(build: Callable[..., Recipe]) -> None:
    tasks = {"tasks": ["piqa", "mmlu"]}
    names = ("wikitext2", "wikitext2.kl", "wikitext2.top1_agreement", "piqa", "mmlu_anatomy", "zero_shot")
    expect = {name: {"value": 1.0} for name in (*names, "bits_per_weight")}
    assert contradictions(build(eval={"zero_shot": tasks}, expect=expect), set()) == []


def test_checks_name_keys_of_the_schema() -> None:
    reads = [read for _, keys in CHECKS for read in keys if "." in read]
    assert len(reads) > 20
    unknown = set()
    for read in reads:
        section, key = read.split(".")
        if key not in Recipe.model_fields[section].annotation.model_fields:  # type: ignore[union-attr]
            unknown.add(read)
    assert unknown == {"e2e_qp.lr_weights", "e2e_qp.lr_zero_points"}  # rates that only the other stage has


def test_formats() -> None:
    assert set(FORMAT_BITS) == set(get_args(Format))


def test_a_check_waits_for_keys_that_are_wrong(write: Callable[[Any], Path], minimal: dict[str, Any]) -> None:
    minimal["e2e_qp"] = {"batch_size": "many", "micro_batch_size": 64}
    minimal["export"] = {"formats": ["awq"]}
    minimal["quant"] = {"bits": 8}
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(minimal))
    assert "micro_batch_size" not in caught.value.message  # 64 does not divide the default, but that is not at fault
    assert "e2e_qp.batch_size" in caught.value.message
    assert "cannot carry 8 bits" in caught.value.message


def test_group_sizes_divide_the_layers(build: Callable[..., Recipe]) -> None:
    layers = {"a.up": 576, "a.down": 1536, "lm_head": 500}
    check_group_sizes(build(), layers)
    check_group_sizes(build(quant={"group_size": -1}), layers)
    check_group_sizes(build(quant={"group_size": 128, "overrides": [{"pattern": "*.up", "group_size": 96}]}), layers)


def test_group_sizes_that_do_not(build: Callable[..., Recipe]) -> None:
    layers = {"a.up": 576, "b.up": 576, "a.down": 1536, "lm_head": 500}
    with pytest.raises(RecipeError) as caught:
        check_group_sizes(build(quant={"group_size": 128}), layers)
    assert caught.value.message == "group size 128 does not divide the 576 inputs of a.up, b.up"
    assert caught.value.hint is not None
    assert "8, 12, 16, 24, 32, 48, 64, 96, 192, -1," in caught.value.hint


def test_patterns_that_match_are_patterns_of_whole_names(build: Callable[..., Recipe]) -> None:
    names = ["layers.0.up", "layers.0.down"]
    check_patterns(build(), names, [])
    check_patterns(build(quant={"skip": ["lm_head", "embed_out", "*.up"]}), names, ["embed_out"])
    check_patterns(build(quant={"overrides": [{"pattern": "layers.0.*", "bits": 4}]}), names, [])
    quant = {"skip": ["*.upp"], "overrides": [{"pattern": "*.up", "bits": 4}, {"pattern": "down", "bits": 4}]}
    with pytest.raises(RecipeError) as caught:
        check_patterns(build(quant=quant), names, ["head"])
    assert caught.value.message.splitlines() == [
        "quant.overrides.1.pattern: `down` matches no linear of the model",
        "quant.skip.0: `*.upp` matches no linear of the model",
    ]
    assert "layers.0.down, layers.0.up" in str(caught.value.hint)
    with pytest.raises(RecipeError, match=r"quant\.skip names every linear"):
        check_patterns(build(quant={"skip": ["*.up", "*.down"]}), names, ["head"])
    with pytest.raises(RecipeError, match=r"overrides\.0\.pattern: `head`"):
        check_patterns(build(quant={"overrides": [{"pattern": "head", "bits": 4}]}), names, ["head"])


def test_a_model_without_linears_is_told_so(build: Callable[..., Recipe]) -> None:
    """GPT-2 has convolutions in their place."""
    with pytest.raises(RecipeError, match=r"no nn\.Linear in its blocks"):
        check_patterns(build(), [], ["lm_head"])
