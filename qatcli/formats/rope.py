"""Settings of rotary embeddings under the names that readers know: transformers 5 gathered them in `rope_parameters`.

What was written for transformers 4 (vLLM and SGLang of its time, mlx-lm, converters) looks for the keys before it, and
where these are missing computes with a base of 10,000 without a word.
"""

from __future__ import annotations

from typing import Any

_APART = {"rope_theta": "rope_theta", "partial_rotary_factor": "partial_rotary_factor"}
_APART_IN = {"gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}}
_PHI3 = ("short_factor", "long_factor")  # all that its rope_scaling has beside `type`, elsewhere called rope_type


def rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """rope_type, rope_theta and scaling, from `rope_parameters` (transformers 5) or the keys before it."""
    new = config.get("rope_parameters")
    if new:
        return dict(new)
    scaling = dict(config.get("rope_scaling") or {})
    kind = scaling.pop("type", scaling.get("rope_type", "default"))
    return {"rope_theta": config.get("rope_theta", 10000.0), **scaling, "rope_type": kind}


def earlier_keys(config: dict[str, Any]) -> dict[str, Any]:
    """The keys before `rope_parameters` that say the same: rope_theta, rope_scaling and what else is apart from them.

    Where full and sliding attention differ (Gemma 3), they are of the full one, and rope_local_base_freq of the other.
    """
    rope = config.get("rope_parameters") or {}
    full, sliding = rope.get("full_attention", rope), rope.get("sliding_attention")
    family = config.get("model_type", "")
    apart = _APART_IN.get(family, _APART)
    keys = {name: full[key] for key, name in apart.items() if key in full}
    kind = full.get("rope_type", "default")
    if kind != "default":
        keys["rope_scaling"] = (
            {"type": kind, **{key: full[key] for key in _PHI3}}
            if (family, kind) == ("phi3", "longrope")
            else {"rope_type": kind, **{key: value for key, value in full.items() if key not in (*apart, "rope_type")}}
        )
    if sliding:
        keys["rope_local_base_freq"] = sliding["rope_theta"]
    return keys
