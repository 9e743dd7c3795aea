"""report.html from the facts of report.json: figures as text, plots, and the template that arranges them.

Jinja escapes every value that the template shows; only the plots are markup, and those are serialized XML trees.
"""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from qatcli.expectations import is_accuracy
from qatcli.progress import duration
from qatcli.report import plots
from qatcli.report.collect import ROUNDED, TRAINED
from qatcli.report.evaluation import is_number

MODELS = {
    "full_precision": "full precision",
    "round_to_nearest": "round to nearest",
    "calibrate": "searched grid, nothing trained",
    "gptq": "GPTQ, nothing trained",
    "block_ap": "Block-AP",
    "quantized": "quantized",
}
SECTIONS = {
    "results": "Results",
    "training": "Training",
    "damage": "Damage",
    "cost": "Cost",
    "exports": "Exports",
    "recipe": "Recipe",
    "provenance": "Provenance",
}
SIZES = {"file_bytes": "on disk", "bits_per_weight": "bits/weight", "bits_per_parameter": "bits/parameter"}
SPEEDS = {
    "prefill": "prefill, tokens/s",
    "decode": "decode, tokens/s",
    "weight_bytes": "weights in memory",
    "peak_bytes": "peak memory",
}
WORST = 8  # layers and blocks listed by name


def render(facts: dict[str, Any], *, refresh: int | None = None) -> str:
    """The page; with `refresh` it loads itself again after so many seconds."""
    here = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(here),
        autoescape=True,
        undefined=jinja2.ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "figure": figure,
        "short": lambda value: f"{value:.6g}" if is_number(value) else str(value),
        "percent": percent,
        "size": size,
        "duration": lambda seconds: "" if seconds is None else _brief(seconds),
        "date": date,
        "yaml": lambda value: yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100),
        "model": lambda name: MODELS.get(name, name),
        "kind": kind,
    }
    environment.tests["accuracy"] = is_accuracy
    stages = [*facts["stages"], *facts["exports"]]
    at = next((stage for stage in stages if stage["status"] in ("running", "stopped")), None)
    derived = {
        "refresh": refresh,
        "sections": SECTIONS,
        "headings": SIZES | SPEEDS,
        "at": at,
        "now": _now(at) if at else "",
        **_results(facts),
        **_plots(facts),
    }
    return environment.get_template("page.html.jinja").render({**facts, **derived})


def figure(value: Any) -> str:
    """A number at a glance; null stands for one that is not finite."""
    if value is None:
        return "not finite"
    return plots.number(value) if is_number(value) else str(value)


def percent(value: Any, digits: int = 1) -> str:
    """A share as per cent."""
    return f"{100 * value:.{digits}f}\N{NO-BREAK SPACE}%" if is_number(value) else figure(value)


def size(count: Any) -> str:
    """Bytes in binary units."""
    if not is_number(count):
        return ""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:,.2f} GiB"


def date(seconds: Any) -> str:
    """Unix time as a date in UTC."""
    if not is_number(seconds):
        return ""
    try:
        return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (ValueError, OverflowError, OSError):
        return str(seconds)


def kind(model: Any) -> str:
    """The name under which the style sheet colours a model."""
    return model if model in MODELS else "other"


def _brief(seconds: Any) -> str:
    if not is_number(seconds):
        return str(seconds)
    return f"{seconds:.2g} s" if seconds < 10 else duration(seconds)


def _now(at: dict[str, Any]) -> str:
    """How far the stage is that is at work or was stopped, in a sentence."""
    progress = at["progress"] or {}
    title = progress.get("title", at["name"])
    parts = [] if title == at["name"] else [title]
    parts += [f"{progress.get('count')} of {progress.get('total')}"] if progress.get("total") else []
    if at["status"] == "running" and is_number(progress.get("left")):
        parts.append(f"about {_brief(progress['left'])} left")
    if is_number(progress.get("tokens_per_second")):
        parts.append(f"{progress['tokens_per_second']:,.0f} tokens/s")
    return ", ".join([at["name"], *parts])


def _results(facts: dict[str, Any]) -> dict[str, Any]:
    """The evaluation as rows and columns; every kind of figure is optional."""
    evaluation = facts["evaluation"]
    models = evaluation["models"]
    texts = _keys(models, "perplexity")
    tasks = _keys({name: model["zero_shot"] for name, model in models.items()}, "tasks")
    quantized, full, rounded = (models.get(n, {}) for n in ("quantized", "full_precision", "round_to_nearest"))
    tiles = []
    for text in texts[:2]:
        value, *others = (model.get("perplexity", {}).get(text) for model in (quantized, full, rounded))
        if value is not None:
            known = zip(("full precision", "round to nearest"), others, strict=True)
            note = ", ".join(f"{name} {figure(other)}" for name, other in known if other is not None)
            tiles.append((f"Perplexity, {text}", figure(value), note))
    apart = quantized.get("divergence", {}).get(texts[0], {}) if texts else {}
    if apart.get("mean_kl") is not None:
        tiles.append(("KL from full precision", figure(apart["mean_kl"]), "mean, nats per token"))
    if apart.get("top1_agreement") is not None:
        tiles.append(("Same next token", percent(apart["top1_agreement"]), "as full precision, greedy"))
    mean, reference = (m.get("zero_shot", {}).get("average", {}) for m in (quantized, full))
    if mean.get("value") is not None:
        note = f"mean of {mean['tasks']} tasks" if is_number(mean.get("tasks")) else "mean of the tasks"
        note += f"; full precision {percent(reference['value'])}" if reference.get("value") else ""
        tiles.append(("Zero-shot accuracy", percent(mean["value"]), note))
    parts = [count for count in evaluation["size"]["bytes"].values() if count is not None]
    if parts:
        note = f"{figure(evaluation['size'].get('bits_per_weight'))} bits per quantized weight"
        tiles.append(("Size", size(sum(parts)), note))
    if tiles:
        peaks = [stage["peak_memory"] for stage in facts["stages"]]
        host, device = (max(peak.get(key) or 0 for peak in peaks) for key in ("host_bytes", "device_bytes"))
        tiles.append(("Time", _brief(facts["run"]["seconds"]), date(facts["run"]["started"])))
        tiles.append(("Peak memory", size(device or host), "device" if device else "host"))
    return {
        "models": models,
        "texts": texts,
        "tasks": tasks,
        "tiles": tiles,
        "sizes": [name for name in SIZES if name in _keys(models, "size")],
        "speeds": [name for name in SPEEDS if name in _keys(models, "speed")],
        "speed_protocol": _speed_protocol(evaluation),
        "on_device": any(stage["peak_memory"].get("device_bytes") for stage in facts["stages"] + facts["exports"]),
        "samples": {name: model["samples"] for name, model in models.items() if model["samples"]},
        "missed": [one for one in facts["expectations"] if not one["passed"]],
    }


