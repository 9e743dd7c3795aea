"""What every stage keeps in memory at a time, and what it writes: one function per stage, read off its code.

A stage is a list of phases; its peak is its largest phase. A phase says what stays where the blocks run (`compute`),
what comes and goes there (`work`), and what is in host memory whatever the device (`host`); on a CPU all of it is host
memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from qatcli.activations import AHEAD, SWEEP_BATCH, Place, StreamBudget
from qatcli.casting import dtype_name
from qatcli.data.corpus import BYTE_LIMIT
from qatcli.data.files import is_json_list
from qatcli.data.sources import local_paths
from qatcli.evaluation.measure import BATCH_TOKENS
from qatcli.evaluation.perplexity import divergence_windows
from qatcli.formats.gguf import likely_type
from qatcli.formats.layouts.gguf_blocks import TYPES
from qatcli.formats.runtimes import too_large
from qatcli.machine import fits
from qatcli.packed import ModuleQuant
from qatcli.plan.model import PlannedModel, groups_of, packed_bytes
from qatcli.recipe import DataSource, Recipe
from qatcli.streaming import PART
from qatcli.teacher import ENTROPY_BYTES, KEPT_BYTES
from qatcli.training import compute_dtype

FP32 = 4
SHARD = int(5e9)  # bytes that a ShardWriter collects before it writes
HEAP = 1.33  # what C's allocator holds over what is in use, where tensors of many sizes come and go (measured)
WARM = 96 * 2**20  # bytes that libraries take on a CPU once they compute (measured)
TOKENIZER = 2**26
TEXT_LIBRARIES = 2**26  # what reads files and hub data sets
ZERO_SHOT = 2**28  # lm-eval and the questions of the paper's five tasks (measured)
GZIPPED, JSON_LIST = 4, 6  # times as large as the file is its text, a guess, and a list that is read whole
UNSEEN_TEXT = 2**28  # twice the bytes of a data set on the hub, a guess; more than eight times that is never read


@dataclass(frozen=True)
class Stream:
    """An activation stream and where it will live."""

    name: str
    bytes: int
    place: Place


@dataclass(frozen=True)
class Phase:
    """Bytes by what they are, in a part of a stage where they live together."""

    name: str
    compute: dict[str, int] = field(default_factory=dict)
    work: dict[str, int] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)

    def parts(self, *, on_cpu: bool) -> dict[str, int]:
        """What is on the GPU by name, or in all where there is none."""
        found = Counter(self.compute)
        found.update({name: int(size * HEAP) if on_cpu else size for name, size in self.work.items()})
        if on_cpu:
            found.update({**self.host, "libraries at work": WARM if self.work else 0})
        return {name: size for name, size in found.items() if size}


@dataclass(frozen=True)
class Setting:
    """What a plan is made for. `budget` places the streams of one stage."""

    recipe: Recipe
    model: PlannedModel
    device: torch.device
    budget: Callable[[], StreamBudget]

    @property
    def on_cpu(self) -> bool:
        return self.device.type == "cpu"

    def dtype(self, amp: str) -> torch.dtype:
        """The compute dtype, on a GPU that is not here as well."""
        if amp == "auto" and not self.on_cpu and not torch.cuda.is_available():
            return torch.bfloat16
        return compute_dtype(amp, self.device)

    def reading(self, parameters: int) -> int:
        """Bytes of mapped checkpoint pages behind parameters that are being read in fp32."""
        return 0 if self.on_cpu and self.model.dtype == torch.float32 else parameters * self.model.dtype.itemsize

    @property
    def looks_ahead(self) -> bool:
        """Whether block-ap has a block's successor at hand."""
        return self.recipe.block_ap.lookahead and len(self.model) > 1

    @property
    def has_teacher(self) -> bool:
        """Whether e2e-qp learns from full precision."""
        return self.recipe.e2e_qp.text_weight < 1

    @property
    def kept_bytes(self) -> int:
        """What e2e-qp keeps of the teacher's distribution at one position."""
        tokens = min(self.recipe.e2e_qp.teacher_tokens, self.model.vocabulary)
        return tokens * KEPT_BYTES + ENTROPY_BYTES if self.has_teacher else 0

    @property
    def measured_itemsize(self) -> int:
        """Bytes of a parameter as it is measured: in fp32 where that is what is computed in, else as it is stored."""
        return FP32 if self.dtype("auto") == torch.float32 else self.model.dtype.itemsize

    @property
    def measures_by_blocks(self) -> bool:
        """Whether eval has to read full precision block by block."""
        config = self.recipe.eval
        asked = (config.kl or "full_precision" in config.baselines) and bool(config.perplexity)
        return asked and not fits(self.model.total * self.measured_itemsize, self.device)

    def streams(self, stage: str) -> list[Stream]:
        """The activation streams of a stage, in the order in which it makes them."""
        calibrate, end, model = self.recipe.calibrate, self.recipe.e2e_qp, self.model
        window = calibrate.seq_len * model.hidden * self.dtype(self.recipe.block_ap.amp).itemsize
        if stage == "e2e-qp" and self.has_teacher:
            window = end.seq_len * model.hidden * self.dtype(end.amp).itemsize
            wanted = {"full precision": min(PART, max(end.samples, end.validation_samples))}
        elif stage == "eval" and self.measures_by_blocks:
            longest = max(text.seq_len for text in self.recipe.eval.perplexity)
            window = longest * model.hidden * self.dtype("auto").itemsize
            wanted = {"full precision": PART}
        elif stage == "calibrate":
            wanted = {"inputs": min(calibrate.moment_samples, calibrate.samples)}
        elif stage == "block-ap":
            kinds = ("targets", "inputs", "next block's targets")[: 3 if self.looks_ahead else 2]
            counts = {"train": calibrate.samples, "validation": calibrate.validation_samples}
            wanted = {f"{windows} {kind}": count for windows, count in counts.items() for kind in kinds}
        else:
            return []
        budget = self.budget()
        return [Stream(name, count * window, budget.place(count * window)) for name, count in wanted.items() if count]

    def held(self, stage: str) -> tuple[dict[str, int], dict[str, int]]:
        """The streams that are in compute and in host memory, as parts of a phase."""
        found = self.streams(stage)
        inside = sum(stream.bytes for stream in found if stream.place == "device")
        beside = sum(stream.bytes for stream in found if stream.place == "host")
        return {"activations": inside}, {"activations": beside}


