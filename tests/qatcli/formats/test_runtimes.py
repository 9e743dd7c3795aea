"""Third-party libraries load each export and agree with the checkpoint; skipped where they are not installed."""

from __future__ import annotations

import importlib.util
import shutil
import signal
import subprocess
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from qatcli import machine
from qatcli.errors import InputError
from qatcli.formats import FORMATS, ExportOptions, runtimes, source
from qatcli.formats.contract import RuntimeReport, Verification
from qatcli.formats.runtimes import RUNTIMES, obstacle, run, verify_in
from qatcli.formats.runtimes.reference import dense_model, dense_weight, logits, perplexity, prompts, reference
from qatcli.packed import PackedCheckpoint, read_config
from qatcli.shards import shard_map

Packed = Callable[..., PackedCheckpoint]
ROOT = Path(__file__).resolve().parents[3]
WITHOUT = ExportOptions(runtimes=False)


def _needs(name: str) -> None:
    missing = [module for module in RUNTIMES[name].imports if importlib.util.find_spec(module) is None]
    if missing:
        pytest.skip(f"{missing[0]} is not installed (pip install 'qatcli[{RUNTIMES[name].extra}]')")


_MIXED = {"kinds": {"layers.1.mlp.down_proj": (4, 32)}, "skip": ("layers.0.self_attn",)}
CASES = [
    ("gptq", "gptqmodel", 2, _MIXED),
    ("gptq", "gptqmodel", 3, {"group_size": -1}),
    ("gptq", "gptqmodel", 8, {}),
    ("gptq", "transformers", 4, {"symmetric": True}),
    ("gptq", "transformers", 2, {"skip": ("layers.0.self_attn", "layers.1.mlp.up_proj")}),
    ("awq", "gptqmodel", 4, {}),
    ("awq", "transformers", 2, _MIXED),
    ("compressed-tensors", "compressed-tensors", 3, _MIXED),
    ("compressed-tensors", "compressed-tensors", 4, {"symmetric": True}),
    ("compressed-tensors", "compressed-tensors", 8, {}),
    ("mlx", "mlx", 3, _MIXED),
    ("mlx", "mlx", 8, {}),
    ("native", "transformers-native", 3, _MIXED),
    ("native", "transformers-native", 8, {}),
    ("dense", "transformers-dense", 2, _MIXED),
    ("gguf", "gguf", 2, {}),
    ("gguf", "llama.cpp", 4, {}),
    ("gguf", "llama.cpp", 3, _MIXED),
]


@pytest.mark.slow
@pytest.mark.parametrize(("format_name", "runtime", "bits", "options"), CASES)
def test_runtime_computes_what_the_checkpoint_says(
    packed: Packed, tmp_path: Path, format_name: str, runtime: str, bits: int, options: dict[str, object]
) -> None:
    _needs(runtime)
    checkpoint = packed(bits, **options)
    # Files this small make many shards: every runtime has to find its tensors through the index.
    sharded = replace(WITHOUT, awq_promote=True, max_shard_bytes=60_000)
    FORMATS[format_name].write(checkpoint, tmp_path / "out", sharded)
    assert format_name == "gguf" or (tmp_path / "out" / "model.safetensors.index.json").is_file()
    report = run(runtime, checkpoint, tmp_path / "out", reference(checkpoint))
    assert report.ran
    assert report.differences == ()
    if runtime != "gguf" and not (runtime == "compressed-tensors" and "kinds" in options):
        assert report.max_logit_difference is not None
        assert report.logit_tolerance is not None


