"""GGUF: what the key-value part says, what is refused because it could not say it, and what the verifier notices."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import transformers
from tokenizers import Tokenizer, models, normalizers

from qatcli.errors import QatError
from qatcli.formats import FORMATS, ExportOptions, gguf_tokenizer
from qatcli.formats.gguf_readback import open_gguf
from qatcli.packed import PackedCheckpoint

pytest.importorskip("gguf", reason="gguf is not installed (pip install 'qatcli[gguf]')")

Packed = Callable[..., PackedCheckpoint]
OPTIONS = ExportOptions(runtimes=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_act": "gelu"}, "llama with silu, this model has gelu"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "attention_factor": 0.9}},
            "'attention_factor': 0.9",
        ),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    packed: Packed, tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    checkpoint = packed(2)
    with pytest.raises(QatError, match=message):
        FORMATS["gguf"].write(replace(checkpoint, config={**checkpoint.config, **settings}), tmp_path / "out", OPTIONS)
    assert list(tmp_path.iterdir()) == []


def test_keys_that_a_config_leaves_out_are_its_classs_defaults(packed: Packed, tmp_path: Path) -> None:
    config = dict(packed(2).config)
    for key in ("rms_norm_eps", "rope_parameters", "tie_word_embeddings", "hidden_act", "head_dim"):
        config.pop(key, None)
    checkpoint = replace(packed(2), config=config)
    FORMATS["gguf"].write(checkpoint, tmp_path / "out", OPTIONS)
    assert FORMATS["gguf"].verify(checkpoint, tmp_path / "out", OPTIONS).passed
    fields = open_gguf(tmp_path / "out" / "model.gguf").fields
    assert fields["llama.attention.layer_norm_rms_epsilon"] == np.float32(transformers.LlamaConfig().rms_norm_eps)
    assert fields["llama.rope.freq_base"] == 10000.0


METADATA = [
    *(f"llama.{key}" for key in ("block_count", "context_length", "embedding_length", "feed_forward_length")),
    *(f"llama.{key}" for key in ("vocab_size", "rope.dimension_count", "rope.freq_base")),
    *(f"llama.attention.{key}" for key in ("head_count", "head_count_kv", "layer_norm_rms_epsilon", "key_length")),
    *(f"tokenizer.ggml.{key}" for key in ("tokens", "token_type", "bos_token_id", "eos_token_id")),
    *(f"tokenizer.ggml.{key}" for key in ("model", "pre", "add_bos_token")),
]


# Behind the key: its type (4 bytes), of an array also the type and number of entries (12), of a string its length.
BEHIND = {
    "tokenizer.ggml.tokens": 4 + 12 + 8,
    "tokenizer.ggml.token_type": 4 + 12,
    "tokenizer.ggml.scores": 4 + 12,
    "tokenizer.ggml.model": 4 + 8,
    "tokenizer.ggml.pre": 4 + 8,
}


def _differences(checkpoint: PackedCheckpoint, out: Path, key: str) -> tuple[str, ...]:
    """What the verifier finds in an export of which a bit of the value of `key` is flipped."""
    FORMATS["gguf"].write(checkpoint, out, OPTIONS)
    assert FORMATS["gguf"].verify(checkpoint, out, OPTIONS).passed
    path = out / "model.gguf"
    good = path.read_bytes()
    at = good.index(len(key).to_bytes(8, "little") + key.encode()) + 8 + len(key) + BEHIND.get(key, 4)
    bit = 1 if ".add_" in key else 2  # a truth value has one
    path.write_bytes(good[:at] + bytes([good[at] ^ bit]) + good[at + 1 :])
    return FORMATS["gguf"].verify(checkpoint, out, OPTIONS).differences


@pytest.mark.parametrize("key", METADATA)
def test_metadata_that_is_wrong_is_caught(packed: Packed, tmp_path: Path, key: str) -> None:
    (difference,) = _differences(packed(2), tmp_path / "out", key)
    assert key in difference or difference in (
        "1 tokens differ from the tokenizer's and 0 special ones are not marked so",
        "0 tokens differ from the tokenizer's and 1 special ones are not marked so",
    )


@pytest.mark.parametrize("key", ["model", "pre", "scores", "add_bos_token", "add_space_prefix"])
@pytest.mark.parametrize("prepends", [True, False])
def test_sentencepiece_metadata_that_is_wrong_is_caught(
    packed: Packed, tmp_path: Path, key: str, prepends: bool
) -> None:
    folder = tmp_path / "packed"
    shutil.copytree(packed(2).path, folder)
    names = ["<unk>", "<s>", "</s>", "\u2581", "a", "b", "<0x0A>", "ab", "\u2581ab"]
    merges = [("a", "b"), ("\u2581", "ab")]
    vocabulary = {name: number for number, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    marked = normalizers.Replace(" ", "\u2581")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), marked]) if prepends else marked
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)
    (difference,) = _differences(PackedCheckpoint.open(folder), tmp_path / "out", f"tokenizer.ggml.{key}")
    assert key in difference


def test_unknown_architecture_is_refused(packed: Packed, tmp_path: Path) -> None:
    checkpoint = packed(2)
    other = replace(checkpoint, config={**checkpoint.config, "model_type": "gpt2"})
    with pytest.raises(QatError, match="not gpt2"):
        FORMATS["gguf"].write(other, tmp_path / "out", OPTIONS)


def test_unknown_rope_scaling_is_refused(packed: Packed, tmp_path: Path) -> None:
    checkpoint = packed(2)
    factors = {"short_factor": [1.0] * 8, "long_factor": [1.0] * 8, "original_max_position_embeddings": 64}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0, **factors}
    other = replace(checkpoint, config={**checkpoint.config, "rope_parameters": rope})
    with pytest.raises(QatError, match="longrope"):
        FORMATS["gguf"].write(other, tmp_path / "out", OPTIONS)
    assert list(tmp_path.iterdir()) == []


def test_byte_level_tokenizer_metadata(packed: Packed, tmp_path: Path) -> None:
    FORMATS["gguf"].write(packed(2), tmp_path / "out", OPTIONS)
    fields = open_gguf(tmp_path / "out" / "model.gguf").fields
    assert fields["tokenizer.ggml.model"] == "gpt2"
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    assert fields["tokenizer.ggml.tokens"][:2] == ["<s>", "</s>"]
    assert len(fields["tokenizer.ggml.tokens"]) == 258
    assert fields["tokenizer.ggml.token_type"][:3] == [3, 3, 1]
    assert fields["tokenizer.ggml.bos_token_id"] == 0
    assert fields["tokenizer.ggml.eos_token_id"] == 1
    assert fields["tokenizer.ggml.add_bos_token"] is True


def test_text_splits_have_llama_cpps_names() -> None:
    digits = {"type": "Digits", "individual_digits": True}
    words = {"type": "ByteLevel", "use_regex": True}
    plain = {"type": "ByteLevel", "use_regex": False}
    qwen = next(key[0] for key, name in gguf_tokenizer.PRE_TOKENIZERS.items() if name == "qwen2")
    split = {"type": "Split", "pattern": {"Regex": qwen}}
    assert gguf_tokenizer.pre_tokenizer_name({"type": "Sequence", "pretokenizers": [digits, words]}) == "smollm"
    assert gguf_tokenizer.pre_tokenizer_name({"type": "Sequence", "pretokenizers": [split, plain]}) == "qwen2"
    assert gguf_tokenizer.pre_tokenizer_name(words) == "gpt-2"
    unknown = {"type": "Split", "pattern": {"Regex": r"\w+"}}
    with pytest.raises(QatError, match="text splits"):
        gguf_tokenizer.pre_tokenizer_name({"type": "Sequence", "pretokenizers": [unknown, plain]})


def test_token_list_pads_and_refuses(packed: Packed) -> None:
    content = json.loads((packed(2).path / "tokenizer.json").read_text())
    tokens, types = gguf_tokenizer.token_list(content, 260)
    assert tokens[258:] == ["[PAD258]", "[PAD259]"]
    assert types[258:] == [5, 5]
    with pytest.raises(QatError, match="ids up to 257, the model 200"):
        gguf_tokenizer.token_list(content, 200)


def test_sentencepiece_scores_keep_the_order_of_merges() -> None:
    tokens = ["<unk>", "a", "b", "ab", "aba"]
    scores = gguf_tokenizer.scores(tokens, [["a", "b"], ["ab", "a"]])
    assert scores[3] > scores[4] > scores[1] == scores[2]