def calibrate(s: Setting) -> list[Phase]:
    """Search the grids of one block after another, on the inputs of the full-precision model."""
    model, seq_len = s.model, s.recipe.calibrate.seq_len
    dtype = s.dtype(s.recipe.block_ap.amp)
    inside, beside = s.held("calibrate")
    block = model.block_sizes[model.largest]
    codes = sum(q.weights for q in model.quants[model.largest].values())
    # The search and the error of a linear: four temporaries of its size in fp32.
    rounding = 4 * FP32 * _largest(model) + codes
    forward = model.passes("dense", SWEEP_BATCH, seq_len, dtype, dtype).forward
    parameters = {**inside, "block": FP32 * block}
    # Of a GGUF file transformers makes the whole model in fp32, once; the largest tensor twice more on the way.
    dense = {"GGUF file in fp32": FP32 * model.total, "reading": 2 * FP32 * model.vocabulary * model.hidden}
    return [
        *([Phase("converting", {}, {}, dense)] if model.to_convert else []),
        _text(s.recipe.calibrate.data),
        _first_inputs(s, inside, beside, tokenizer=TOKENIZER),
        Phase("blocks", parameters, {"work": max(forward, rounding)}, _read(s, beside, block, tokenizer=TOKENIZER)),
        _finish(s, inside, beside),
    ]


