"""The key-value part of a GGUF file against the checkpoint: a wrong value would change what the model does.

Written from the model's config and the tokenizer library, not from the writer (`gguf_model`, `gguf_tokenizer`), whose
table of llama.cpp's names for text splits is taken as it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from qatcli.formats.gguf_readback import GgufFile
from qatcli.formats.gguf_tokenizer import load_tokenizer, pre_tokenizer_name
from qatcli.packed import PackedCheckpoint

_ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3"}
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_CONTROL, _UNKNOWN = 3, 2


def metadata_differences(checkpoint: PackedCheckpoint, found: GgufFile) -> Iterator[str]:
    """What the file says of architecture and tokenizer and should not."""
    config = checkpoint.config
    kind = _ARCHITECTURES.get(config["model_type"], config["model_type"])
    wanted = {"general.architecture": kind, **{f"{kind}.{key}": value for key, value in _numbers(config).items()}}
    yield from _wrong(found.fields, wanted)
    yield from _tokenizer_differences(checkpoint, found.fields)


def _numbers(config: dict[str, Any]) -> dict[str, Any]:
    """Keys below the architecture's name; None for one that must not be there."""
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    rope = config["rope_parameters"]
    local, rope = rope.get("sliding_attention"), rope.get("full_attention", rope)
    scaling = rope if rope.get("rope_type") in ("linear", "yarn") else {}
    context, window = config["max_position_embeddings"], config.get("sliding_window")
    if not local and config["model_type"] != "llama" and config.get("use_sliding_window", True):
        # llama.cpp has a window for Gemma only: another model is the same one within its window.
        context, window = min(context, window or context), None
    return {
        "block_count": config["num_hidden_layers"],
        "context_length": context,
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config.get("num_key_value_heads") or config["num_attention_heads"],
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.layer_norm_rms_epsilon": np.float32(config["rms_norm_eps"]),
        "attention.sliding_window": window if local else None,
        "final_logit_softcapping": _fp32(config.get("final_logit_softcapping")),
        "rope.dimension_count": head,
        "rope.freq_base": np.float32(rope["rope_theta"]),
        "rope.freq_base_swa": _fp32(local and local["rope_theta"]),
        "rope.scaling.type": scaling.get("rope_type"),
        "rope.scaling.factor": _fp32(scaling.get("factor")),
        "rope.scaling.original_context_length": scaling.get("original_max_position_embeddings"),
        "vocab_size": config["vocab_size"],
    }


def _fp32(value: float | None) -> np.float32 | None:
    return np.float32(value) if value else None


def _tokenizer_differences(checkpoint: PackedCheckpoint, fields: dict[str, Any]) -> Iterator[str]:
    tokenizer, size = load_tokenizer(checkpoint.path), checkpoint.config["vocab_size"]
    tokens, types = (fields.get(f"tokenizer.ggml.{key}", []) for key in ("tokens", "token_type"))
    if not len(tokens) == len(types) == size:
        yield f"the file has {len(tokens)} tokens and {len(types)} types of tokens instead of {size}"
        return
    texts = tokenizer.convert_ids_to_tokens(list(range(min(size, len(tokenizer)))))
    wrong = [i for i, text in enumerate(texts) if text is not None and text != tokens[i]]
    special = [i for i in tokenizer.all_special_ids if types[i] not in (_CONTROL, _UNKNOWN)]
    if wrong or special:
        yield f"{len(wrong)} tokens differ from the tokenizer's and {len(special)} special ones are not marked so"
    wanted = {f"{name}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind, name in _SPECIAL.items()}
    if isinstance(tokenizer.chat_template, str):
        wanted["chat_template"] = tokenizer.chat_template
    wanted["add_bos_token"] = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    if content["model"].get("byte_fallback"):
        rank: dict[str, int] = {}
        for number, merge in enumerate(merges):
            rank.setdefault(merge.replace(" ", ""), number)
        wanted |= {"model": "llama", "pre": "default", "scores": [-rank.get(text, 1e6) for text in tokens]}
        wanted["add_space_prefix"] = tokenizer.tokenize("a")[0].startswith("\u2581")
    else:
        wanted |= {"model": "gpt2", "pre": pre_tokenizer_name(content["pre_tokenizer"]), "merges": merges or None}
    names = {key: f"tokenizer.{key if key == 'chat_template' else f'ggml.{key}'}" for key in wanted}
    yield from _wrong(fields, {names[key]: value for key, value in wanted.items() if value is not None})


def _wrong(fields: dict[str, Any], wanted: dict[str, Any]) -> Iterator[str]:
    for key, value in wanted.items():
        there = fields.get(key)
        if there != value:
            long = isinstance(value, list) or len(str(value)) > 40
            yield f"{key} differs from its source" if long else f"{key} is {there} instead of {value}"
