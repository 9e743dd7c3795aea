"""`qat plan`: the figures of all stages side by side, as one JSON object and as a table."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from rich.table import Table

from qatcli import machine
from qatcli.casting import dtype_name
from qatcli.directory import CHAIN
from qatcli.errors import QatError
from qatcli.formats import FORMATS, ExportOptions, deployment
from qatcli.formats.contract import Deployment
from qatcli.formats.gguf import likely_type
from qatcli.packed import PackedCheckpoint
from qatcli.plan import GIB, Need, bytes_in, libraries, need, setting, suit
from qatcli.plan.needs import Setting, pack_bytes
from qatcli.plan.timing import measure_rates, work
from qatcli.recipe import Recipe, carried_bits, untrained_gptq
from qatcli.runlog import duration


def make_plan(recipe: Recipe, device: torch.device, run_dir: Path) -> dict[str, Any]:
    """Predict the chain and the recipe's exports.

    Bytes: `device` (null on a CPU), `host` and `disk` of every stage, and `free` of this machine. Seconds are null for
    exports, and for a GPU that is not in this machine.
    """
    s = setting(recipe, device, run_dir)
    for stage in CHAIN:
        suit(s, stage)
    here = device.type == "cpu" or torch.cuda.is_available()
    rates = measure_rates(device, s.dtype("auto")) if here else None
    steps = [(s, stage, "") for stage in CHAIN]
    if "gptq" in recipe.eval.baselines:
        steps.insert(-1, (replace(s, recipe=untrained_gptq(recipe)), "block-ap", "gptq"))
    steps += [(s, "export", name) for name in recipe.export.formats]
    needs, stages = [need(*step) for step in steps], []
    for found, (step, stage, _) in zip(needs, steps, strict=True):
        row = {**asdict(found), "streams": [asdict(stream) for stream in found.streams]}
        todo = work(step).get(stage)
        row["seconds"] = round(todo.seconds(rates), 1) if rates and todo else None
        row["operations"] = todo.operations if todo else None
        stages.append(row)
    free = {
        "device": machine.device_memory(device) if device.type == "cuda" and here else None,
        "host": machine.host_memory(),
        "disk": machine.disk_space(run_dir),
    }
    quantized = sum(q.weights for q in s.model.linears.values())
    return {
        "device": str(device),
        "compute": dtype_name(s.dtype("auto")),
        "model": {
            "parameters": s.model.total,
            "quantized_weights": quantized,
            "blocks": len(s.model),
            "packed_bytes": pack_bytes(s),
            "bits_per_parameter": round(8 * pack_bytes(s) / s.model.total, 4),
        },
        "stages": stages,
        "disk": sum(found.disk for found in needs),
        "seconds": sum(row["seconds"] or 0 for row in stages) if rates else None,
        "free": free,
        "short_of": _short_of(needs, free, bytes_in(run_dir)),
        "rates": asdict(rates) if rates else None,
        "runtimes": {name: [asdict(row) for row in rows] for name, rows in runtimes(s).items()},
        "refused": {name: why.message for name in recipe.export.formats if (why := refusal(name, s)) is not None},
    }


def runtimes(s: Setting) -> dict[str, list[Deployment]]:
    """Format -> who runs it, for every format that carries linears of these bits, sizes and groups."""
    checkpoint = _packed(s)
    zero_points, wanted = s.recipe.quant.zero_points, s.recipe.export.gguf_type
    symmetric = zero_points == "middle"
    gguf_types = {str(likely_type(quant, zero_points, wanted)) for quant in s.model.linears.values()}
    rows = {
        "gptq": deployment.gptq(checkpoint, symmetric=symmetric),
        "bitblas": deployment.bitblas(checkpoint, s.recipe.export.bitblas_zeros),
        "native": deployment.native(),
        "gguf": deployment.gguf("model.gguf", gguf_types),
        "awq": deployment.awq(checkpoint),
        "compressed-tensors": deployment.compressed_tensors(checkpoint, symmetric=symmetric),
        "mlx": deployment.mlx(checkpoint),
        "dense": deployment.dense(),
    }
    carried, bits = carried_bits(s.recipe), {quant.bits for quant in s.model.linears.values()}
    fit = {name: found for name, found in rows.items() if bits.issubset(carried[name])}
    return {name: found for name, found in fit.items() if refusal(name, s) is None}


def refusal(name: str, s: Setting) -> QatError | None:
    """Why a format cannot hold the model, as far as sizes and architecture tell; None where it can be promised."""
    refuse = FORMATS[name].refuse
    try:
        if refuse is not None:
            asked = s.recipe.export
            refuse(_packed(s), ExportOptions(awq_promote=asked.awq_promote, gguf_type=asked.gguf_type))
    except QatError as error:
        return error
    return None


def _packed(s: Setting) -> PackedCheckpoint:
    """What will be exported, without its tensors."""
    return PackedCheckpoint(Path(), s.model.config.to_dict(), s.model.linears, dict.fromkeys(s.model.names, ""))


def render(plan: dict[str, Any]) -> Group:
    """The plan for people."""
    gpu = plan["device"] != "cpu"
    costs = Table(title=f"plan on {plan['device']}, {plan['compute']}", title_justify="left", caption_justify="left")
    costs.add_column("stage")
    for name in (["GPU GiB"] if gpu else []) + ["host GiB", "disk GiB", "time, roughly"]:
        costs.add_column(name, justify="right")
    costs.add_column("most of it")
    for row in plan["stages"]:
        largest = sorted(row["parts"].items(), key=lambda part: part[1], reverse=True)[:2]
        time = duration(row["seconds"]) if row["seconds"] is not None else ""
        cells = [_gib(row["device"])] if gpu else []
        cells += [_gib(row["host"]), _gib(row["disk"] + row["cache"]), time]
        costs.add_row(row["stage"], *cells, ", ".join(f"{name} {_gib(size)}" for name, size in largest))
    free = plan["free"]
    cells = [_gib(free["device"])] if gpu else []
    costs.add_row("free here", *cells, _gib(free["host"]), _gib(free["disk"]), "", "")
    costs.caption = _caption(plan)
    who = Table(title="what can run the result", title_justify="left")
    for name in ("format", "runtime", "releases", "remark"):
        who.add_column(name)
    for name, rows in plan["runtimes"].items():
        for row in rows:
            who.add_row(name, row["runtime"], row["releases"], row["remark"])
    return Group(costs, who)


def _caption(plan: dict[str, Any]) -> str:
    model = plan["model"]
    lines = [
        f"{model['parameters'] / 1e9:.3g} billion parameters in {model['blocks']} blocks become "
        f"{_gib(model['packed_bytes'])} GiB, {model['bits_per_parameter']} bits per parameter",
    ]
    streams = [(row["stage"], stream) for row in plan["stages"] for stream in row["streams"]]
    places = {"device": "on the device", "host": "in host memory", "file": "in files"}
    for stage, stream in streams:
        lines.append(f"activations of {stage}: {stream['name']}, {_gib(stream['bytes'])} GiB {places[stream['place']]}")
    if plan["rates"] is None:
        lines.append("no such device here: neither its memory nor its time is known")
    lines += [f"NO EXPORT to {name}: {why}" for name, why in plan["refused"].items()]
    return "\n".join([*lines, *plan["short_of"]])


def _short_of(needs: list[Need], free: dict[str, int | None], kept: int) -> list[str]:
    """A sentence for everything that is more than is free; `kept` bytes are in the run directory already."""
    here = libraries()  # which what is free no longer has
    wanted = [
        (row.stage, what, size)
        for row in needs
        for what, size in (("device", row.device), ("host", row.host - here), ("disk", row.disk + row.cache))
    ]
    disk = sum(row.disk for row in needs) + max(row.cache for row in needs)  # outputs stay, a cache is removed
    wanted.append(("the whole chain", "disk", disk - kept))
    found = []
    for who, what, size in wanted:
        there = free[what]
        if size is not None and there is not None and size > there:
            found.append(f"NOT ENOUGH: {who} needs {_gib(size)} GiB of {what}, {_gib(there)} GiB are free")
    return found


def _gib(size: int | None) -> str:
    return "?" if size is None else f"{size / GIB:.2f}"
