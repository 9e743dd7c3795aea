"""e2e-qp: freeze the codes, train the scales of the whole model end to end (EfficientQAT, arXiv 2407.11062, 3.3).

Reads:  quantized (a packed checkpoint with fp32 scales); windows are sampled here, so any packed checkpoint will do.
Writes: quantized, with new scales (and norms, if the recipe trains them); codes and zero points bit for bit the same.
The target is a mixture of the text and the full-precision model's next-token distribution (`qatcli.teacher`). An
interrupted run continues from the last optimizer checkpoint, on a CPU bit for bit.
"""

from __future__ import annotations

import copy
import math
import shutil
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from qatcli.activations import stream_budget
from qatcli.attention import use_tiled_attention
from qatcli.data import Windows, load_windows, sample_windows, save_windows
from qatcli.data.store import FILE as WINDOWS
from qatcli.errors import DivergedError
from qatcli.hf import load_packed
from qatcli.linear import PackedLinear
from qatcli.losses import token_loss
from qatcli.memory import release_memory
from qatcli.models.blocks import open_blocks
from qatcli.models.source import load_tokenizer
from qatcli.packed import SCALE, PackedCheckpoint, copy_companions, write_config
from qatcli.recipe.schema import E2eQpSection
from qatcli.shards import INDEX, load_state, load_tensors, save_state, save_tensors
from qatcli.stages import Job, open_model
from qatcli.stepper import Stepper
from qatcli.streaming import StreamedModel
from qatcli.teacher import Teacher
from qatcli.training import Schedule, autocast, compute_dtype, parameter_group, scale_unit

STATE = "resume.safetensors"  # removed once the stage is committed
SAVE_SECONDS = 600  # an update of a 70B model takes minutes: what an interruption may cost is not counted in them


def run(job: Job) -> dict[str, Any]:
    """Train the scales on the recipe's text."""
    recipe, config = job.recipe, job.recipe.e2e_qp
    checkpoint = PackedCheckpoint.open(job.input.path)
    train, held_out = _windows(job)
    dtype = compute_dtype(config.amp, job.device)
    teacher = _teacher(job, {"train": train.tokens, "validation": held_out.tokens}, dtype)
    trust = recipe.model.trust_remote_code
    student = load_packed(job.input.path, dtype=torch.float32, device=job.device, trust_remote_code=trust)
    student.config.use_cache = False
    _store_as_computed(student, dtype)
    use_tiled_attention(student, job.device)
    if config.gradient_checkpointing:
        # The first name is transformers 5.23's, the second that of the releases before it.
        name = "activation" if hasattr(student, "activation_checkpointing_enable") else "gradient"
        enable = getattr(student, f"{name}_checkpointing_enable")
        enable(**{f"{name}_checkpointing_kwargs": {"use_reentrant": False}})
    trained = trained_parameters(student, config)
    trainer = _Trainer(student, teacher, trained, config, {"train": train, "validation": held_out}, dtype, job)
    metrics = trainer.train()
    _write(job, checkpoint, {name: parameter.detach() for name, parameter in trained.items()})
    return metrics


def trained_parameters(student: nn.Module, config: E2eQpSection) -> dict[str, nn.Parameter]:
    """Checkpoint name -> parameter that trains; everything else is frozen."""
    for parameter in student.parameters():
        parameter.requires_grad_(False)
    found: dict[str, nn.Parameter] = {}
    for name, module in student.named_modules():
        if isinstance(module, PackedLinear) and "scales" in config.train:
            module.weight_scale.data = module.weight_scale.data.float()  # a published checkpoint has them in fp16
            found[name + SCALE] = module.weight_scale
        elif "norms" in config.train:
            own = module.named_parameters(recurse=False)
            found.update({f"{name}.{n}": p for n, p in own if p.ndim == 1 and n == "weight"})
    return found


def _store_as_computed(student: Any, dtype: torch.dtype) -> None:
    """Keep linears that stay dense, the output layer first of all, in the type that autocast makes of them anyway, in
    every pass and beside their fp32. One that shares its weight with the embeddings stays, as do these."""
    shared = student.get_input_embeddings().weight
    for module in student.modules():
        if isinstance(module, nn.Linear) and module.weight is not shared and module.weight.dtype != dtype:
            module.to(dtype)