def block_ap(s: Setting) -> list[Phase]:
    """Train one block after another."""
    config, model, seq_len = s.recipe.block_ap, s.model, s.recipe.calibrate.seq_len
    dtype = s.dtype(config.amp)
    inside, beside = s.held("block-ap")
    block = model.block_sizes[model.largest]
    quants = model.quants[model.largest].values()
    batch = config.batch_size * seq_len * model.hidden * dtype.itemsize
    ahead = 1 if s.on_cpu and all(stream.place == "host" for stream in s.streams("block-ap")) else 1 + AHEAD
    batches = {"batches": (3 if s.looks_ahead else 2) * batch * ahead}
    phases = [_first_inputs(s, inside, beside), _finish(s, inside, beside)]
    passes = model.passes("fake_quant", config.batch_size, seq_len, dtype, dtype)
    parameters = {**inside, "block": FP32 * block, "next block": FP32 * block if s.looks_ahead else 0}
    if config.rounding == "gptq":
        hessians = sum(q.in_features**2 for q in quants)
        widest = max((q.in_features for q in quants), default=0)
        # error_feedback: five matrices of the Hessian's size; the weight, its compensated form and two temporaries.
        feedback = FP32 * (5 * widest**2 + 4 * _largest(model))
        work = {"Hessians": FP32 * hessians, "work": max(feedback, 2 * FP32 * widest**2 + passes.forward)}
        phases.append(Phase("error feedback", {**parameters, "trained block": FP32 * block}, work, dict(beside)))
    if config.epochs:
        trained = block + 2 * groups_of(quants)
        optimizer = {"optimizer": 2 * FP32 * trained, "best iterate": FP32 * trained}  # Adam's two moments
        kept = passes.training
        if s.looks_ahead:  # its activations are freed before the gradients of the block itself are made
            following = model.passes("dense", config.batch_size, seq_len, torch.float32, dtype)
            kept = max(kept, passes.kept + following.training)
        work = {**batches, "gradients and kept activations": kept}
        phases.append(Phase("training", {**parameters, **optimizer}, work, dict(beside)))
    else:
        phases.append(Phase("validation", parameters, {**batches, "work": passes.forward}, dict(beside)))
    return phases


def e2e_qp(s: Setting) -> list[Phase]:
    """Write down what full precision teaches, then train the scales of the whole packed model."""
    config, model = s.recipe.e2e_qp, s.model
    dtype = s.dtype(config.amp)
    rows = config.micro_batch_size * config.seq_len
    groups = groups_of(model.linears.values())
    unpacked = groups  # zero points, uint8
    student = sum(packed_bytes(q, scale=FP32) for q in model.linears.values()) + unpacked
    head = model.vocabulary * model.hidden
    student += FP32 * (model.total - _quantized(model)) - (0 if model.tied else (FP32 - dtype.itemsize) * head)
    passes = model.passes("packed", config.micro_batch_size, config.seq_len, torch.float32, dtype)
    if config.gradient_checkpointing:
        kept = len(model) * rows * model.hidden * FP32 + passes.training
    else:
        kept = (len(model) - 1) * passes.kept + passes.training
    logits = rows * model.vocabulary * dtype.itemsize
    # Of the scales: gradients, Adam's moments, the best state; by reach also their units, and what they were in a step.
    copies_of_scales = 6 if config.lr_units == "reach" else 4
    models = {"student": student, "scales": copies_of_scales * FP32 * groups}
    taught = {"kept tokens": min(PART, config.samples) * config.seq_len * s.kept_bytes}
    cast = dtype.itemsize * head if model.tied and dtype != torch.float32 else 0
    work = {"activations": kept, "logits and their gradient": 2 * logits, "head": cast}
    return [
        _text(config.data or s.recipe.calibrate.data),
        *(_block_by_block(s, "e2e-qp", config.seq_len, dtype, taught) if s.has_teacher else ()),
        Phase("loading", models, {}, {"tokenizer": TOKENIZER}),
        Phase("training", models, work, {"tokenizer": TOKENIZER}),
    ]


def pack(s: Setting) -> list[Phase]:
    """Collect a shard and write it. A tensor that keeps its type is in the shard as the pages it was read from."""
    given, stored = s.recipe.pack.dtype, dtype_name(s.model.dtype)
    host = {"shard": min(SHARD, pack_bytes(s))}
    if stored == "float32" if given == "auto" else given != stored:
        host["reading"] = s.model.dtype.itemsize * s.model.outside
    return [Phase("writing", {}, {}, host)]