@pytest.mark.parametrize("config", ["LlamaConfig", "Gemma3TextConfig"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_reference_is_the_model_with_rounded_weights(
    save_random_model: Callable[..., Path], pack: Packed, tmp_path: Path, config: str, tied: bool
) -> None:
    path = save_random_model(config, tie_word_embeddings=tied, num_hidden_layers=2)
    checkpoint = pack(path, tmp_path / "packed", bits=4, group_size=16)
    expected = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    for name in checkpoint.modules:
        weight = torch.from_numpy(dense_weight(source.arrays(checkpoint, name)))
        expected.get_submodule(name).weight.data.copy_(weight)
    np.testing.assert_array_equal(logits(dense_model(checkpoint)), logits(expected))


def test_the_reference_of_a_family_whose_checkpoints_have_other_names(save_random_model: Callable[..., Path]) -> None:
    folder = save_random_model("GPTNeoXConfig")
    expected = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    found = dense_model(PackedCheckpoint(folder, read_config(folder), {}, shard_map(folder)))
    np.testing.assert_array_equal(logits(found), logits(expected))


def test_the_reference_holds_every_weight_once(packed: Packed, monkeypatch: pytest.MonkeyPatch) -> None:
    build, made = transformers.AutoModelForCausalLM.from_config, []

    def without_memory(*args: object, **options: object) -> object:
        model = build(*args, **options)
        assert all(parameter.is_meta for parameter in model.parameters())
        return model

    def recorded(linear: source.Arrays) -> np.ndarray:
        made.append(dense_weight(linear))
        return made[-1]

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_config", without_memory)
    monkeypatch.setitem(dense_model.__globals__, "dense_weight", recorded)
    model = dense_model(packed(4))
    there = {model.get_submodule(name).weight.data_ptr() for name in packed(4).modules}
    assert there == {array.ctypes.data for array in made}


def test_a_tensor_that_the_reference_lacks_is_named(packed: Packed) -> None:
    shards = {name: file for name, file in packed(4).shards.items() if name != "lm_head.weight"}
    with pytest.raises(InputError, match=r"lm_head\.weight"):
        dense_model(replace(packed(4), shards=shards))


@pytest.mark.slow
def test_perplexity_in_a_runtime_is_the_checkpoints_own(packed: Packed, tmp_path: Path) -> None:
    checkpoint, out = packed(4), tmp_path / "out"
    FORMATS["native"].write(checkpoint, out, WITHOUT)
    windows = prompts(258)
    report = run("transformers-native", checkpoint, out, reference(checkpoint), windows=windows)
    model = dense_model(checkpoint)
    expected = perplexity(lambda ids: logits(model, np.array([ids]))[0], windows)
    assert report.perplexity == pytest.approx(expected, rel=1e-2)
    assert report.text
    tokens = torch.from_numpy(windows)
    with torch.inference_mode():
        loss = torch.stack([model(input_ids=row[None], labels=row[None]).loss for row in tokens]).mean()
    assert expected == pytest.approx(float(loss.exp()), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("format_name", "runtime", "tensor"),
    [
        ("gptq", "gptqmodel", "qzeros"),
        ("dense", "transformers-dense", "weight"),
        ("native", "transformers-native", "weight_scale"),
    ],
)
def test_runtime_notices_a_changed_tensor(
    packed: Packed, tmp_path: Path, format_name: str, runtime: str, tensor: str
) -> None:
    _needs(runtime)
    checkpoint, out = packed(4), tmp_path / "out"
    FORMATS[format_name].write(checkpoint, out, WITHOUT)
    tensors = load_file(out / "model.safetensors")
    name = f"model.layers.0.mlp.up_proj.{tensor}"
    tensors[name] = tensors[name] * 2 if tensor.startswith("weight") else tensors[name] - 0x11111111
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    assert run(runtime, checkpoint, out, reference(checkpoint)).differences


def test_missing_runtime_is_a_note_that_names_the_extra(
    packed: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = Verification("gptq", "reader", 21, True, True, True)
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    for name, runtime in RUNTIMES.items():
        assert bool(runtime.imports) == (runtime.extra in extras)
        if runtime.imports:
            monkeypatch.setitem(RUNTIMES, name, replace(runtime, imports=("no_such_package",)))
            result = verify_in(good, (name,), packed(2), tmp_path)
            assert result.passed
            assert result.max_logit_difference is None
            assert result.notes == (
                f"not loaded in {name}: no_such_package is not installed, "
                f"`pip install 'qatcli[{runtime.extra}]'` brings it; "
                "codes, zero points and scales were compared and are equal",
            )


def test_transformers_is_not_asked_about_overrides_it_does_not_read(packed: Packed, tmp_path: Path) -> None:
    for name, options in (("mixed", _MIXED), ("uniform", {})):
        FORMATS["gptq"].write(packed(2, **options), tmp_path / name, WITHOUT)
    assert "one number of bits" in str(obstacle("transformers", packed(2, **_MIXED), tmp_path / "mixed"))
    assert obstacle("gptqmodel", packed(2, **_MIXED), tmp_path / "mixed") is None
    assert obstacle("transformers", packed(2), tmp_path / "uniform") is None
    assert "| transformers | up to 5.23 |  | does not run it" in (tmp_path / "mixed/README.md").read_text()


def test_a_model_that_memory_does_not_hold_is_not_computed(
    packed: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert obstacle("transformers-native", packed(2), tmp_path) is None
    monkeypatch.setattr(machine, "host_memory", lambda: 2**10)
    assert "of host memory, and 0 are free" in str(obstacle("transformers-native", packed(2), tmp_path))


def test_runtime_that_cannot_load_the_export_is_a_difference(packed: Packed, tmp_path: Path) -> None:
    out = tmp_path / "out"
    FORMATS["dense"].write(packed(2), out, WITHOUT)
    shutil.copy(out / "config.json", out / "model.safetensors")
    differences = run("transformers-dense", packed(2), out, reference(packed(2))).differences
    assert len(differences) == 1
    assert differences[0].startswith("transformers-dense failed: ")


def test_runtime_that_is_stopped_from_outside_says_nothing_of_the_export(
    packed: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FORMATS["dense"].write(packed(2), tmp_path / "out", WITHOUT)
    good = Verification("dense", "reader", 21, True, True, True)
    monkeypatch.setattr("qatcli.formats.runtimes._SECONDS", 0.01)
    slow = verify_in(good, ("transformers-dense",), packed(2), tmp_path / "out")
    killed = subprocess.CompletedProcess([], -signal.SIGKILL, "", "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: killed)
    out_of_memory = verify_in(good, ("transformers-dense",), packed(2), tmp_path / "out")
    for found, why in ((slow, "no answer in 0.01 s"), (out_of_memory, "want of memory")):
        assert found.passed
        assert found.verifier == "reader"
        assert why in found.notes[0]
    crashed = subprocess.CompletedProcess([], -signal.SIGSEGV, "", "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: crashed)
    assert not verify_in(good, ("transformers-dense",), packed(2), tmp_path / "out").passed


def test_failed_integers_are_not_run(packed: Packed, tmp_path: Path) -> None:
    bad = Verification("gptq", "reader", 21, False, True, True)
    assert verify_in(bad, ("gptqmodel",), packed(2), tmp_path / "absent") is bad


def test_prompts_fit_every_vocabulary() -> None:
    for size in (258, 49152):
        ids = torch.from_numpy(prompts(size))
        assert ids.shape == (2, 24)
        assert int(ids.min()) >= 0
        assert int(ids.max()) < size


def test_the_largest_activation_is_known(packed: Packed) -> None:
    """Of the last block's output, too, which transformers replaces by the norm's in its hidden states."""
    model, seen = dense_model(packed(4)), []
    model.model.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.inference_mode():
        ids = torch.from_numpy(prompts(model.config.vocab_size))
        states = model(input_ids=ids, output_hidden_states=True).hidden_states
    assert reference(packed(4)).largest >= max(float(state.abs().max()) for state in (*seen, *states))


@pytest.mark.parametrize(
    ("name", "dtype", "finding"),
    [
        ("dense", "float16", "differences"),
        ("native", "float16", "differences"),
        ("native", "bfloat16", None),
        ("compressed-tensors", "float16", "notes"),
        ("mlx", "float16", "differences"),
    ],
)
def test_activations_that_the_stated_type_does_not_hold(
    packed: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, dtype: str, finding: str | None
) -> None:
    """Computed in fp32 the export is right; loaded as its config.json says it gives infinities."""
    monkeypatch.setattr(runtimes, "obstacle", lambda *_: None)
    monkeypatch.setattr(runtimes, "run", lambda runtime, *_: RuntimeReport(runtime, ran=True))
    monkeypatch.setattr(runtimes, "reference", lambda checkpoint: replace(reference(checkpoint), largest=1e5))
    options = ExportOptions(dtype=dtype)
    FORMATS[name].write(packed(4), tmp_path / "out", options)
    found = FORMATS[name].verify(packed(4), tmp_path / "out", options)
    assert found.passed == (finding != "differences")
    said = {"differences": found.differences, "notes": found.notes}
    for where, texts in said.items():
        assert any("activations reach 1e+05" in text for text in texts) == (where == finding)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_what_is_stored_in_bfloat16_may_differ_as_much_as_that_rounds(
    packed: Packed, tmp_path: Path, dtype: str
) -> None:
    options = ExportOptions(dtype=dtype, runtimes=False)
    FORMATS["dense"].write(packed(4), tmp_path / "out", options)
    expected = reference(packed(4))
    report = run("transformers-dense", packed(4), tmp_path / "out", expected)
    assert report.logit_tolerance == expected.tolerances["bf16" if dtype == "bfloat16" else "fp16"]
    assert report.differences == ()


def test_a_gguf_file_states_no_type(packed: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp computes in fp32: activations beyond float16 are nothing to it."""
    monkeypatch.setattr(runtimes, "obstacle", lambda *_: None)
    monkeypatch.setattr(runtimes, "run", lambda runtime, *_: RuntimeReport(runtime, ran=True))
    monkeypatch.setattr(runtimes, "reference", lambda checkpoint: replace(reference(checkpoint), largest=1e5))
    FORMATS["gguf"].write(packed(4), tmp_path / "out", ExportOptions())
    found = FORMATS["gguf"].verify(packed(4), tmp_path / "out", ExportOptions())
    assert found.passed
    assert not any("activations reach" in note for note in found.notes)
