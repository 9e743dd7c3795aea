"""GGUF: architectures, block types, tokenizer and rope metadata, and faults injected into a written file."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from qatcli.errors import InputError, QatError
from qatcli.formats import FORMATS, ExportOptions, compare, gguf, gguf_model, source
from qatcli.formats.gguf_readback import GgufFile, open_gguf
from qatcli.formats.gguf_tokenizer import load_tokenizer
from qatcli.formats.layouts import gguf_blocks
from qatcli.formats.runtimes import run
from qatcli.formats.runtimes.reference import dense_model, reference
from qatcli.gguf_container import Stored
from qatcli.models import gguf as converting
from qatcli.models.gguf import add_rope_scaling
from qatcli.models.source import open_source
from qatcli.packed import PackedCheckpoint

pytest.importorskip("gguf", reason="gguf is not installed (pip install 'qatcli[gguf]')")

Packed = Callable[..., PackedCheckpoint]
OPTIONS = ExportOptions(runtimes=False)
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "vocab_size": 258,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS = {
    "llama": transformers.LlamaConfig(**SIZES, attention_bias=True, tie_word_embeddings=True, rope_parameters=LLAMA3),
    "mistral": transformers.MistralConfig(**SIZES, head_dim=32, sliding_window=None),
    "qwen2": transformers.Qwen2Config(
        **SIZES, tie_word_embeddings=True, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    ),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=32, tie_word_embeddings=True),
    "gemma3": transformers.Gemma3TextConfig(**SIZES, head_dim=32, query_pre_attn_scalar=32, sliding_window=64),
}


@pytest.fixture(scope="session")
def model_of(
    tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory, pack: Packed
) -> Callable[[str], PackedCheckpoint]:
    """A function from a key of MODELS to a packed random model with the shared byte tokenizer."""
    made: dict[str, PackedCheckpoint] = {}

    def make(name: str) -> PackedCheckpoint:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(1)
                model = transformers.AutoModelForCausalLM.from_config(MODELS[name])
                for parameter in model.parameters():
                    parameter.data.add_(torch.randn_like(parameter) * 0.2)
            model.save_pretrained(folder / "model")
            for file in tiny_llama.glob("tokenizer*"):
                (folder / "model" / file.name).write_bytes(file.read_bytes())
            made[name] = pack(folder / "model", folder / "packed", bits=2)
        return made[name]

    return make


@pytest.mark.parametrize("name", MODELS)
def test_architecture_is_written_and_read_back(
    model_of: Callable[[str], PackedCheckpoint], tmp_path: Path, name: str
) -> None:
    checkpoint = model_of(name)
    FORMATS["gguf"].write(checkpoint, tmp_path / "out", OPTIONS)
    verification = FORMATS["gguf"].verify(checkpoint, tmp_path / "out", OPTIONS)
    assert verification.differences == ()
    assert verification.modules == 14
    file = open_gguf(tmp_path / "out" / "model.gguf")
    kind = file.fields["general.architecture"]
    assert kind == {"mistral": "llama"}.get(name, name)
    assert file.fields[f"{kind}.attention.key_length"] == (getattr(MODELS[name], "head_dim", None) or 16)
    assert ("output.weight" in file.tensors) == (not MODELS[name].tie_word_embeddings)
    assert ("rope_freqs.weight" in file.tensors) == (name == "llama")
    assert file.tensors["blk.0.attn_q.weight"].type_name == "Q4_0"
    assert file.tensors["blk.0.attn_norm.weight"].type_name == "F32"


@pytest.fixture
def in_llama_cpp(tmp_path: Path) -> Callable[..., Path]:
    """A function (checkpoint, **options) that exports it and has llama.cpp compute its logits; the export."""
    pytest.importorskip("xllamacpp", reason="llama.cpp is not installed (pip install 'qatcli[runtimes]')")

    def check(checkpoint: PackedCheckpoint, **options: str) -> Path:
        out = tmp_path / "llama.cpp"
        FORMATS["gguf"].write(checkpoint, out, replace(OPTIONS, **options))
        report = run("llama.cpp", checkpoint, out, reference(checkpoint))
        assert report.ran
        assert report.differences == ()
        return out

    return check


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "embedding"),
    [*((name, "F16") for name in MODELS), ("llama", "Q8_0"), ("mistral", "Q8_0"), ("qwen2", "Q8_0")],
)
def test_llama_cpp_computes_the_same_logits(
    model_of: Callable[[str], PackedCheckpoint], in_llama_cpp: Callable[..., Path], name: str, embedding: str
) -> None:
    file = open_gguf(in_llama_cpp(model_of(name), gguf_embedding=embedding) / "model.gguf")
    assert file.tensors["token_embd.weight"].type_name == embedding
    assert ("output.weight" in file.tensors) == (not MODELS[name].tie_word_embeddings)


@pytest.mark.slow
def test_llama_cpp_runs_q2_0(tiny_llama: Path, pack: Packed, tmp_path: Path, in_llama_cpp: Callable[..., Path]) -> None:
    # down_proj has 96 inputs, which are no multiple of the block's 64.
    checkpoint = pack(tiny_llama, tmp_path / "p", bits=2, group_size=64, symmetric=True, skip=("down_proj",))
    assert _types(in_llama_cpp(checkpoint)) == {"Q2_0", "F16"}


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "wanted"), [(2, "Q2_K"), (4, "Q4_K"), (3, "Q8_0"), (4, "Q5_0")])
def test_llama_cpp_runs_every_other_type(
    save_tiny_llama: Callable[..., Path],
    pack: Packed,
    tmp_path: Path,
    in_llama_cpp: Callable[..., Path],
    bits: int,
    wanted: str,
) -> None:
    wide = save_tiny_llama("wide", hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    checkpoint = pack(wide, tmp_path / "p", bits=bits, group_size=256)
    assert _types(in_llama_cpp(checkpoint, gguf_type=wanted)) == {wanted}


def _types(out: Path) -> set[str]:
    entries = open_gguf(out / "model.gguf").tensors
    return {entry.type_name for name, entry in entries.items() if name.startswith("blk.") and len(entry.shape) == 2}


@pytest.mark.parametrize(
    ("bits", "wanted", "expected"),
    [(2, "auto", "Q4_0"), (3, "auto", "Q4_0"), (4, "auto", "Q4_1"), (4, "exact", "Q5_0"), (3, "Q8_0", "Q8_0")],
)
def test_block_type(packed: Packed, tmp_path: Path, bits: int, wanted: str, expected: str) -> None:
    options = replace(OPTIONS, gguf_type=wanted)
    FORMATS["gguf"].write(packed(bits), tmp_path / "out", options)
    assert _types(tmp_path / "out") == {expected}
    assert FORMATS["gguf"].verify(packed(bits), tmp_path / "out", options).passed


@pytest.mark.parametrize(("bits", "wanted"), [(2, "auto"), (3, "auto"), (4, "auto"), (4, "exact"), (3, "Q8_0")])
def test_scales_below_zero_are_carried(tiny_llama: Path, pack: Packed, tmp_path: Path, bits: int, wanted: str) -> None:
    """Training of other tools can push a scale through zero; the block types have a sign."""
    checkpoint = pack(tiny_llama, tmp_path / "packed", bits=bits)
    file = checkpoint.path / "model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        if name.endswith(".weight_scale"):
            tensors[name][::3] *= -1
    save_file(tensors, file, metadata={"format": "pt"})
    options = replace(OPTIONS, gguf_type=wanted)
    FORMATS["gguf"].write(checkpoint, tmp_path / "out", options)
    assert FORMATS["gguf"].verify(checkpoint, tmp_path / "out", options).differences == ()


@pytest.mark.parametrize(("bits", "expected"), [(2, "Q2_K"), (4, "Q4_K")])
def test_k_types_where_groups_are_whole_blocks(
    save_tiny_llama: Callable[..., Path], pack: Packed, tmp_path: Path, bits: int, expected: str
) -> None:
    wide = save_tiny_llama(f"wide{bits}", hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    checkpoint = pack(wide, tmp_path / "packed", bits=bits, group_size=256)
    options = replace(OPTIONS, gguf_type=expected if bits == 2 else "auto")  # its zero points happen to suit Q2_0, too
    FORMATS["gguf"].write(checkpoint, tmp_path / "out", options)
    assert _types(tmp_path / "out") == {expected}
    assert FORMATS["gguf"].verify(checkpoint, tmp_path / "out", options).passed


def test_q2_0_when_every_zero_point_is_1_or_2(tiny_llama: Path, pack: Packed, tmp_path: Path) -> None:
    checkpoint = pack(tiny_llama, tmp_path / "packed", bits=2, group_size=64, symmetric=True, skip=("down_proj",))
    FORMATS["gguf"].write(checkpoint, tmp_path / "out", OPTIONS)
    assert _types(tmp_path / "out") == {"Q2_0", "F16"}
    verification = FORMATS["gguf"].verify(checkpoint, tmp_path / "out", OPTIONS)
    assert verification.differences == ()
    assert "June 2026" in (tmp_path / "out" / "README.md").read_text()


def test_embeddings_in_8_bits(packed: Packed, tmp_path: Path) -> None:
    options = replace(OPTIONS, gguf_embedding="Q8_0")
    FORMATS["gguf"].write(packed(2), tmp_path / "out", options)
    assert open_gguf(tmp_path / "out" / "model.gguf").tensors["token_embd.weight"].type_name == "Q8_0"
    assert FORMATS["gguf"].verify(packed(2), tmp_path / "out", options).passed
    assert not FORMATS["gguf"].verify(packed(2), tmp_path / "out", OPTIONS).passed


def test_values_beyond_fp16_are_refused(packed: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = packed(3)
    tensor = type(checkpoint).tensor

    def large(self: PackedCheckpoint, name: str) -> torch.Tensor:
        return tensor(self, name) * 1e9 if "embed_tokens" in name else tensor(self, name)

    monkeypatch.setattr(type(checkpoint), "tensor", large)
    with pytest.raises(QatError, match=r"embed_tokens\.weight has values beyond torch\.float16"):
        FORMATS["gguf"].write(checkpoint, tmp_path / "out", OPTIONS)
    assert list(tmp_path.iterdir()) == []


def test_8_bits_are_carried_where_they_fit(tiny_llama: Path, pack: Packed, tmp_path: Path) -> None:
    checkpoint = pack(tiny_llama, tmp_path / "packed", bits=8, symmetric=True)
    FORMATS["gguf"].write(checkpoint, tmp_path / "out", OPTIONS)
    assert open_gguf(tmp_path / "out" / "model.gguf").tensors["blk.0.attn_q.weight"].type_name == "Q8_0"
    assert FORMATS["gguf"].verify(checkpoint, tmp_path / "out", OPTIONS).passed


@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("wanted", ["auto", "exact", "Q8_0"])
def test_what_a_plan_expects_is_written_or_more_than_is(
    packed: Packed, bits: int, symmetric: bool, group_size: int, wanted: str
) -> None:
    checkpoint = packed(bits, symmetric=symmetric, group_size=group_size, skip=("down_proj",))
    for name, written in gguf.block_types(checkpoint, wanted).items():
        likely = gguf.likely_type(checkpoint.modules[name], "middle" if symmetric else "any", wanted)
        expected, found = (gguf_blocks.TYPES[kind] for kind in (str(likely), written))
        assert expected.bytes / expected.length >= found.bytes / found.length
        assert likely == written or not symmetric, "in the middle nothing is left to the integers"


def test_what_no_block_type_carries_is_refused(packed: Packed, tmp_path: Path) -> None:
    for checkpoint, options in (
        (packed(4), replace(OPTIONS, gguf_type="Q4_0")),
        (packed(8), OPTIONS),
        (packed(3, group_size=16), OPTIONS),
    ):
        with pytest.raises(QatError, match=r"no block type of GGUF carries these integers: model\.layers\.0"):
            FORMATS["gguf"].write(checkpoint, tmp_path / "out", options)
    with pytest.raises(QatError, match="gguf_type is Q9"):
        FORMATS["gguf"].write(packed(4), tmp_path / "out", replace(OPTIONS, gguf_type="Q9"))
    assert list(tmp_path.iterdir()) == []


def test_gemma3_with_another_attention_scale_is_refused(
    model_of: Callable[[str], PackedCheckpoint], tmp_path: Path
) -> None:
    checkpoint = model_of("gemma3")
    other = replace(checkpoint, config={**checkpoint.config, "query_pre_attn_scalar": 256})
    with pytest.raises(QatError, match="attention by 32, this model by 256"):
        FORMATS["gguf"].write(other, tmp_path / "out", OPTIONS)


def test_gemma3_with_full_attention_elsewhere_is_refused(
    model_of: Callable[[str], PackedCheckpoint], tmp_path: Path
) -> None:
    checkpoint = model_of("gemma3")
    other = replace(checkpoint, config={**checkpoint.config, "layer_types": ["sliding_attention", "full_attention"]})
    with pytest.raises(QatError, match="every sixth layer full attention, this model not so layer 1"):
        FORMATS["gguf"].write(other, tmp_path / "out", OPTIONS)


def test_a_sliding_window_limits_the_context(model_of: Callable[[str], PackedCheckpoint], tmp_path: Path) -> None:
    """llama.cpp attends to everything: within the window that is the same model."""
    checkpoint = model_of("mistral")
    narrow = replace(checkpoint, config={**checkpoint.config, "sliding_window": 32})
    for number, (case, expected) in enumerate(((checkpoint, 128), (narrow, 32))):
        out = tmp_path / str(number)
        FORMATS["gguf"].write(case, out, OPTIONS)
        assert open_gguf(out / "model.gguf").fields["llama.context_length"] == expected
        notes = FORMATS["gguf"].verify(case, out, OPTIONS).notes
        assert any("context limited to 32 of 128" in note for note in notes) == (expected == 32)


WIDER = {"full_attention": {"rope_type": "default", "rope_theta": 1e6}, "sliding_attention": {"rope_theta": 2e4}}
ORIGINAL = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("name", "settings", "key"),
    [
        ("gemma3", {"sliding_window": 32}, "gemma3.attention.sliding_window"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "gemma3.final_logit_softcapping"),
        ("gemma3", {"rope_parameters": WIDER}, "gemma3.rope.freq_base_swa"),
        ("gemma3", {"max_position_embeddings": 256}, "gemma3.context_length"),
        ("mistral", {"sliding_window": 32}, "llama.context_length"),
        ("qwen2", {"rope_parameters": ORIGINAL}, "qwen2.rope.scaling.original_context_length"),
    ],
)
def test_metadata_of_another_model_is_caught(
    model_of: Callable[[str], PackedCheckpoint], tmp_path: Path, name: str, settings: dict[str, object], key: str
) -> None:
    checkpoint = model_of(name)
    other = replace(checkpoint, config={**checkpoint.config, **settings})
    FORMATS["gguf"].write(other, tmp_path / "out", OPTIONS)
    assert FORMATS["gguf"].verify(other, tmp_path / "out", OPTIONS).passed
    (difference,) = FORMATS["gguf"].verify(checkpoint, tmp_path / "out", OPTIONS).differences
    assert difference.startswith(key + " is ")


def _overwrite(file: GgufFile, tensor: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    entry, rows = file.tensors[tensor], file.rows(tensor)
    with open(file.path, "r+b") as handle:
        handle.seek(entry.offset)
        handle.write(np.ascontiguousarray(change(rows.copy())).tobytes())


def _blocks(rows: np.ndarray) -> np.ndarray:
    return rows.reshape(len(rows), -1, 18)


def _flip(rows: np.ndarray) -> np.ndarray:
    _blocks(rows)[3, 1, 7] ^= 0x10
    return rows


def _swap_nibbles(rows: np.ndarray) -> np.ndarray:
    quants = _blocks(rows)[..., 2:]
    quants[...] = quants << 4 | quants >> 4
    return rows


def _shift_zero(rows: np.ndarray) -> np.ndarray:
    _blocks(rows)[..., 2:] += 0x11  # every 4-bit field one higher: the zero point is off by one
    return rows


def _flip_scale(rows: np.ndarray) -> np.ndarray:
    _blocks(rows)[5, 0, 0] ^= 1
    return rows


def _unpermute(rows: np.ndarray) -> np.ndarray:
    return rows.reshape(4, -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (_flip, "codes_equal"),
        (_swap_nibbles, "codes_equal"),
        (_shift_zero, "zero_points_equal"),
        (_flip_scale, "scales_equal"),
        (_unpermute, "codes_equal"),
    ],
)
def test_fault_in_the_file_is_caught(
    packed: Packed, tmp_path: Path, change: Callable[[np.ndarray], np.ndarray], kind: str
) -> None:
    checkpoint = packed(2)
    FORMATS["gguf"].write(checkpoint, tmp_path / "out", OPTIONS)
    _overwrite(open_gguf(tmp_path / "out" / "model.gguf"), "blk.1.attn_q.weight", change)
    verification = FORMATS["gguf"].verify(checkpoint, tmp_path / "out", OPTIONS)
    assert not getattr(verification, kind)
    assert not verification.passed
    assert "model.layers.1.self_attn.q_proj" in verification.differences[0]


def test_fault_outside_the_linears_is_caught(packed: Packed, tmp_path: Path) -> None:
    FORMATS["gguf"].write(packed(2), tmp_path / "out", OPTIONS)
    path = tmp_path / "out" / "model.gguf"
    good = path.read_bytes()
    _overwrite(open_gguf(path), "output_norm.weight", lambda rows: rows ^ 1)
    assert FORMATS["gguf"].verify(packed(2), tmp_path / "out", OPTIONS).differences == (
        "tensor output_norm.weight differs from its source",
    )
    path.write_bytes(good[:-200])
    assert not FORMATS["gguf"].verify(packed(2), tmp_path / "out", OPTIONS).passed
    path.write_bytes(b"GGML" + good[4:])
    assert not FORMATS["gguf"].verify(packed(2), tmp_path / "out", OPTIONS).passed
    key = b"llama.attention.head_count"
    at = good.index(key) + len(key) + 4
    path.write_bytes(good[:at] + b"\x02" + good[at + 1 :])
    assert FORMATS["gguf"].verify(packed(2), tmp_path / "out", OPTIONS).differences == (
        "llama.attention.head_count is 2 instead of 4",
    )


def test_linears_are_compared_in_parts(packed: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "AT_A_TIME", 1000)  # 15 rows of 64 columns
    FORMATS["gguf"].write(packed(2), tmp_path / "out", OPTIONS)
    assert FORMATS["gguf"].verify(packed(2), tmp_path / "out", OPTIONS).passed
    _overwrite(open_gguf(tmp_path / "out" / "model.gguf"), "blk.1.attn_q.weight", _swap_nibbles)
    (difference,) = FORMATS["gguf"].verify(packed(2), tmp_path / "out", OPTIONS).differences
    monkeypatch.setattr(compare, "AT_A_TIME", 2**20)
    assert (difference,) == FORMATS["gguf"].verify(packed(2), tmp_path / "out", OPTIONS).differences


def test_rope_factors_that_are_wrong_are_caught(model_of: Callable[[str], PackedCheckpoint], tmp_path: Path) -> None:
    FORMATS["gguf"].write(model_of("llama"), tmp_path / "out", OPTIONS)
    _overwrite(open_gguf(tmp_path / "out" / "model.gguf"), "rope_freqs.weight", lambda rows: rows ^ 1)
    assert FORMATS["gguf"].verify(model_of("llama"), tmp_path / "out", OPTIONS).differences == (
        "tensor rope_freqs.weight is missing or not what the config says",
    )


def test_row_order_moves_whole_rows_of_q_and_k_only(packed: Packed) -> None:
    checkpoint = packed(2)
    order = gguf_model.row_order(checkpoint, "model.layers.0.self_attn.q_proj.weight")
    assert order is not None
    assert sorted(order) == list(range(64))
    assert list(order[:6]) == [0, 8, 1, 9, 2, 10]
    assert gguf_model.row_order(checkpoint, "model.layers.0.self_attn.v_proj.weight") is None


def test_llama3_rope_factors_are_transformers_own() -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = MODELS["llama"]
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    plain = 1.0 / (10000.0 ** (torch.arange(0, 16, 2).float() / 16))
    factors = gguf_model.rope_factors(config.to_dict())
    assert factors is not None
    np.testing.assert_allclose(factors, (plain / scaled).numpy(), rtol=1e-5)


LLAMA31 = {**LLAMA3, "original_max_position_embeddings": 8192}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}


@pytest.fixture
def own_tokenizer(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers makes no tokenizer of the bytes alone that the tiny models have."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    monkeypatch.setattr(converting.AutoTokenizer, "from_pretrained", lambda *_, **__: tokenizer)


@pytest.mark.usefixtures("own_tokenizer")
@pytest.mark.parametrize(
    ("name", "rope"),
    [
        ("llama", {"rope_type": "default", "rope_theta": 1e4}),
        ("llama", LLAMA31),
        ("qwen2", LINEAR),
        ("qwen2", YARN),
        ("gemma3", {"full_attention": LINEAR, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}),
    ],
)
def test_a_source_has_its_positions_as_stretched_as_the_file_says(
    model_of: Callable[[str], PackedCheckpoint], packed: Packed, tmp_path: Path, name: str, rope: dict[str, object]
) -> None:
    """transformers makes a model without them."""
    checkpoint = packed(4) if name == "llama" else model_of(name)
    stretched = replace(checkpoint, config={**checkpoint.config, "rope_parameters": rope})
    FORMATS["gguf"].write(stretched, tmp_path / "out", OPTIONS)
    found = open_source(str(converting.convert(tmp_path / "out" / "model.gguf")))
    assert found.config().rope_parameters == rope
    tokens = torch.arange(100)[None] % 250 + 2
    with torch.no_grad():
        logits = found.load_model(torch.float32, torch.device("cpu"))(tokens).logits
        torch.testing.assert_close(
            logits, dense_model(stretched)(tokens).logits, rtol=0, atol=0.02 * float(logits.std())
        )


@pytest.mark.usefixtures("own_tokenizer")
def test_a_source_has_a_tokenizer_that_transformers_4_knows(packed: Packed, tmp_path: Path) -> None:
    """Exports carry it to servers of its time, which do not know the class by its new name."""
    FORMATS["gguf"].write(packed(4), tmp_path / "out", OPTIONS)
    folder = converting.convert(tmp_path / "out" / "model.gguf")
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    text = "Hello, 3 dogs\nran."
    assert load_tokenizer(folder)(text)["input_ids"] == load_tokenizer(packed(4).path)(text)["input_ids"]


@pytest.mark.usefixtures("own_tokenizer")
def test_a_source_that_stretches_positions_in_a_way_of_its_own_is_refused(packed: Packed, tmp_path: Path) -> None:
    checkpoint = replace(packed(4), config={**packed(4).config, "rope_parameters": LLAMA3})  # from a context of 64
    FORMATS["gguf"].write(checkpoint, tmp_path / "out", OPTIONS)
    with pytest.raises(InputError, match=r"transformers cannot be told \(rope_freqs\.weight\)") as caught:
        open_source(str(tmp_path / "out" / "model.gguf"))
    assert "safetensors" in (caught.value.hint or "")


@pytest.mark.usefixtures("own_tokenizer")
def test_a_source_with_biases_that_transformers_leaves_out_is_refused(
    model_of: Callable[[str], PackedCheckpoint], tmp_path: Path
) -> None:
    FORMATS["gguf"].write(model_of("llama"), tmp_path / "out", OPTIONS)
    with pytest.raises(InputError, match="has 8 biases, the model that transformers makes of it 0"):
        open_source(str(tmp_path / "out" / "model.gguf"))


@pytest.mark.parametrize(
    ("said", "tensors"),
    [
        ({"type": "longrope", "factor": 4.0}, ()),
        ({"type": "yarn", "factor": 4.0}, ()),
        ({"type": "linear"}, ()),
        ({"type": "linear", "factor": 4.0, "attn_factor": 1.2}, ()),
        ({}, ("rope_factors_long.weight",)),
    ],
)
def test_unknown_scalings_are_refused(said: dict[str, object], tensors: tuple[str, ...]) -> None:
    fields = {"general.architecture": "llama", **{f"llama.rope.scaling.{key}": value for key, value in said.items()}}
    stored = dict.fromkeys(tensors, Stored(0, (8,), 0))
    with pytest.raises(InputError, match=tensors[0] if tensors else r"llama\.rope\.scaling\.type"):
        add_rope_scaling(transformers.LlamaConfig(**SIZES), Path("m.gguf"), fields, stored)


def test_gemma3_of_27_billion_divides_its_attention_as_llama_cpp_does() -> None:
    config = transformers.Gemma3TextConfig(**{**SIZES, "num_hidden_layers": 62, "layer_types": None})
    add_rope_scaling(config, Path("m.gguf"), {"general.architecture": "gemma3"}, {})
    assert config.query_pre_attn_scalar == 16


def test_a_block_type_that_gguf_py_lacks_is_refused(tiny_llama: Path, pack: Packed, tmp_path: Path) -> None:
    checkpoint = pack(tiny_llama, tmp_path / "p", bits=2, group_size=64, symmetric=True, skip=("down_proj",))
    FORMATS["gguf"].write(checkpoint, tmp_path / "out", OPTIONS)
    with pytest.raises(InputError, match=r"cannot read blk\.0.* of ggml type 42") as caught:
        open_source(str(tmp_path / "out" / "model.gguf"))
    assert "made from" in (caught.value.hint or "")


def test_linears_with_a_bias_keep_it(model_of: Callable[[str], PackedCheckpoint], tmp_path: Path) -> None:
    checkpoint = model_of("llama")
    FORMATS["gguf"].write(checkpoint, tmp_path / "out", OPTIONS)
    file = open_gguf(tmp_path / "out" / "model.gguf")
    name = "model.layers.0.self_attn.q_proj"
    order = gguf_model.row_order(checkpoint, name + ".bias")
    bias = source.arrays(checkpoint, name).bias
    assert bias is not None
    assert order is not None
    stored = np.frombuffer(file.rows("blk.0.attn_q.bias").tobytes(), "<f4")
    np.testing.assert_array_equal(stored, bias.numpy()[order])