def evaluate(s: Setting) -> list[Phase]:
    """Measure one model after another, on a CPU beside the full-precision one."""
    config, model = s.recipe.eval, s.model
    dtype = s.dtype("auto")
    # Where it is measured in fp32 all of it is; on a CPU packed linears are unpacked once.
    full, by_blocks = model.total * s.measured_itemsize, s.measures_by_blocks
    packed = full + _quantized(model) * (dtype.itemsize - s.measured_itemsize) if s.on_cpu else pack_bytes(s)
    beside = config.kl and s.on_cpu and not by_blocks
    alone = ("full_precision" in config.baselines or config.kl) and not by_blocks
    dense = full if "round_to_nearest" in config.baselines or (alone and not beside) else 0
    if not s.on_cpu and (config.speed or config.prompts):  # decoding makes a second copy of the codes (PackedLinear)
        packed += sum(packed_bytes(q, scale=0) for q in model.linears.values())
    models = {"measured model": max(packed, dense), "full precision": full if beside else 0}
    mapped = s.reading(model.total) if dense else pack_bytes(s)
    host = {"reading": 0 if s.on_cpu else mapped, "tokenizer": TOKENIZER}
    work = kept = 0
    if config.zero_shot is not None:  # every token of a row has logits at most, and few of them are in fp32 at a time
        row = config.zero_shot.batch_tokens
        forward = model.passes("dense", 1, row, model.dtype, dtype).forward
        work = row * model.vocabulary * dtype.itemsize + forward
        host["zero-shot"] = ZERO_SHOT
    for text in config.perplexity:
        batch = max(1, BATCH_TOKENS // text.seq_len)
        batch = min(batch, text.windows or batch)
        row = text.seq_len * model.vocabulary
        forward = model.passes("dense", batch, text.seq_len, model.dtype, dtype).forward
        work = max(work, batch * row * dtype.itemsize + max(forward, 2 * FP32 * row))
        if config.kl:  # both log-probabilities, and their divergence
            work = max(work, 5 * FP32 * row)
            compared = divergence_windows(text.seq_len)
            kept += min(compared, text.windows or compared) * row * dtype.itemsize
    logits = {"full-precision logits": kept} if by_blocks or not s.on_cpu else {}  # so that it need not be there beside
    phases = [Phase("measuring", models, {"work": work}, host | logits)]
    if by_blocks:
        phases += _block_by_block(s, "eval", max(text.seq_len for text in config.perplexity), dtype, logits)
    return phases


def export(s: Setting) -> list[Phase]:
    """Write one format, then compare every tensor with its source; comparing logits builds the dense model in fp32."""
    model, verify = s.model, s.recipe.export.verify
    embedding = model.vocabulary * model.hidden
    writing = {"shard": min(SHARD, pack_bytes(s)), "reading": model.dtype.itemsize * model.outside}
    phases = [Phase("writing", {}, {}, writing)]
    if verify:
        # The largest tensor, cast from its source and then beside what is in the file; codes, unpacked and read back.
        compared = {"comparing": max(embedding * (2 + max(2, model.dtype.itemsize)), 5 * _largest(model))}
        dense = FP32 * model.total if s.recipe.export.runtimes and not too_large(model.total) else 0
        phases.append(Phase("comparing", {}, {}, {**compared, "dense model": dense}))
    return phases


MEMORY: dict[str, Callable[[Setting], list[Phase]]] = {
    "calibrate": calibrate,
    "block-ap": block_ap,
    "e2e-qp": e2e_qp,
    "pack": pack,
    "export": export,
    "eval": evaluate,
}


def disk_bytes(s: Setting, stage: str, variant: str = "") -> int:
    """Bytes that a stage writes into the run directory, the largest amount at a time; streams in files excluded."""
    model, recipe = s.model, s.recipe
    if stage in ("pack", "eval"):
        return pack_bytes(s) if stage == "pack" else 2**20
    if stage == "export":
        return _export_bytes(s, variant)
    training = sum(packed_bytes(q, scale=FP32) for q in model.linears.values())
    training += FP32 * (model.total - _quantized(model) - model.outside) + model.dtype.itemsize * model.outside
    if stage == "calibrate":
        windows = (recipe.calibrate.samples + recipe.calibrate.validation_samples) * recipe.calibrate.seq_len
        return training + 4 * windows
    if stage == "e2e-qp":
        windows = (recipe.e2e_qp.samples + recipe.e2e_qp.validation_samples) * recipe.e2e_qp.seq_len
        state = 4 * FP32 * groups_of(model.linears.values())  # now, best, two moments; a new one beside the old
        return training + (4 + s.kept_bytes) * windows + 2 * state
    return training


def pack_bytes(s: Setting) -> int:
    """Bytes of the packed checkpoint that is published."""
    stored = 2 if s.recipe.pack.dtype in ("auto", "float16", "bfloat16") else FP32
    scale = 2 if s.recipe.pack.scale_dtype == "float16" else FP32
    linears = sum(packed_bytes(q, scale=scale) for q in s.model.linears.values())
    return linears + stored * (s.model.total - _quantized(s.model))


def _export_bytes(s: Setting, name: str) -> int:
    rest = 2 * (s.model.total - _quantized(s.model))
    if name == "dense":
        return 2 * s.model.total
    if name == "gguf":
        return rest + sum(_gguf_bytes(s, quant) for quant in s.model.linears.values())
    return max(pack_bytes(s), rest)


def _gguf_bytes(s: Setting, quant: ModuleQuant) -> int:
    block = TYPES[likely_type(quant, s.recipe.quant.zero_points, s.recipe.export.gguf_type) or "Q8_0"]
    return quant.weights * block.bytes // block.length


def _text(sources: Sequence[DataSource]) -> Phase:
    """Reading documents and drawing windows of them, a source after another: two at most are held."""
    size = sum(sorted(map(_text_bytes, sources))[-2:])
    return Phase("reading text", {}, {}, {"text": size + TEXT_LIBRARIES, "tokenizer": TOKENIZER})


def _text_bytes(source: DataSource) -> int:
    files = local_paths(source.source) or []
    inside = sum(file.stat().st_size * (GZIPPED if file.suffix == ".gz" else 1) for file in files)
    parsed = JSON_LIST * max((file.stat().st_size for file in files if is_json_list(file)), default=0)
    return max(parsed, 2 * min(BYTE_LIMIT, inside)) if files else UNSEEN_TEXT


def _first_inputs(s: Setting, inside: dict[str, int], beside: dict[str, int], *, tokenizer: int = 0) -> Phase:
    embedding = s.model.embedding
    compute = {**inside, "embedding": FP32 * embedding}
    return Phase("first inputs", compute, {}, _read(s, beside, embedding, tokenizer=tokenizer))


def _block_by_block(s: Setting, stage: str, seq_len: int, dtype: torch.dtype, kept: dict[str, int]) -> list[Phase]:
    """Run full precision over windows, a block in memory at a time; `kept` is what is made of the logits of a part."""
    model, (inside, beside), size = s.model, s.held(stage), dtype.itemsize
    block, ends = model.block_sizes[model.largest], model.outside
    forward = model.passes("dense", SWEEP_BATCH, seq_len, dtype, dtype).forward
    logits = {"logits": 2 * seq_len * model.vocabulary * size}  # of one window while the next one's are made
    read, head = (_read(s, beside, count, tokenizer=TOKENIZER) for count in (block, ends))
    return [
        _first_inputs(s, inside, beside, tokenizer=TOKENIZER),
        Phase("full precision", {**inside, "block": size * block}, {"work": forward}, read),
        Phase("its head", {**inside, "embedding and head": size * ends}, logits, head | kept),
    ]


def _finish(s: Setting, inside: dict[str, int], beside: dict[str, int]) -> Phase:
    outside = s.model.outside * s.model.dtype.itemsize
    return Phase("finishing", dict(inside), {}, {**beside, "embedding and head": outside})


def _read(s: Setting, beside: dict[str, int], parameters: int, *, tokenizer: int = 0) -> dict[str, int]:
    return {**beside, "reading": s.reading(parameters), "tokenizer": tokenizer}


def _largest(model: PlannedModel) -> int:
    """Weights of the largest linear."""
    quants: dict[str, ModuleQuant] = model.linears
    return max((q.weights for q in quants.values()), default=0)


def _quantized(model: PlannedModel) -> int:
    return sum(q.weights for q in model.linears.values())
