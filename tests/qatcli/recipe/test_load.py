"""A recipe file is loaded, or refused once with everything that is wrong with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qatcli.errors import RecipeError
from qatcli.recipe import Recipe, load_recipe, recipe_name


def refusal(path: Path, overrides: tuple[str, ...] = ()) -> list[str]:
    """The lines of the error, without the path of the recipe."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    assert caught.value.exit_code == 2
    return caught.value.message.replace(str(path), "FILE").splitlines()


def test_a_valid_recipe(write: Callable[[Any], Path], minimal: dict[str, Any]) -> None:
    assert load_recipe(write(minimal)) == Recipe.model_validate(minimal)


def test_numbers_that_pyyaml_reads_as_text(write: Callable[[Any], Path], minimal: dict[str, Any]) -> None:
    text = yaml.safe_dump(minimal) + "block_ap: {lr_units: absolute, lr_weights: 1e-4, lr_scales: 1E-4, lr_norms: 0,\n"
    recipe = load_recipe(write(text + "  lr_zero_points: 1e-4}\n"), ["block_ap.grad_clip=1e0"])
    assert isinstance(yaml.safe_load("1e-4"), str)
    assert (recipe.block_ap.lr_weights, recipe.block_ap.lr_scales, recipe.block_ap.grad_clip) == (1e-4, 1e-4, 1.0)