@dataclass(frozen=True)
class _Trainer:
    """The loop and its state: what has to survive an interruption is exactly what `_save` writes."""

    student: nn.Module
    teacher: Teacher | None
    trained: dict[str, nn.Parameter]
    config: E2eQpSection
    windows: dict[str, Windows]  # "train" and "validation"
    dtype: torch.dtype
    job: Job

    def train(self) -> dict[str, Any]:
        config, log, text = self.config, self.job.log, self.windows["train"]
        per_epoch = -(-len(text) // config.batch_size)
        steps = config.epochs * per_epoch
        schedule = Schedule.of(steps, min_lr_factor=config.min_lr_factor, warmup=config.warmup)
        groups = self._groups(schedule)
        if not any(group["peak"] for group in groups):
            loss = self.validate(self.dtype)
            return {"steps": 0, "before": loss, "after": loss, "backoffs": 0}
        stepper = Stepper(groups, schedule, dtype=self.dtype, device=self.job.device, grad_clip=config.grad_clip)
        self.student.train(config.gradient_checkpointing)  # checkpointing only works in training mode
        start, before = self._load(stepper)
        if start == 0:
            before = self.validate(stepper.dtype)
            stepper.offer(before)
            log.event("validation", step=0, loss=before)
        with log.progress("e2e-qp", steps, done=start) as bar:
            made, saved = start, time.monotonic()
            for step in range(start, steps):
                made = step + 1
                loss = self._update(stepper, step, self._batch(step, per_epoch, len(text)))
                log.event("step", step=made, loss=loss, backoffs=stepper.backoffs)
                if stepper.exhausted:
                    break
                due = made == steps or made % config.checkpoint_every == 0
                if due:
                    held_out = self.validate(stepper.dtype)
                    log.event("validation", step=made, loss=held_out)
                    stepper.offer(held_out, always=not config.keep_best and math.isfinite(held_out))
                if due or time.monotonic() - saved >= SAVE_SECONDS:
                    self._save(stepper, made, before)
                    saved = time.monotonic()
                detail, group = f"loss {loss:.4f} held-out {stepper.best_loss:.4f}", stepper.optimizer.param_groups[0]
                bar.advance(detail=detail, lr=group["lr"], tokens=config.batch_size * text.tokens.shape[1])
        if stepper.backoffs:
            log.warn(f"e2e-qp: non-finite loss or gradient {stepper.backoffs} times; best iterate kept")
        stepper.restore_best()
        if stepper.exhausted and not math.isfinite(before):
            raise DivergedError(
                "e2e-qp: the loss of the model it starts from is not finite",
                hint="inspect the input with `qat eval`, or --restart with e2e_qp.amp=float32 if it overflows",
            )
        return {
            "steps": made,
            "before": before,
            "after": stepper.best_loss,
            "backoffs": stepper.backoffs,
        }

    def _update(self, stepper: Stepper, step: int, batch: Tensor) -> float:
        """Update `step` on the windows `batch`; the mean loss, whether or not the step was taken."""
        # For the dropout of models that have one: like the batch, a function of the step alone.
        torch.manual_seed(self.job.recipe.calibrate.seed * 1_000_003 + step)
        stepper.begin(step)
        targets = max(1, self.windows["train"][batch].targets)
        total = torch.zeros((), dtype=torch.float64, device=self.job.device)
        for part in batch.split(self.config.micro_batch_size):
            loss = self._loss("train", part, stepper.dtype) / targets
            stepper.backward(loss)
            total += loss.detach()
        stepper.finish(total)
        stepper.settle()  # an update takes seconds: waiting for it once costs nothing
        return float(total)

    def _loss(self, split: str, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Sum of the loss over the target tokens of these windows."""
        _store_as_computed(self.student, dtype)  # again: after a non-finite loss it is fp32, of what was rounded
        device, text = self.job.device, self.windows[split][rows]
        tokens = text.tokens.long()
        target = self.teacher(split, rows) if self.teacher is not None else None
        with autocast(device, dtype):
            logits = self.student(input_ids=tokens.to(device, non_blocking=True), use_cache=False).logits
        return token_loss(logits, target, tokens, text.mask, text_weight=self.config.text_weight)

    @torch.no_grad()
    def validate(self, dtype: torch.dtype) -> float:
        """Mean loss per target token on the held-out windows."""
        held_out = self.windows["validation"]
        if not len(held_out):
            return float("nan")
        self.student.eval()
        total = 0.0
        for part in torch.arange(len(held_out)).split(self.config.micro_batch_size):
            total += float(self._loss("validation", part, dtype))
        self.student.train(self.config.gradient_checkpointing)
        return total / max(1, held_out.targets)

    def _batch(self, step: int, per_epoch: int, count: int) -> Tensor:
        """The windows of update `step`: a function of the step alone, so that a resume needs no sampler state."""
        epoch, index = divmod(step, per_epoch)
        generator = torch.Generator().manual_seed(self.job.recipe.calibrate.seed * 1_000_003 + epoch)
        order = torch.randperm(count, generator=generator)
        return order[index * self.config.batch_size : (index + 1) * self.config.batch_size]

    def _groups(self, schedule: Schedule) -> list[dict[str, Any]]:
        config = self.config
        groups = []
        for name, parameter in self.trained.items():
            module = self.student.get_submodule(name.rpartition(".")[0])
            unit: Tensor | float
            if isinstance(module, PackedLinear):
                rate, unit = config.lr_scales, scale_unit(parameter, module.quant.bits)
            else:
                rate, unit = config.lr_norms, float(parameter.detach().abs().mean())
            groups.append(
                parameter_group(
                    parameter, rate, units=config.lr_units, unit=unit, schedule=schedule, max_step=config.max_step
                )
            )
        return groups

    def _save(self, stepper: Stepper, step: int, before: float) -> None:
        tensors = {
            "step": torch.tensor(step),
            "losses": torch.tensor([before, stepper.best_loss], dtype=torch.float64),
            "backoffs": torch.tensor(stepper.backoffs),
        }
        scaler = stepper.scaler.state_dict()
        if scaler:
            tensors["scaler"] = torch.tensor([scaler["scale"], scaler["_growth_tracker"]], dtype=torch.float64)
        for name, parameter, best in self._named(stepper):
            tensors |= {f"now.{name}": parameter.detach(), f"best.{name}": best}
            tensors |= {f"{key}.{name}": value for key, value in stepper.optimizer.state.get(parameter, {}).items()}
        save_state(self.job.out / STATE, {name: tensor.contiguous() for name, tensor in tensors.items()})

    def _load(self, stepper: Stepper) -> tuple[int, float]:
        """Continue from the last checkpoint of an interrupted run: the updates already made, the loss before them."""
        if not (self.job.out / STATE).is_file():
            return 0, float("nan")
        device = self.job.device
        tensors = load_state(self.job.out / STATE)
        before, best_loss = (float(value) for value in tensors["losses"])
        named = self._named(stepper)
        stepper.resume(
            [tensors[f"best.{name}"].to(device) for name, _, _ in named],
            best_loss,
            backoffs=int(tensors["backoffs"]),
            scaler=[float(value) for value in tensors["scaler"]] if "scaler" in tensors else None,
        )
        for name, parameter, _ in named:
            parameter.data.copy_(tensors[f"now.{name}"])
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{name}" in tensors]
            if keys:
                stepper.optimizer.state[parameter] = {key: tensors[f"{key}.{name}"].to(device) for key in keys}
        return int(tensors["step"]), before

    def _named(self, stepper: Stepper) -> list[tuple[str, Tensor, Tensor]]:
        """Checkpoint name, parameter and its best value, of the parameters whose rate is not zero."""
        names = {id(parameter): name for name, parameter in self.trained.items()}
        return [(names[id(p)], p, best) for p, best in zip(stepper.parameters, stepper.best, strict=True)]


def _teacher(job: Job, windows: dict[str, Tensor], dtype: torch.dtype) -> Teacher | None:
    """What is kept of the full-precision model, which is made here; None where the text alone is learned."""
    config, device = job.recipe.e2e_qp, job.device
    if config.text_weight == 1:
        return None
    if not config.epochs:
        windows = {"validation": windows["validation"]}
    blocks = open_blocks(open_model(job))
    use_tiled_attention(blocks.skeleton, device)
    student = AutoConfig.from_pretrained(job.input.path, trust_remote_code=job.recipe.model.trust_remote_code)
    vocabulary = student.get_text_config().vocab_size
    teacher = Teacher(job.out, windows, vocabulary, config.teacher_tokens, job.recipe.calibrate.seed, device)
    model = StreamedModel(blocks, partial(stream_budget, device, job.recipe.block_ap.cache, job.out))
    with job.log.progress("e2e-qp: the full-precision model", sum(map(model.steps, windows.values()))) as bar:
        teacher.make(model, dtype, bar)
    release_memory()  # its stream
    return teacher


def _windows(job: Job) -> tuple[Windows, Windows]:
    """Training and held-out windows, sampled once and kept in the stage's directory."""
    config = job.recipe.e2e_qp
    if not (job.out / WINDOWS).is_file():
        windows = sample_windows(
            config.data or job.recipe.calibrate.data,
            load_tokenizer(job.input.path, trust_remote_code=job.recipe.model.trust_remote_code),
            samples=config.samples,
            validation_samples=config.validation_samples,
            seq_len=config.seq_len,
            seed=job.recipe.calibrate.seed,
            purpose="e2e-qp",
            padding=True,
        )
        save_windows(job.out, windows)
        release_memory()  # the text and its tokens
    return load_windows(job.out)


def _write(job: Job, checkpoint: PackedCheckpoint, trained: dict[str, Tensor]) -> None:
    """The input's shards with the trained tensors in the place of theirs."""
    for name in sorted(set(checkpoint.shards.values())):
        tensors = load_tensors(checkpoint.path / name)
        tensors.update({key: trained[key].cpu().contiguous() for key in tensors.keys() & trained.keys()})
        save_tensors(job.out / Path(name).name, tensors)
    config = copy.deepcopy(checkpoint.config)
    config["quantization_config"]["scale_dtype"] = "float32"
    write_config(job.out, config)
    copy_companions(checkpoint.path, job.out)
    if (checkpoint.path / INDEX).is_file():
        shutil.copyfile(checkpoint.path / INDEX, job.out / INDEX)
