"""The metrics of an evaluation in the shape that the page and the expectations rely on, whatever eval.json holds.

A figure that is no number is null and a part that is no mapping is empty, so that one spoilt value costs nothing else.
Keys that are not known here stay as they are: they go to report.json.
"""

from __future__ import annotations

from typing import Any, TypeGuard


def evaluation(metrics: dict[str, Any]) -> dict[str, Any]:
    """{models, protocol, size, zero_shot_protocol, speed_protocol, prompts} and whatever else is in `metrics`."""
    prompts = metrics.get("prompts")
    return {
        **metrics,
        "models": {name: _model(mapping(model)) for name, model in mapping(metrics.get("models")).items()},
        "protocol": {name: mapping(how) for name, how in mapping(metrics.get("protocol")).items()},
        "size": {**mapping(metrics.get("size")), "bytes": _numbers(mapping(metrics.get("size")).get("bytes"))},
        "zero_shot_protocol": mapping(metrics.get("zero_shot_protocol")),
        "speed_protocol": mapping(metrics.get("speed_protocol")),
        "prompts": [str(prompt) for prompt in prompts] if isinstance(prompts, list) else [],
    }


def mapping(value: Any) -> dict[str, Any]:
    """`value` if it is a mapping, else an empty one."""
    return value if isinstance(value, dict) else {}


def is_number(value: Any) -> TypeGuard[float]:
    """Whether `value` is a figure; JSON's true and false are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _model(model: dict[str, Any]) -> dict[str, Any]:
    zero_shot, samples = mapping(model.get("zero_shot")), model.get("samples")
    tasks = {name: _score(score) for name, score in mapping(zero_shot.get("tasks")).items()}
    return {
        **model,
        "perplexity": _numbers(model.get("perplexity")),
        "divergence": {text: _numbers(apart) for text, apart in mapping(model.get("divergence")).items()},
        "zero_shot": {**zero_shot, "tasks": tasks, "average": _score(zero_shot.get("average"))},
        "speed": _speed(mapping(model.get("speed"))),
        "size": _numbers(model.get("size")),
        "samples": [str(sample) for sample in samples] if isinstance(samples, list) else [],
    }


def _speed(speed: dict[str, Any]) -> dict[str, Any]:
    """The figures and the dtype; `peak_bytes` is the peak of the device that computed."""
    peak = _numbers(speed.get("peak"))
    bytes_ = peak.get("device_bytes") or peak.get("host_bytes")
    known = {name: value for name, value in speed.items() if is_number(value) or name == "dtype"}
    return {**known, **({} if bytes_ is None else {"peak_bytes": bytes_})}


def _score(score: Any) -> dict[str, Any]:
    values = mapping(score)
    return {**values, **_numbers({name: values.get(name) for name in ("value", "stderr")})}


def _numbers(values: Any) -> dict[str, float | None]:
    return {name: value if is_number(value) else None for name, value in mapping(values).items()}
