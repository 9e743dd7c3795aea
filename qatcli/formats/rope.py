"""Settings of rotary embeddings under the names that readers know: transformers 5 gathered them in `rope_parameters`.

What was written for transformers 4 (vLLM and SGLang of its time, converters, most models of mlx-lm) looks for the keys
before it, and where these are missing computes with its family's default, mostly a base of 10,000, without a word.
"""

from __future__ import annotations

from typing import Any

_APART = {"rope_theta": "rope_theta", "partial_rotary_factor": "partial_rotary_factor"}
_OF_NEOX = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
_APART_IN = {"gpt_neox": _OF_NEOX, "gpt_neox_japanese": _OF_NEOX}
_TWO_ATTENTIONS = ("gemma3_text", "gemma3n_text")  # families with a base for each, which had keys for both
_TYPE = ("phi3", "olmo", "olmo2")  # families whose rope_scaling calls its kind so, elsewhere it is rope_type
_LONGROPE = ("short_factor", "long_factor")  # all that Phi-3's has beside it
# What llama.cpp and MLX take where a file says nothing of it, or whatever it says.
_ASSUMED = {
    "attention_factor": None,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": None,
    "mscale_all_dim": None,
    "truncate": True,
    "partial_rotary_factor": 1,
}


def rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """rope_type, rope_theta and scaling, from `rope_parameters` (transformers 5) or the keys before it."""
    new = config.get("rope_parameters")
    if new:
        return dict(new)
    scaling = dict(config.get("rope_scaling") or {})
    kind = scaling.pop("type", scaling.get("rope_type", "default"))
    return {"rope_theta": config.get("rope_theta", 10000.0), **scaling, "rope_type": kind}


def not_carried(rope: dict[str, Any]) -> dict[str, Any]:
    """The settings that runtimes other than transformers would compute otherwise, without a word."""
    return {key: rope[key] for key, assumed in _ASSUMED.items() if rope.get(key) not in (None, assumed)}


def earlier_keys(config: dict[str, Any]) -> dict[str, Any]:
    """The keys before `rope_parameters` that say the same: rope_theta, rope_scaling and what else is apart from them.

    Nothing where kinds of layers have settings of their own, but for the families that had keys for these.
    """
    family, rope = config.get("model_type", ""), config.get("rope_parameters") or {}
    both = family in _TWO_ATTENTIONS
    full, sliding = (rope.get("full_attention") or {}, rope.get("sliding_attention") or {}) if both else (rope, {})
    apart = _APART_IN.get(family, _APART)
    keys = {name: full[key] for key, name in apart.items() if key in full}
    kind = full.get("rope_type", "default")
    if kind != "default":
        named = {"type" if family in _TYPE else "rope_type": kind}
        only = _LONGROPE if (family, kind) == ("phi3", "longrope") else full.keys() - apart.keys() - {"rope_type"}
        keys["rope_scaling"] = {**named, **{key: value for key, value in full.items() if key in only}}
    if sliding:
        keys["rope_local_base_freq"] = sliding["rope_theta"]
    return keys
