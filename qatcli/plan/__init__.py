"""What a recipe will cost, before it costs anything: memory, disk and time of every stage, and what runs the result.

Predicted from the recipe and the model's configuration alone. `report.make_plan` is `qat plan`; `require` takes the
same figures of one stage and compares them with what the machine has, before the stage starts.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil
import torch

from qatcli import machine
from qatcli.activations import StreamBudget, stream_budget
from qatcli.errors import InputError, ResourceError
from qatcli.memory import release_memory
from qatcli.models.gguf import cache_directory
from qatcli.plan.model import PlannedModel
from qatcli.plan.needs import FP32, MEMORY, Setting, Stream, disk_bytes
from qatcli.plan.tracing import UntraceableError
from qatcli.recipe import ModelSection, QuantSection, Recipe, check_context, check_group_sizes, check_patterns

GIB = 2**30
SURE = 0.8  # predictions are within a quarter: below this share of one, what there is cannot be enough
KNOBS = {
    "calibrate": "lower calibrate.moment_samples, calibrate.seq_len or block_ap.cache.host_gb",
    "block-ap": "lower block_ap.batch_size, calibrate.seq_len, or block_ap.cache.device_gb and host_gb, which puts "
    "activations into files",
    "e2e-qp": "lower e2e_qp.micro_batch_size or e2e_qp.seq_len, or set e2e_qp.gradient_checkpointing; "
    "block_ap.cache.device_gb and host_gb bound the activations of full precision",
    "pack": "close other programs",
    "export": "set export.runtimes to false, which leaves logits uncompared",
    "eval": "lower eval.perplexity's seq_len or eval.zero_shot.batch_tokens, set eval.kl: false, cut eval.baselines, "
    "or lower block_ap.cache.device_gb and host_gb",
}


@dataclass(frozen=True)
class Need:
    """Bytes that a stage takes at its peak.

    device: on the GPU, None on a CPU. host: resident in the process, libraries included. disk: in the run directory.
    cache: of activations in files. peak and parts: the phase that takes most where the blocks run, and of what.
    """

    stage: str
    device: int | None
    host: int
    disk: int
    cache: int
    streams: tuple[Stream, ...]
    peak: str
    parts: dict[str, int]


def need(s: Setting, stage: str, variant: str = "") -> Need:
    """Predict one stage."""
    phases = MEMORY[stage](s)
    streams = s.streams(stage)
    parts = {phase.name: phase.parts(on_cpu=s.on_cpu) for phase in phases}
    peak = max(parts, key=lambda name: sum(parts[name].values()))
    most = sum(parts[peak].values())
    return Need(
        stage=f"{stage} {variant}".strip(),
        device=None if s.on_cpu else most,
        host=libraries() + (most if s.on_cpu else max(sum(phase.host.values()) for phase in phases)),
        disk=disk_bytes(s, stage, variant),
        cache=sum(stream.bytes for stream in streams if stream.place == "file"),
        streams=tuple(streams),
        peak=peak,
        parts=parts[peak],
    )


def setting(recipe: Recipe, device: torch.device, run_dir: Path) -> Setting:
    """What plans of this recipe are made for, streams placed by what is free now."""
    cache = recipe.block_ap.cache
    if device.type == "cuda" and not torch.cuda.is_available() and cache.device_gb is None:
        cache = cache.model_copy(update={"device_gb": 0.0})  # it is elsewhere: nothing is known of its memory

    def budget() -> StreamBudget:
        return stream_budget(device, cache, run_dir)

    return Setting(recipe, _model(recipe), device, budget)


def suit(s: Setting, stage: str) -> None:
    """RecipeError when what the recipe says of `stage` does not suit the model."""
    if stage == "calibrate":
        check_patterns(s.recipe, s.model.in_blocks, s.model.other_linears)
        check_group_sizes(s.recipe, {name: quant.in_features for name, quant in s.model.linears.items()})
        check_context(s.recipe, "calibrate", s.model.context)
    elif stage == "e2e-qp":
        check_context(s.recipe, "e2e_qp", s.model.context)


def require(recipe: Recipe, stage: str, variant: str, *, device: torch.device, out: Path) -> str | None:
    """ResourceError when the machine cannot have what `stage` needs; a warning when that is uncertain. RecipeError when
    the recipe does not suit the model.

    `out` is where the stage works; what an interrupted run left there is not needed again.
    """
    if stage not in MEMORY:
        return None
    release_memory()
    unread = (InputError,) if stage in ("pack", "export") else ()  # these do without the full-precision model
    try:
        s = setting(recipe, device, out)
        suit(s, stage)
        predicted = need(s, stage, variant)
    except (UntraceableError, *unread) as error:
        return f"what {stage} needs is not known: {error.message}"
    cache = Path(recipe.block_ap.cache.dir or out)
    files = [(out, max(0, predicted.disk - bytes_in(out))), (cache, predicted.cache)]
    if stage == "calibrate" and s.model.to_convert:
        files.append((cache_directory(), FP32 * s.model.total))
    disks = defaultdict[int, list[tuple[Path, int]]](list)  # by file system
    for folder, size in files:
        disks[machine.existing(folder).stat().st_dev].append((folder, size))
    knob = KNOBS[stage]
    larger = "free space, or choose --run, block_ap.cache.dir or $XDG_CACHE_HOME (converted GGUF files) elsewhere"
    wanted = [("host memory", predicted.host - libraries(), machine.host_memory(), knob)]
    for placed in disks.values():
        folder, size = placed[0][0], sum(size for _, size in placed)
        wanted.append((f"disk at {folder}", size, machine.disk_space(folder), larger))
    if predicted.device is not None:
        wanted.append((f"memory on {device}", predicted.device, machine.device_memory(device), knob))
    doubt = None
    for what, size, there, hint in wanted:
        if size <= there:
            continue
        text = f"{stage} needs about {size / GIB:.1f} GiB of {what}, and {there / GIB:.1f} GiB are free"
        if size * SURE > there:
            largest = sorted(predicted.parts.items(), key=lambda part: part[1], reverse=True)[:3]
            parts = "; most of it: " + ", ".join(f"{name} {part / GIB:.1f}" for name, part in largest)
            raise ResourceError(text + parts * ("disk" not in what), hint=f"{hint}; see `qat plan`")
        doubt = f"{text}; if it fails: {hint}"
    return doubt


def libraries() -> int:
    """Bytes that this process holds now: what Python, torch and transformers take before a stage begins."""
    return int(psutil.Process().memory_info().rss)


def bytes_in(folder: Path) -> int:
    """Bytes of all files below a folder, which need not exist."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@cache
def _model_of(model: str, quant: str) -> PlannedModel:
    return PlannedModel(ModelSection.model_validate_json(model), QuantSection.model_validate_json(quant))


def _model(recipe: Recipe) -> PlannedModel:
    """The planned model of a recipe, made once per process: a chain asks for it before every stage."""
    return _model_of(recipe.model.model_dump_json(), recipe.quant.model_dump_json())
