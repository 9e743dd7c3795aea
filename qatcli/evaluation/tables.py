"""The figures of an evaluation as tables for a terminal, each with what it was measured under."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qatcli.expectations import is_accuracy


def tables(metrics: dict[str, Any]) -> Iterator[RenderableType]:
    """What `measure` returned: texts, tasks, speed and size, and the prompts continued."""
    labels = _labels(list(metrics["models"]))
    if metrics["protocol"]:
        yield _texts(metrics, labels)
    if metrics["zero_shot_protocol"] and any(found["zero_shot"] for found in metrics["models"].values()):
        yield _tasks(metrics, labels)
    yield _sizes(metrics, labels)
    if metrics["speed_protocol"] and any(found["speed"] for found in metrics["models"].values()):
        yield _speeds(metrics, labels)
    samples = {name: found["samples"] for name, found in metrics["models"].items() if found.get("samples")}
    if samples:
        yield _samples(metrics["prompts"], samples)


def _labels(names: list[str]) -> dict[str, str]:
    """The shortest ends of the models' paths that tell all of them apart."""
    parts = [name.rstrip("/").split("/") for name in names]
    for count in range(1, max(map(len, parts), default=0) + 1):
        labels = ["/".join(each[-count:]) for each in parts]
        if len(set(labels)) == len(labels):
            return dict(zip(names, labels, strict=True))
    return {name: name for name in names}


def _texts(metrics: dict[str, Any], labels: dict[str, str]) -> Group:
    table, protocol = _table("perplexity and divergence from full precision"), metrics["protocol"]
    for text in protocol:
        for heading in (text, "KL", "KL 99 %", "top-1"):
            table.add_column(heading, justify="right")
    for name, found in metrics["models"].items():
        row = [labels[name]]
        for text in protocol:
            apart = found["divergence"].get(text, {})
            row.append(_number(found["perplexity"][text], ",.2f"))
            row.append(_number(apart.get("mean_kl"), ".4f") + _error(apart.get("kl_stderr"), ".4f"))
            row += [_number(apart.get("kl_99"), ".3f"), _number(apart.get("top1_agreement"), ".1%")]
        table.add_row(*row)
    lines = [
        f"{name}: {Path(p['file'] or p['source']).name}, {p['read']}, {_windows(p['windows'], labels)} of "
        f"{p['context']} tokens, {p['cut']}, "
        f"{'each behind the first token, ' if p.get('bos') == 'window' else ''}{p['compute']}"
        for name, p in protocol.items()
    ]
    tokens = {part["tokens"] for found in metrics["models"].values() for part in found["divergence"].values()}
    if tokens:
        lines.append(
            "KL: nats per token from full precision, mean with its standard error over windows, and 99th percentile "
            f"over the first {max(tokens):,} tokens; top-1: how often both predict the same token"
        )
    return Group(table, Text("\n".join(lines)))


def _windows(count: int | dict[str, int], labels: dict[str, str]) -> str:
    if isinstance(count, int):
        return f"{count} windows"
    return ", ".join(f"{each} windows ({labels[name]})" for name, each in count.items())


def _tasks(metrics: dict[str, Any], labels: dict[str, str]) -> Group:
    table, protocol = _table("zero-shot"), metrics["zero_shot_protocol"]
    results = {name: found["zero_shot"] for name, found in metrics["models"].items() if found["zero_shot"]}
    tasks = {task: figures for result in results.values() for task, figures in result["tasks"].items()}
    for task in tasks:
        table.add_column(task, justify="right")
    table.add_column("average", justify="right")
    for name, result in results.items():
        scores = [
            _score(result["tasks"].get(task), accuracy=is_accuracy(each["metric"])) for task, each in tasks.items()
        ]
        table.add_row(labels[name], *scores, _score(result["average"], accuracy=True))
    rows = "all rows" if protocol["limit"] is None else f"the first {protocol['limit']} rows of each"
    named = ", ".join(f"{task} {each['metric']} ({each['shots']}-shot)" for task, each in tasks.items())
    means = sorted({result["average"]["tasks"] for result in results.values() if result["average"]})
    caption = (
        f"accuracies in percent, with standard errors; {named}; {''.join(f'average of {n} tasks; ' for n in means)}"
        f"{rows}; lm-eval {protocol['lm_eval']}, {protocol['compute']}"
    )
    return Group(table, Text(caption))


def _score(figure: dict[str, Any] | None, *, accuracy: bool) -> str:
    if figure is None or figure["value"] is None:
        return ""
    scale, form = (100, ".1f") if accuracy else (1, ",.2f")
    error = None if figure["stderr"] is None else scale * figure["stderr"]
    return f"{scale * figure['value']:{form}}{_error(error, form)}"


def _sizes(metrics: dict[str, Any], labels: dict[str, str]) -> Group:
    table = _table("size")
    for heading in ("MiB on disk", "bits/weight", "bits/parameter"):
        table.add_column(heading, justify="right")
    table.add_column("loaded as")
    for name, found in metrics["models"].items():
        size = found["size"] or {}
        bits = [_number(size.get(key), ".3f") for key in ("bits_per_weight", "bits_per_parameter")]
        table.add_row(labels[name], _mib(size.get("file_bytes")), *bits, found["loaded_as"])
    caption = "bits/weight: codes, scales and zero points of quantized linears; bits/parameter: the whole model"
    return Group(table, Text(caption))


def _speeds(metrics: dict[str, Any], labels: dict[str, str]) -> Group:
    table, conditions = _table("speed and memory"), metrics["speed_protocol"]
    for heading in ("prefill tok/s", "decode tok/s", "weights MiB", "peak MiB"):
        table.add_column(heading, justify="right")
    speeds = {name: found["speed"] for name, found in metrics["models"].items() if found["speed"]}
    for name, speed in speeds.items():
        peak = speed["peak"].get("device_bytes", speed["peak"].get("host_bytes"))
        rates = [f"{speed[kind]:,.1f}" for kind in ("prefill", "decode")]
        table.add_row(labels[name], *rates, _mib(speed["weight_bytes"]), _mib(peak))
    threads = conditions["threads"]
    dtypes = ", ".join(sorted({speed["dtype"] for speed in speeds.values()}))
    caption = (
        f"one sequence, {conditions['prompt_tokens']} tokens read, {conditions['new_tokens']} generated, median of "
        f"{conditions['repeats']}, weights and arithmetic in {dtypes}; {conditions['device']}, "
        f"{threads} thread{'s' * (threads != 1)}, load {conditions['load']}; peak: what loading and running added"
    )
    return Group(table, Text(caption))


def _samples(prompts: list[str], samples: dict[str, list[str]]) -> Table:
    table = Table(title="the same prompt, greedy decoding", title_justify="left", show_lines=True)
    table.add_column("prompt", ratio=1)
    for name in samples:
        table.add_column(name, ratio=2)
    for index, prompt in enumerate(prompts):
        table.add_row(prompt, *(texts[index].strip() for texts in samples.values()))
    return table


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("model", overflow="fold")
    return table


def _mib(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:,.1f}"


def _error(value: float | None, form: str) -> str:
    return "" if value is None else f" +-{value:{form}}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