def test_everything_is_reported_at_once(
    write: Callable[[Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("QAT_NOT_SET", raising=False)
    path = write(
        """
        method: efficientqat2
        model: {source: ./nowhere, gguf: x}
        quant: {bits: 5, groupsize: 64}
        calibrate:
          data: [{source: "${QAT_NOT_SET}/a.jsonl", fromat: text}]
          samples: yes
          seq_len: many
          epochs: 3
        block_ap: [1]
        e2e_qp: {micro_batch_size: 3, train: [scale]}
        export: {formats: [gptqq]}
        eval: {perplexity: [{name: a, source: nowhere.txt}], prompts: [3]}
        expect: {a: {value: x}, b: 7}
        colour: blue
        """
    )
    lines = [
        line.replace(f"{tmp_path}/", "FOLDER/").replace(" (paths are relative to the recipe file)", "")
        for line in refusal(path, ("pack.dtype=int4", "calibrate.data.3.source=x"))
    ]
    assert sorted(lines) == sorted(
        [
            'FILE: method = "efficientqat2": must be one of qat, efficientqat; did you mean efficientqat?',
            'FILE: model.source = "./nowhere": no such file or folder: FOLDER/nowhere',
            'FILE: model.gguf = "x": unknown key; one of source, revision, gguf_file, trust_remote_code; did you mean '
            "gguf_file?",
            "FILE: quant.bits = 5: must be one of 2, 3, 4, 8",
            "FILE: quant.groupsize = 64: unknown key; one of bits, group_size, zero_points, init, overrides, skip; did "
            "you mean group_size?",
            'FILE: calibrate.data.0.source = "${QAT_NOT_SET}/a.jsonl": the environment variable QAT_NOT_SET is not set',
            'FILE: calibrate.data.0.fromat = "text": unknown key; one of source, name, split, revision, files, '
            "field, weight, streaming, format, template, packing, bos; did you mean format?",
            "FILE: calibrate.samples = true: must be a number",
            'FILE: calibrate.seq_len = "many": should be a valid integer, unable to parse string as an integer',
            "FILE: calibrate.epochs = 3: unknown key; one of data, samples, validation_samples, seq_len, seed, "
            "moment_samples; did you mean block_ap.epochs or e2e_qp.epochs?",
            "FILE: block_ap = [1]: must be a mapping of keys",
            'FILE: e2e_qp.train.0 = "scale": must be one of scales, norms; did you mean scales?',
            "FILE: e2e_qp.micro_batch_size = 3: must divide batch_size 32: 1, 2, 4, 8, 16, 32",
            '--set: pack.dtype = "int4": must be one of auto, float16, bfloat16, float32',
            "--set: calibrate.data.3.source=x: calibrate.data is a list of 1; its items are numbered from 0",
            'FILE: export.formats.0 = "gptqq": must be one of gptq, bitblas, native, gguf, awq, compressed-tensors, '
            "mlx, dense; did you mean gptq?",
            'FILE: eval.perplexity.0.source = "nowhere.txt": no such file: FOLDER/nowhere.txt',
            "FILE: eval.prompts.0 = 3: must be text; quote it if it is",
            'FILE: expect.a.value = "x": should be a valid number, unable to parse string as a number',
            "FILE: expect.b = 7: must be a mapping of keys",
            'FILE: colour = "blue": unknown key; one of method, model, quant, calibrate, block_ap, e2e_qp, pack, '
            "export, eval, expect, track",
        ]
    )


def test_an_empty_file_of_sections(write: Callable[[Any], Path]) -> None:
    assert refusal(write("model:\nquant: {}\n")) == [
        "FILE: model: is required",
        "FILE: quant.bits: is required",
        "FILE: calibrate: is required",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "FILE: must be a mapping of keys, but it is empty"),
        ("- a", "FILE: must be a mapping of keys, but it is a list"),
        ("just text", "FILE: must be a mapping of keys, but it is a str"),
        ("quant: {bits: 2", "FILE: line 1, column 16: "),
        (b"a: \xff", "FILE: byte 3: not UTF-8 text"),
        (b"a: 1\x00", "FILE: character 4: "),
    ],
)
def test_no_recipe_at_all(write: Callable[[Any], Path], content: str | bytes, message: str) -> None:
    lines = refusal(write(content))
    assert len(lines) == 1
    assert lines[0].startswith(message)


def test_a_missing_file_names_those_beside_it(tmp_path: Path) -> None:
    (tmp_path / "w2g64.yaml").touch()
    with pytest.raises(RecipeError, match="No such file") as caught:
        load_recipe(tmp_path / "w2g46.yaml")
    assert caught.value.hint == f"there is {tmp_path / 'w2g64.yaml'}"
    assert refusal(tmp_path) == ["FILE: Is a directory"]
    assert len(refusal(tmp_path / "nul\0")) == 1


def test_paths_and_variables(
    write: Callable[[Any], Path], minimal: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").touch()
    monkeypatch.setenv("QAT_TEST_FOLDER", str(tmp_path))
    monkeypatch.chdir("/")
    minimal["model"]["source"] = "./."
    minimal["calibrate"]["data"] = [{"source": "a.jsonl"}, {"source": "${QAT_TEST_FOLDER}/*.jsonl"}]
    minimal["block_ap"] = {"cache": {"dir": "cache"}, "epochs": "${QAT_TEST_EPOCHS:-5}"}
    minimal["eval"] = {"perplexity": [{"name": "a", "source": "a.jsonl"}], "prompts": ["$${literal} $HOME"]}
    recipe = load_recipe(write(minimal))
    assert recipe.model.source == str(tmp_path)
    assert [data.source for data in recipe.calibrate.data] == [f"{tmp_path}/a.jsonl", f"{tmp_path}/*.jsonl"]
    assert (recipe.block_ap.cache.dir, recipe.block_ap.epochs) == (f"{tmp_path}/cache", 5)
    assert recipe.eval.perplexity[0].source == f"{tmp_path}/a.jsonl"
    assert recipe.eval.prompts == ("${literal} $HOME",)


def test_bits_from_a_variable(
    write: Callable[[Any], Path], minimal: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QAT_TEST_BITS", "2")
    override = {"pattern": "*", "bits": "${QAT_TEST_BITS}"}
    minimal["quant"] = {"bits": "${QAT_TEST_BITS}", "group_size": "32", "overrides": [override]}
    quant = load_recipe(write(minimal)).quant
    assert (quant.bits, quant.group_size, quant.overrides[0].bits) == (2, 32, 2)
    assert quant.zero_points == "central", "the preset of 2 bits"


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("export.formats=gptq", '--set: export.formats = "gptq": must be a list, such as [gptq]'),
        ("export.formats=gptqq", '--set: export.formats = "gptqq": must be a list, such as [gptq]'),
        ("export.formats=[]", "--set: export.formats = []: must not be an empty list"),
        ("quant.skip=lm_head", '--set: quant.skip = "lm_head": must be a list, such as [lm_head]'),
        ("quant.overrides=x", '--set: quant.overrides = "x": must be a list of mappings with pattern'),
        ("calibrate.data=a/b", '--set: calibrate.data = "a/b": must be a list of mappings with source'),
        ("e2e_qp.data=a/b", '--set: e2e_qp.data = "a/b": must be a list of mappings with source'),
        ("track=wandb", '--set: track = "wandb": must be a list, such as [wandb]'),
        ("eval.prompts=3", "--set: eval.prompts = 3: must be a list"),
        ("eval.zero_shot.tasks=[]", "--set: eval.zero_shot.tasks = []: must not be an empty list"),
        ("eval.zero_shot.tasks=piqa", '--set: eval.zero_shot.tasks = "piqa": must be a list, such as [piqa]'),
        ("calibrate.data.0.field=''", '--set: calibrate.data.0.field = "": must not be empty'),
        ("quant.bits='5'", "--set: quant.bits = 5: must be one of 2, 3, 4, 8"),
    ],
)
def test_lists_and_texts_are_named_as_in_a_recipe(
    write: Callable[[Any], Path], minimal: dict[str, Any], override: str, line: str
) -> None:
    assert refusal(write(minimal), (override,)) == [line]


def test_set(write: Callable[[Any], Path], minimal: dict[str, Any]) -> None:
    changes = ["quant.bits=3", "calibrate.data.0.weight=2", "quant.skip=[a, b]", "block_ap.cache.host_gb=1e1"]
    recipe = load_recipe(write(minimal), changes)
    assert (recipe.quant.bits, recipe.calibrate.data[0].weight) == (3, 2.0)
    assert (recipe.quant.skip, recipe.block_ap.cache.host_gb) == (("a", "b"), 10.0)


def test_set_can_choose_the_method(write: Callable[[Any], Path], minimal: dict[str, Any]) -> None:
    recipe = load_recipe(write(minimal), ["method=efficientqat", "quant.bits=4"])
    assert recipe.block_ap.lr_weights == 1e-5


def test_set_names_the_nearest_key(write: Callable[[Any], Path], minimal: dict[str, Any]) -> None:
    lines = refusal(write(minimal), ("block_ap.epoch=3", "blockap.epochs=3"))
    assert lines[0].startswith("--set: block_ap.epoch = 3: unknown key; ")
    assert lines[0].endswith("; did you mean epochs?")
    assert lines[1].startswith("--set: blockap: unknown key; ")
    assert lines[1].endswith("; did you mean block_ap?")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("recipes/llama-2-7b/w2g64.yaml", "llama-2-7b/w2g64"),
        ("/home/me/recipes/old/recipes/demo/w4g64.yaml", "demo/w4g64"),
        ("/home/recipes/mine.yaml", "mine"),
        ("/home/experiments/try.v2.yaml", "experiments/try.v2"),
        ("/try.yaml", "try"),
        ("a/../recipes/./x/y.yml", "x/y"),
    ],
)
def test_recipe_name(path: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert recipe_name(path) == name
    assert recipe_name(Path(path)) == name


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(
        [
            "qat",
            "reach",
            "gguf",
            "./x",
            "*",
            "${HOME}",
            "${",
            "$${",
            "1e-4",
            "a.jsonl",
            "\0",
            "~nobody/x",
        ]
    )
)
KEYS = st.text(max_size=4) | st.sampled_from(
    [
        *Recipe.model_fields,
        "source",
        "bits",
        "group_size",
        "data",
        "overrides",
        "pattern",
        "cache",
        "train",
        "formats",
        "perplexity",
        "prompts",
        "value",
        "lr_scales",
        "batch_size",
        "micro_batch_size",
        "lr_units",
    ]
)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=5))
RECIPES = st.fixed_dictionaries(
    {}, optional={name: st.dictionaries(KEYS, VALUES, max_size=5) | SCALARS for name in Recipe.model_fields}
)
SETS = st.builds("{}.{}={}".format, st.sampled_from(list(Recipe.model_fields)), KEYS, st.text(max_size=8))
FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(data=RECIPES, complete=st.booleans(), overrides=st.lists(st.sampled_from(("", "x.y=1", "quant.bits=[")) | SETS))
def test_any_mapping_is_loaded_or_refused(
    write: Callable[[Any], Path], minimal: dict[str, Any], data: Any, complete: bool, overrides: list[str]
) -> None:
    if complete:  # what is required is there, so that the rest is looked at closely
        data = {**data, **{name: {**_mapping(data.get(name)), **section} for name, section in minimal.items()}}
    try:
        recipe = load_recipe(write(yaml.safe_dump(data, allow_unicode=False)), overrides)
    except RecipeError:
        return
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe  # as a stage keeps it


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


@FUZZ
@given(text=st.text(alphabet=st.characters(codec="utf-8")) | st.text(alphabet="ab: \n-[]{}&*!|>'\"%@?#,0", max_size=40))
def test_any_text_is_loaded_or_refused(write: Callable[[Any], Path], text: str) -> None:
    with pytest.raises(RecipeError):
        load_recipe(write(text.encode("utf-8")))


@FUZZ
@given(content=st.binary(max_size=64))
def test_any_bytes_are_refused(write: Callable[[Any], Path], content: bytes) -> None:
    with pytest.raises(RecipeError):
        load_recipe(write(content))


@pytest.mark.parametrize(
    "value", ['"\\ud800"', '"\\0"', '"./\\ud800"', '["./\\0"]', "2020-01-01", "0x10", "1:30", ".nan"]
)
def test_odd_scalars_are_refused(write: Callable[[Any], Path], value: str) -> None:
    text = "quant: {{bits: 2}}\ncalibrate: {{data: [{{source: a/b}}]}}\nmodel: {{source: {}}}"
    assert len(refusal(write(text.format(value)))) == 1
