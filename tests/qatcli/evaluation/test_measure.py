"""Several models measured side by side: what is in the result, what is kept, what computes the same."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from functools import cached_property
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from qatcli.data import text_tokens
from qatcli.errors import InputError
from qatcli.evaluation import cache, candidates, measure
from qatcli.evaluation.candidates import Candidate
from qatcli.evaluation.compare import compare
from qatcli.evaluation.opening import open_candidate
from qatcli.evaluation.tables import tables
from qatcli.hf import load_packed
from qatcli.linear import PackedLinear, dense_linears
from qatcli.models.source import ModelSource, open_source
from qatcli.recipe import EvalSection, PerplexityText, SpeedSection
from qatcli.runlog import RunLog
from qatcli.training import compute_dtype

CPU = torch.device("cpu")
QUIET = RunLog(verbosity=-1)


@pytest.fixture(scope="module")
def packed(tiny_llama: Path, pack_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_model(tiny_llama, tmp_path_factory.mktemp("packed") / "model", bits=3)


@pytest.fixture
def config(tiny_text: Path) -> EvalSection:
    text = PerplexityText(name="tiny", source=str(tiny_text), seq_len=32, windows=4)
    speed = SpeedSection(prompt_tokens=8, new_tokens=2, repeats=1)
    return EvalSection(perplexity=(text,), speed=speed, prompts=("the cat",), max_new_tokens=3)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def _compare(packed: Path, full: Path, config: EvalSection) -> dict[str, Any]:
    return compare([str(packed), str(full)], config, against=str(full), device=CPU, log=QUIET)


def test_every_figure_is_there(packed: Path, tiny_llama: Path, config: EvalSection) -> None:
    found = _compare(packed, tiny_llama, config)
    json.dumps(found, allow_nan=False)
    assert list(found["models"]) == [str(tiny_llama), str(packed)], "full precision comes first, and once"
    full, quantized = found["models"].values()
    assert 1 < full["perplexity"]["tiny"] < quantized["perplexity"]["tiny"]
    assert full["divergence"] == {}
    assert set(quantized["divergence"]["tiny"]) == {"mean_kl", "kl_stderr", "kl_99", "top1_agreement", "tokens"}
    assert 0 < quantized["divergence"]["tiny"]["mean_kl"] < quantized["divergence"]["tiny"]["kl_99"]
    assert found["protocol"]["tiny"]["windows"] == 4
    assert found["protocol"]["tiny"]["context"] == 32
    assert quantized["size"]["file_bytes"] < full["size"]["file_bytes"] / 2
    for model in (full, quantized):
        assert model["speed"]["prefill"] > 0
        assert model["speed"]["decode"] > 0
        assert model["samples"][0]
    assert quantized["speed"]["weight_bytes"] < full["speed"]["weight_bytes"] / 2
    assert found["speed_protocol"]["threads"] == torch.get_num_threads()
    console = Console(file=StringIO(), width=120)
    for table in tables(found):
        console.print(table)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    apart = quantized["divergence"]["tiny"]
    for said in (
        f" {apart['mean_kl']:.4f} +-{apart['kl_stderr']:.4f} ",
        "tiny.jsonl, the whole file, 4 windows of 32 tokens, the first windows, none overlap",
        "KL 99 %",
        "packed codes",
        "8 tokens read",
        "the same prompt",
    ):
        assert said in shown


def test_full_precision_that_does_not_fit_is_read_block_by_block(
    packed: Path, tiny_llama: Path, config: EvalSection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its perplexity and all divergences are the same; what needs the whole model is left out, with a word."""
    monkeypatch.setattr(measure, "compute_dtype", lambda *_: torch.float32)  # bf16 would round between the blocks, too
    expected = _compare(packed, tiny_llama, config)
    monkeypatch.setattr(candidates, "fits", lambda *_: False)
    monkeypatch.setattr(ModelSource, "load_model", lambda *_: pytest.fail("loaded as a whole"))
    warned: list[str] = []
    monkeypatch.setattr(RunLog, "warn", lambda _, text: warned.append(text))
    found = _compare(packed, tiny_llama, config)
    (full, quantized), (whole, same) = (list(each["models"].values()) for each in (found, expected))
    assert full["loaded_as"] == f"block by block, in {str(compute_dtype('auto', CPU)).removeprefix('torch.')}"
    assert full["perplexity"]["tiny"] == pytest.approx(whole["perplexity"]["tiny"], rel=1e-4)
    assert full["size"] == whole["size"]
    assert (full["speed"], full["zero_shot"], full.get("samples")) == (None, None, None)
    for figure, value in same["divergence"]["tiny"].items():
        assert quantized["divergence"]["tiny"][figure] == pytest.approx(value, rel=1e-3)
    assert quantized["speed"]["decode"] > 0
    assert warned == [f"{tiny_llama} does not fit: of it neither speed, tasks nor samples"]
    console = Console(file=StringIO(), width=200)
    for table in tables(found):
        console.print(table)
    assert "block by block" in console.file.getvalue()  # type: ignore[attr-defined]
    alone = compare([str(tiny_llama)], config, against=None, device=CPU, log=QUIET)
    assert [table.renderables[0].title for table in tables(alone)] == [  # type: ignore[attr-defined]
        *("perplexity and divergence from full precision", "size")
    ]
    with pytest.raises(InputError, match="does not fit: nothing but perplexity"):
        compare([str(tiny_llama)], config.model_copy(update={"perplexity": ()}), against=None, device=CPU, log=QUIET)


