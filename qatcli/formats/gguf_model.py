"""What llama.cpp has to know about an architecture: its name, metadata, tensor names, and rows that move.

llama.cpp's `llama` rotates neighbouring pairs where Hugging Face rotates halves, so the rows of q_proj and k_proj are
interleaved per head: row i of the first half goes to 2 i, row i of the second half to 2 i + 1. Groups run along the
columns: moving whole rows of codes, zero points and scales is exact. Source: llama.cpp conversion/llama.py, gemma.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qatcli.errors import QatError
from qatcli.formats.rope import not_carried, rope_parameters
from qatcli.formats.source import full_config
from qatcli.packed import PackedCheckpoint

_HINT = "export another format, or convert the dense export with llama.cpp's own converter"


@dataclass(frozen=True)
class Architecture:
    """One architecture of llama.cpp.

    name         what llama.cpp calls it
    interleaved  whether q and k rows are interleaved
    norm_offset  what is added to norm weights (Gemma stores w - 1)
    activation   the one function llama.cpp has there, whatever the file says
    """

    name: str
    interleaved: bool = False
    norm_offset: float = 0.0
    activation: str = "silu"


ARCHITECTURES = {
    "llama": Architecture("llama", interleaved=True),
    "mistral": Architecture("llama", interleaved=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "gemma3_text": Architecture("gemma3", norm_offset=1.0, activation="gelu_pytorch_tanh"),
}


def architecture(checkpoint: PackedCheckpoint) -> Architecture:
    """The checkpoint's row of the table. QatError for a model type that is not in it."""
    kind = checkpoint.config.get("model_type")
    if kind not in ARCHITECTURES:
        raise QatError(f"GGUF export knows {', '.join(ARCHITECTURES)}, not {kind}", hint=_HINT)
    return ARCHITECTURES[kind]


def with_defaults(checkpoint: PackedCheckpoint) -> PackedCheckpoint:
    """The checkpoint with every key of its config: a config.json may leave out what is its class's default.

    QatError for a model that llama.cpp would load and compute otherwise than transformers does.
    """
    row = architecture(checkpoint)
    config = {**full_config(checkpoint.config).to_dict(), **checkpoint.config}
    activation = config.get("hidden_activation") or config["hidden_act"]
    lost = not_carried(rope_parameters(config))
    if activation != row.activation:
        raise QatError(f"llama.cpp computes {row.name} with {row.activation}, this model has {activation}", hint=_HINT)
    if lost:
        raise QatError(f"GGUF export does not carry these settings of the rotary embedding: {lost}", hint=_HINT)
    return replace(checkpoint, config=config)


def context_length(config: dict[str, Any]) -> int:
    """The longest context in which llama.cpp computes what transformers does.

    Its llama and qwen attend to everything: a model with a sliding window is another one beyond the window.
    """
    longest = int(config["max_position_embeddings"])
    window = config.get("sliding_window")
    if window is None or config["model_type"] not in ("mistral", "qwen2", "qwen3"):
        return longest
    return min(longest, int(window)) if config.get("use_sliding_window", True) else longest


def head_dim(config: dict[str, Any]) -> int:
    """Width of one attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def key_value_heads(config: dict[str, Any]) -> int:
    """Number of key and value heads."""
    return int(config.get("num_key_value_heads") or config["num_attention_heads"])


def row_order(checkpoint: PackedCheckpoint, name: str) -> NDArray[np.int64] | None:
    """For a tensor of q_proj or k_proj: the source row of every row in the file. None where rows stay."""
    leaf = name.split(".")[-2]
    if not architecture(checkpoint).interleaved or leaf not in ("q_proj", "k_proj"):
        return None
    config = checkpoint.config
    heads = config["num_attention_heads"] if leaf == "q_proj" else key_value_heads(config)
    rows = heads * head_dim(config)
    return np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).reshape(rows)


def add_metadata(writer: Any, checkpoint: PackedCheckpoint) -> None:
    """Add the architecture's keys to a gguf.GGUFWriter."""
    config = checkpoint.config
    head = head_dim(config)
    writer.add_name(str(config.get("_name_or_path") or config["model_type"]).rstrip("/").rsplit("/", 1)[-1])
    writer.add_quantization_version(2)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(context_length(config))
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(key_value_heads(config))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_dimension_count(head)
    writer.add_key_length(head)
    writer.add_value_length(head)
    if architecture(checkpoint).name == "gemma3":
        _add_gemma3(writer, config)
    else:
        _add_rope(writer, rope_parameters(config))


def rope_factors(config: dict[str, Any]) -> NDArray[np.float32] | None:
    """Llama 3's frequency factors [head_dim / 2], the tensor rope_freqs.weight; None for other kinds of scaling."""
    rope = rope_parameters(config)
    if rope.get("rope_type") != "llama3":
        return None
    head = head_dim(config)
    wavelength = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, head, 2, dtype=np.float64) / head)
    context = rope["original_max_position_embeddings"]
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    smooth = np.clip((context / wavelength - low) / (high - low), 0.0, 1.0)
    return (1.0 / ((1.0 - smooth) / factor + smooth)).astype(np.float32)


def _add_rope(writer: Any, rope: dict[str, Any]) -> None:
    import gguf

    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind in ("default", "llama3"):
        return
    kinds = {"linear": gguf.RopeScalingType.LINEAR, "yarn": gguf.RopeScalingType.YARN}
    if kind not in kinds:
        raise QatError(f"GGUF export knows the rope scalings default, llama3, linear and yarn, not {kind}", hint=_HINT)
    writer.add_rope_scaling_type(kinds[kind])
    writer.add_rope_scaling_factor(rope["factor"])
    if "original_max_position_embeddings" in rope:
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def _add_gemma3(writer: Any, config: dict[str, Any]) -> None:
    kinds = config.get("layer_types") or []
    odd = [n for n, kind in enumerate(kinds) if (kind == "full_attention") != ((n + 1) % 6 == 0)]
    if odd:
        raise QatError(
            f"llama.cpp gives every sixth layer full attention, this model not so layer {odd[0]}", hint=_HINT
        )
    # llama.cpp takes the scale of attention from the head's width, and for 62 layers (27B) from hidden size and heads.
    width = (
        config["hidden_size"] // config["num_attention_heads"]
        if config["num_hidden_layers"] == 62
        else head_dim(config)
    )
    if config.get("query_pre_attn_scalar", width) != width:
        raise QatError(
            f"llama.cpp scales Gemma 3's attention by {width}, this model by {config['query_pre_attn_scalar']}",
            hint=_HINT,
        )
    rope = config.get("rope_parameters") or {}
    full = rope.get("full_attention") or {"rope_theta": config.get("rope_theta", 1e6), "rope_type": "default"}
    local = rope.get("sliding_attention") or {"rope_theta": config.get("rope_local_base_freq", 1e4)}
    _add_rope(writer, full)
    writer.add_rope_freq_base_swa(local["rope_theta"])
    writer.add_sliding_window(config["sliding_window"])
    if config.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