def _speed_protocol(evaluation: dict[str, Any]) -> dict[str, Any]:
    """What speed was measured under, with the types that the models were computed in."""
    types = {str(model["speed"]["dtype"]): None for model in evaluation["models"].values() if "dtype" in model["speed"]}
    return {**evaluation["speed_protocol"], **({"computed in": " and ".join(types)} if types else {})}


def _plots(facts: dict[str, Any]) -> dict[str, Any]:
    blocks, e2e, models = facts["blocks"], facts["e2e_qp"], facts["evaluation"]["models"]
    scales = {}
    for text in _keys(models, "perplexity"):
        values = {name: model["perplexity"].get(text) for name, model in models.items()}
        scales[text] = plots.scale([(MODELS.get(n, n), kind(n), v) for n, v in values.items() if is_number(v)])
    trained = [block for block in blocks if is_number(block.get("before")) and is_number(block.get("after"))]
    curves = [_curve(block) for block in blocks]
    depth = max(1, len(blocks) - 1)
    stages = [stage for stage in [*facts["stages"], *facts["exports"]] if is_number(stage["seconds"])]
    seconds = max(1e-9, sum(stage["seconds"] for stage in stages))
    return {
        "plot_scales": scales,
        "plot_blocks": plots.ranges(
            [(block["index"], block["before"], block["after"]) for block in trained],
            x_label="block",
            y_label="held-out loss",
        ),
        "plot_curves": plots.lines(
            [
                plots.Series(f"block {block['index']}", list(enumerate(curve)), "depth", shade=0.25 + 0.75 * i / depth)
                for i, (block, curve) in enumerate(zip(blocks, curves, strict=True))
                if len(curve) > 1
            ],
            x_label="epoch",
            y_label="held-out loss",
            log=True,
        ),
        "plot_e2e": plots.lines(
            [
                plots.Series("training", e2e["train"], "training"),
                plots.Series("held out", e2e["held_out"], "quantized", marks=True),
            ],
            x_label="update",
            y_label="loss",
        ),
        "plot_seconds": plots.bars(
            [(block["index"], block["seconds"]) for block in blocks if is_number(block.get("seconds"))],
            x_label="block",
            y_label="seconds",
            title=lambda at, value: f"block {at:g}: {_brief(value)}",
        ),
        "plot_layers": _heat_maps(facts["layers"]),
        "sparklines": {block["index"]: plots.sparkline(curve) for block, curve in zip(blocks, curves, strict=True)},
        "worst_layers": sorted(facts["layers"], key=_latest_error, reverse=True)[:WORST],
        "worst_blocks": sorted(trained, key=lambda block: -block["after"])[:WORST],
        "shares": [(stage["name"], stage["seconds"], stage["seconds"] / seconds) for stage in stages],
    }


def _curve(block: dict[str, Any]) -> list[float]:
    """Held-out loss of a block before training and after every epoch."""
    after = block.get("validation")
    values = [block.get("before"), *(after if isinstance(after, list) else [])]
    return [value for value in values if is_number(value)]


def _heat_maps(layers: list[dict[str, Any]]) -> list[tuple[str, Markup]]:
    """Errors of all linears as rounded and as trained, in the same shades: (heading, plot) of those that are known."""
    names = list(dict.fromkeys(_short(layer) for layer in layers))
    blocks = sorted({layer["block"] for layer in layers})
    known = [layer[key] for layer in layers for key in (ROUNDED, TRAINED) if layer[key] is not None]
    maps = []
    for key, heading in ((ROUNDED, "As first rounded"), (TRAINED, "After Block-AP")):
        values = {(_short(layer), layer["block"]): layer[key] for layer in layers if layer[key] is not None}
        if values:
            span = min(known), max(known)
            maps.append((heading, plots.heat_map(names, blocks, values, x_label="block", span=span)))
    return [(heading, plot) for heading, plot in maps if plot is not None]


def _latest_error(layer: dict[str, Any]) -> float:
    error = layer[ROUNDED] if layer[TRAINED] is None else layer[TRAINED]
    return float(error)


def _short(layer: dict[str, Any]) -> str:
    """`self_attn.q_proj` of `model.layers.3.self_attn.q_proj`: what the layers of all blocks have in common."""
    head, _, tail = layer["name"].partition(f".{layer['block']}.")
    return tail or head


def _keys(models: dict[str, Any], section: str) -> list[str]:
    """The names that occur in a section of any model, in order of appearance."""
    return list(dict.fromkeys(name for model in models.values() for name in model[section]))