def test_codes_and_families_that_are_not_read_block_by_block_are_loaded_as_they_were(
    tiny_llama: Path, save_random_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(candidates, "fits", lambda *_: False)
    assert candidates.full_precision(open_source(str(tiny_llama)), CPU, keep=False).streamed is not None
    coded = shutil.copytree(tiny_llama, tmp_path / "coded")
    settings = json.loads((coded / "config.json").read_text())
    (coded / "config.json").write_text(json.dumps({**settings, "quantization_config": {"quant_method": "fp8"}}))
    mixture = save_random_model("MixtralConfig", num_local_experts=2)
    for folder in (coded, mixture):
        assert candidates.full_precision(open_source(str(folder)), CPU, keep=False).streamed is None


def test_figures_of_a_model_read_block_by_block_are_not_kept(
    packed: Path, tiny_llama: Path, config: EvalSection, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Any] = []
    monkeypatch.setattr(measure, "remembered", lambda protocol, *rest: kept.append(protocol) or rest[-1]())
    for fitting, count in ((True, 1), (False, 0)):
        monkeypatch.setattr(candidates, "fits", lambda *_, fitting=fitting: fitting)
        reference = candidates.full_precision(open_source(str(tiny_llama)), CPU, keep=True)
        measure.measure([reference], config, reference=None, device=CPU, log=QUIET)
        assert len(kept) == count
        kept.clear()


def test_windows_may_begin_with_the_first_token(tiny_llama: Path, config: EvalSection) -> None:
    """Another protocol than without: it is named, and it is what the perplexity is of."""
    asked = config.perplexity[0].model_copy(update={"bos": "window", "windows": 3})
    found = compare(
        [str(tiny_llama)], config.model_copy(update={"perplexity": (asked,)}), against=None, device=CPU, log=QUIET
    )
    model, tokenizer = (kind.from_pretrained(tiny_llama) for kind in (AutoModelForCausalLM, PreTrainedTokenizerFast))
    text = text_tokens(asked.source, tokenizer)[: 3 * 32].reshape(3, 32)
    losses = []
    for row in text:
        tokens = (
            row if row[0] == tokenizer.bos_token_id else torch.cat([torch.tensor([tokenizer.bos_token_id]), row[:-1]])
        )
        with torch.no_grad():
            losses.append(float(model(input_ids=tokens[None], labels=tokens[None]).loss))
    assert model.dtype == torch.float32
    assert found["models"][str(tiny_llama)]["perplexity"]["tiny"] == pytest.approx(math.exp(sum(losses) / 3), rel=0.02)
    console = Console(file=StringIO(), width=160)
    for table in tables(found):
        console.print(table)
    assert "each behind the first token" in console.file.getvalue()  # type: ignore[attr-defined]


def test_windows_are_those_of_every_model(tiny_llama: Path, config: EvalSection, tmp_path: Path) -> None:
    """Another tokenizer makes another number of windows of the same text."""
    other = _with_another_tokenizer_of(tiny_llama, tmp_path / "other")
    texts = tuple(text.model_copy(update={"windows": None}) for text in config.perplexity)
    config = config.model_copy(update={"perplexity": texts, "speed": None, "prompts": ()})
    found = compare([str(tiny_llama), str(other)], config, against=None, device=CPU, log=QUIET)
    counts = found["protocol"]["tiny"]["windows"]
    assert counts[str(other)] < counts[str(tiny_llama)]
    text = text_tokens(config.perplexity[0].source, PreTrainedTokenizerFast.from_pretrained(other))
    assert counts[str(other)] == len(text) // 32
    console = Console(file=StringIO(), width=200)
    for table in tables(found):
        console.print(table)
    said = f"{counts[str(tiny_llama)]} windows ({tiny_llama.name}), {counts[str(other)]} windows (other) of 32 tokens"
    assert said in console.file.getvalue()  # type: ignore[attr-defined]


def _with_another_tokenizer_of(model: Path, out: Path) -> Path:
    """The same model, whose tokenizer has `th` for `z`."""
    shutil.copytree(model, out)
    tokenizer = json.loads((out / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["th"] = vocabulary.pop("z")
    tokenizer["model"]["merges"] = [["t", "h"]]
    (out / "tokenizer.json").write_text(json.dumps(tokenizer))
    return out


def test_other_tokens_are_refused_before_anything_is_measured(
    tiny_llama: Path, config: EvalSection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = _with_another_tokenizer_of(tiny_llama, tmp_path / "other")
    monkeypatch.setattr(measure, "_speed", lambda *_: pytest.fail("measured"))
    with pytest.raises(InputError, match="have different tokenizers"):
        _compare(other, tiny_llama, config)


def test_loading_is_part_of_the_memory_that_is_measured(
    tiny_llama: Path, config: EvalSection, monkeypatch: pytest.MonkeyPatch
) -> None:
    speed, loaded = measure._speed, []

    def watched(subject: measure.Subject, *rest: Any) -> dict[str, Any]:
        loaded.append("model" in vars(subject))
        return speed(subject, *rest)

    monkeypatch.setattr(measure, "_speed", watched)
    compare([str(tiny_llama)], config, against=None, device=CPU, log=QUIET)
    assert loaded == [False]


def test_a_padded_vocabulary_does_not_count(tiny_llama: Path, config: EvalSection, tmp_path: Path) -> None:
    """Some tools round the number of embeddings up; no text has these tokens."""
    padded = tmp_path / "padded"
    shutil.copytree(tiny_llama, padded)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.resize_token_embeddings(model.config.vocab_size + 7)
    model.save_pretrained(padded)
    found = _compare(padded, tiny_llama, config.model_copy(update={"speed": None}))
    assert found["models"][str(padded)]["divergence"]["tiny"]["mean_kl"] == pytest.approx(0, abs=1e-5)


def test_windows_beyond_the_context_are_named(
    save_tiny_llama: Callable[..., Path], config: EvalSection, capsys: pytest.CaptureFixture[str]
) -> None:
    short = save_tiny_llama("short", max_position_embeddings=16)
    config = config.model_copy(update={"speed": None, "prompts": ()})
    compare([str(short)], config, against=None, device=CPU, log=RunLog())
    assert "context of 16 tokens and is measured on windows of 32 (tiny)" in capsys.readouterr().err


@pytest.fixture(scope="module")
def of_32_positions(tiny_llama: Path, save_random_model: Callable[..., Path]) -> Path:
    """An OPT, whose positions are a table."""
    model = save_random_model(
        "OPTConfig", max_position_embeddings=32, vocab_size=258, ffn_dim=64, word_embed_proj_dim=32
    )
    for file in tiny_llama.glob("tokenizer*"):
        shutil.copy(file, model)
    return model


@pytest.mark.parametrize(
    ("asked", "what"),
    [
        ({"seq_len": 33}, "windows of 33"),
        ({"new_tokens": 25}, "speed"),
        ({"prompts": ("long " * 99,)}, "the prompt 'long"),
    ],
)
def test_beyond_a_table_of_positions_nothing_is_measured(
    of_32_positions: Path, config: EvalSection, asked: dict[str, Any], what: str
) -> None:
    text, speed = config.perplexity[0], config.speed
    assert speed is not None
    wanted = {"perplexity": (text.model_copy(update=asked),), "speed": speed.model_copy(update=asked), **asked}
    with pytest.raises(InputError, match=f"context of 32 tokens and is measured on {what}.*no positions") as caught:
        compare([str(of_32_positions)], config.model_copy(update=wanted), against=None, device=CPU, log=QUIET)
    assert "ask for 32 or less" in (caught.value.hint or "")


def test_as_many_tokens_as_positions_are_no_table_of_positions(save_random_model: Callable[..., Path]) -> None:
    for kind, table in (("LlamaConfig", False), ("OPTConfig", True)):
        sizes = {"vocab_size": 64, "max_position_embeddings": 64, "ffn_dim": 64, "word_embed_proj_dim": 32}
        model = AutoModelForCausalLM.from_pretrained(save_random_model(kind, **sizes))
        assert measure._context(model) == (64, table)


def test_a_prompt_is_continued_to_the_end_of_a_table_of_positions(of_32_positions: Path, config: EvalSection) -> None:
    longer = config.model_copy(update={"max_new_tokens": 100, "perplexity": (), "speed": None})
    found = compare([str(of_32_positions)], longer, against=None, device=CPU, log=QUIET)
    assert found["models"][str(of_32_positions)]["samples"]


def test_full_precision_is_measured_once(
    packed: Path, tiny_llama: Path, config: EvalSection, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []
    perplexity = measure._perplexity

    def counted(subject: Any, *arguments: Any) -> float:
        measured.append(subject.name)
        return perplexity(subject, *arguments)

    monkeypatch.setattr(measure, "_perplexity", counted)
    first = _compare(packed, tiny_llama, config)
    again = _compare(packed, tiny_llama, config)
    assert measured == [str(tiny_llama), str(packed), str(packed)]
    for name, model in first["models"].items():
        assert again["models"][name]["perplexity"] == model["perplexity"]
    _compare(packed, tiny_llama, config.model_copy(update={"cache": False}))
    assert measured[3:] == [str(tiny_llama), str(packed)]


@pytest.mark.parametrize("change", ["text", "first token", "device", "code"])
def test_what_was_measured_under_other_circumstances_is_measured_again(
    tiny_llama: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """A text that was edited keeps its name; the figure of the old one must not be taken for its own."""
    file = tmp_path / "text.jsonl"
    lines = tiny_text.read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text("".join(lines), encoding="utf-8")
    text = PerplexityText(name="text", source=str(file), seq_len=32, windows=4)
    measured: list[float] = []
    perplexity = measure._perplexity
    monkeypatch.setattr(measure, "_perplexity", lambda *all_: measured.append(perplexity(*all_)) or measured[-1])

    def figure(asked: PerplexityText) -> float:
        section = EvalSection(perplexity=(asked,), prompts=())
        (found,) = compare([str(tiny_llama)], section, against=str(tiny_llama), device=CPU, log=QUIET)[
            "models"
        ].values()
        return found["perplexity"]["text"]

    first = figure(text)
    assert figure(text) == first
    assert len(measured) == 1
    if change == "text":
        file.write_text("".join(reversed(lines)), encoding="utf-8")
    elif change == "first token":
        text = text.model_copy(update={"bos": "window"})
    elif change == "device":
        monkeypatch.setattr(cache, "device_name", lambda _: "another")
    else:
        monkeypatch.setattr(cache, "CODE", "another")
    again = figure(text)
    assert len(measured) == 2
    assert (again == first) == (change in ("device", "code"))


def _with_other_weights(model: Path, protocol: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    content = bytearray((model / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (model / "model.safetensors").write_bytes(content)
    return model, protocol


def _with_another_tokenizer(model: Path, protocol: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    (model / "tokenizer.json").write_text((model / "tokenizer.json").read_text() + " ")
    return model, protocol


def _with_another_protocol(model: Path, protocol: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    return model, {**protocol, "windows": 5}


@pytest.mark.parametrize("change", [_with_other_weights, _with_another_tokenizer, _with_another_protocol])
def test_nothing_stale_is_served(
    tmp_path: Path, change: Callable[[Path, dict[str, Any]], tuple[Path, dict[str, Any]]]
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")
    (model / "tokenizer.json").write_text("{}")
    protocol: dict[str, Any] = {"text": "a", "windows": 4}
    assert cache.remembered(protocol, model, CPU, lambda: 1.0) == 1.0
    assert cache.remembered(protocol, model, CPU, lambda: 2.0) == 1.0
    cache.files_digest.cache_clear()  # a new process
    model, protocol = change(model, protocol)
    assert cache.remembered(protocol, model, CPU, lambda: 3.0) == 3.0


def test_a_cache_that_is_damaged_or_not_to_be_written_costs_time_only(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask() -> Any:
        return cache.remembered({"a": 1}, tiny_llama, CPU, lambda: 7)

    assert ask() == 7
    (kept,) = (tmp_path / "cache").rglob("*.json")
    for content in ("", "[]", "{}"):
        kept.write_text(content)
        assert ask() == 7
    assert json.loads(kept.read_text())["result"] == 7
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # nothing can be made below it
    assert ask() == 7


def test_another_version_measures_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache.remembered({}, tmp_path, CPU, lambda: 1.0) == 1.0
    monkeypatch.setattr(cache, "version", lambda name: "0.0")
    assert cache.remembered({}, tmp_path, CPU, lambda: 2.0) == 2.0


def test_fp32_is_fp32_whatever_the_weights_are_stored_in(packed: Path, config: EvalSection) -> None:
    def load() -> Any:
        return load_packed(packed, dtype=torch.float16, device=CPU)

    subject = measure.Subject(Candidate("half", load, lambda: None, packed, "packed codes"), config)
    assert {parameter.dtype for parameter in subject.model.parameters()} == {torch.float16, torch.float32}
    model = measure._fast(subject, CPU, torch.float32)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_on_a_gpu_one_model_at_a_time_is_loaded(
    packed: Path, tiny_llama: Path, config: EvalSection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full precision is released for its logits; the figures are the same."""
    loaded: list[str] = []
    release, load = measure.Subject.release, measure.Subject.model.func

    def model(subject: measure.Subject) -> Any:
        loaded.append(subject.name)
        assert len(loaded) == 1, loaded
        return load(subject)

    def released(subject: measure.Subject) -> None:
        release(subject)
        if subject.name in loaded:
            loaded.remove(subject.name)

    expected = _compare(packed, tiny_llama, config.model_copy(update={"cache": False}))
    monkeypatch.setattr(measure, "MEMORY_OF_THEIR_OWN", ("cpu",))
    watched = cached_property(model)
    watched.__set_name__(measure.Subject, "model")
    monkeypatch.setattr(measure.Subject, "model", watched)
    monkeypatch.setattr(measure.Subject, "release", released)
    found = _compare(packed, tiny_llama, config.model_copy(update={"cache": False}))
    for name, figures in expected["models"].items():
        assert found["models"][name]["perplexity"] == figures["perplexity"]
        assert found["models"][name]["divergence"] == figures["divergence"]
    assert found["models"][str(packed)]["divergence"]["tiny"]["mean_kl"] > 0


def test_the_reference_is_measured_first(packed: Path, tiny_llama: Path, config: EvalSection) -> None:
    given = [open_candidate(str(path), CPU) for path in (packed, tiny_llama)]
    found = measure.measure(given, config, reference=given[1], device=CPU, log=QUIET)
    assert list(found["models"]) == [str(tiny_llama), str(packed)]
    alone = measure.measure(given[:1], config, reference=given[1], device=CPU, log=QUIET)
    assert alone["models"][str(packed)]["divergence"] == found["models"][str(packed)]["divergence"] != {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_linears_compute_what_packed_ones_do(packed: Path, dtype: torch.dtype) -> None:
    model = load_packed(packed, dtype=dtype, device=CPU)
    tokens = torch.arange(2, 40)[None]
    with torch.no_grad():
        before = model(tokens).logits
        dense_linears(model, dtype)
        after = model(tokens).logits
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    assert torch.equal(before, after)
