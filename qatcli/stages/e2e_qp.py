"""e2e-qp: freeze the codes, train the scales of the whole model end to end (EfficientQAT, arXiv 2407.11062, 3.3).

Reads:  quantized (a packed checkpoint with fp32 scales); windows are sampled here, so any packed checkpoint will do.
Writes: quantized, with new scales (and norms, if the recipe trains them); codes and zero points bit for bit the same.
With `loss: kl` the full-precision model's next-token distribution is the target, computed beside the student;
with `next-token` the text is. An interrupted run continues from the last optimizer checkpoint, bit for bit.
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qatcli.data import Windows, load_windows, sample_windows, save_windows
from qatcli.data.store import FILE as WINDOWS
from qatcli.errors import DivergedError
from qatcli.hf import load_packed
from qatcli.linear import PackedLinear
from qatcli.losses import token_loss
from qatcli.models.source import load_tokenizer, open_source
from qatcli.packed import SCALE, PackedCheckpoint, write_config
from qatcli.recipe.schema import E2eQpSection
from qatcli.shards import INDEX, load_tensors, save_tensors
from qatcli.stages import Job
from qatcli.training import (
    Schedule,
    adamw,
    autocast,
    compute_dtype,
    gradients_finite,
    peak_rate,
    restore,
    set_rates,
    snapshot,
)

STATE = "optimizer.safetensors"
PATIENCE = 5  # consecutive updates with a non-finite gradient before the stage gives up


def run(job: Job) -> dict[str, Any]:
    """Train the scales on the recipe's text."""
    recipe, config = job.recipe, job.recipe.e2e_qp
    checkpoint = PackedCheckpoint.open(job.input.path)
    train, held_out = _windows(job)
    dtype = compute_dtype(config.amp, job.device)
    trust = recipe.model.trust_remote_code
    student = load_packed(job.input.path, dtype=torch.float32, device=job.device, trust_remote_code=trust)
    student.config.use_cache = False
    if config.gradient_checkpointing:
        # The first name is transformers 5.23's, the second that of the releases before it.
        name = "activation" if hasattr(student, "activation_checkpointing_enable") else "gradient"
        enable = getattr(student, f"{name}_checkpointing_enable")
        enable(**{f"{name}_checkpointing_kwargs": {"use_reentrant": False}})
    teacher = None
    if config.loss == "kl":
        teacher = open_source(**recipe.model.model_dump()).load_model(dtype, job.device)
    trained = trained_parameters(student, config)
    trainer = _Trainer(student, teacher, trained, config, held_out, dtype, job)
    metrics = trainer.train(train)
    _write(job, checkpoint, {name: parameter.detach() for name, parameter in trained.items()})
    (job.out / STATE).unlink(missing_ok=True)
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


class _Trainer:
    """The loop and its state: what has to survive an interruption is exactly what `_save` writes."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        trained: dict[str, nn.Parameter],
        config: E2eQpSection,
        held_out: Windows,
        dtype: torch.dtype,
        job: Job,
    ) -> None:
        self.student, self.teacher, self.trained, self.config = student, teacher, trained, config
        self.held_out, self.dtype, self.job = held_out, dtype, job
        self.best = snapshot(trained.values())
        self.best_loss = float("inf")
        self.first_loss = float("nan")

    def train(self, text: Windows) -> dict[str, Any]:
        config, log = self.config, self.job.log
        per_epoch = len(text) // config.batch_size
        steps = config.epochs * per_epoch
        schedule = Schedule(
            steps, floor=1 / config.min_lr_factor if config.min_lr_factor else 0.0, warmup=int(config.warmup * steps)
        )
        if steps == 0:
            loss = self.validate()
            return {"steps": 0, "loss": config.loss, "before": loss, "after": loss}
        optimizer = adamw(self._groups(schedule))
        start = self._load(optimizer)
        self.student.train(config.gradient_checkpointing)  # checkpointing only works in training mode
        if start == 0:
            self.first_loss = self.best_loss = self.validate()
            log.event("validation", step=0, loss=self.first_loss)
        failures = 0
        with log.progress("e2e-qp", steps, done=start) as bar:
            for step in range(start, steps):
                set_rates(optimizer, schedule, step)
                loss = self._update(optimizer, text, self._batch(step, per_epoch, len(text)))
                failures = 0 if loss == loss else failures + 1
                if failures >= PATIENCE:
                    raise DivergedError(
                        f"e2e-qp: the gradient was not finite for {PATIENCE} updates up to {step + 1}",
                        hint="set e2e_qp.amp=float32 or lower e2e_qp.lr_scales, with --restart",
                    )
                log.event("step", step=step + 1, loss=loss)
                last = step + 1 == steps
                if last or (step + 1) % config.checkpoint_every == 0:
                    self._keep_best(step + 1)
                    self._save(optimizer, step + 1)
                bar.advance(detail=f"loss {loss:.4f} held-out {self.best_loss:.4f}")
        if config.keep_best:
            restore(self.trained.values(), self.best)
        return {"steps": steps, "loss": config.loss, "before": self.first_loss, "after": self.best_loss}

    def _update(self, optimizer: torch.optim.Optimizer, text: Windows, batch: Tensor) -> float:
        """One optimizer step on the windows `batch`; the mean loss, NaN when it was skipped as non-finite."""
        optimizer.zero_grad(set_to_none=True)
        targets = max(1, text[batch].targets)
        total = 0.0
        for part in batch.split(self.config.micro_batch_size):
            loss = self._loss(text[part]) / targets
            loss.backward()
            total += float(loss.detach())
        if not gradients_finite(self.trained.values()):
            return float("nan")
        if self.config.grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(self.trained.values(), self.config.grad_clip)
        optimizer.step()
        return total

    def _loss(self, text: Windows) -> Tensor:
        device = self.job.device
        tokens, mask = text.tokens.to(device, torch.long), text.mask.to(device)
        with autocast(device, self.dtype):
            target = None
            if self.teacher is not None:
                with torch.no_grad():
                    target = self.teacher(input_ids=tokens, use_cache=False).logits
            predicted = self.student(input_ids=tokens, use_cache=False).logits
        return token_loss(predicted, target, tokens, mask)

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss per target token on the held-out windows."""
        if not len(self.held_out):
            return float("nan")
        self.student.eval()
        total = 0.0
        for part in torch.arange(len(self.held_out)).split(self.config.micro_batch_size):
            total += float(self._loss(self.held_out[part]))
        self.student.train(self.config.gradient_checkpointing)
        return total / max(1, self.held_out.targets)

    def _keep_best(self, step: int) -> None:
        loss = self.validate()
        self.job.log.event("validation", step=step, loss=loss)
        if loss < self.best_loss or not self.config.keep_best:
            self.best_loss, self.best = loss, snapshot(self.trained.values())

    def _batch(self, step: int, per_epoch: int, count: int) -> Tensor:
        """The windows of update `step`: a function of the step alone, so that a resume needs no sampler state."""
        epoch, index = divmod(step, per_epoch)
        generator = torch.Generator().manual_seed(self.job.recipe.calibrate.seed * 1_000_003 + epoch)
        order = torch.randperm(count, generator=generator)
        return order[index * self.config.batch_size : (index + 1) * self.config.batch_size]

    def _groups(self, schedule: Schedule) -> list[dict[str, object]]:
        groups: list[dict[str, object]] = []
        for name, parameter in self.trained.items():
            rate = self.config.lr_scales if name.endswith(SCALE) else self.config.lr_norms
            unit = float(parameter.detach().abs().mean())
            peak = peak_rate(rate, units=self.config.lr_units, unit_size=unit, schedule=schedule)
            groups.append({"params": [parameter], "peak": peak})
        return groups

    def _save(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        tensors = {
            "step": torch.tensor(step),
            "losses": torch.tensor([self.first_loss, self.best_loss], dtype=torch.float64),
        }
        for (name, parameter), best in zip(self.trained.items(), self.best, strict=True):
            tensors |= {f"now.{name}": parameter.detach(), f"best.{name}": best}
            tensors |= {f"{key}.{name}": value for key, value in optimizer.state.get(parameter, {}).items()}
        save_tensors(self.job.out / STATE, {name: tensor.contiguous() for name, tensor in tensors.items()})

    def _load(self, optimizer: torch.optim.Optimizer) -> int:
        """Continue from the last checkpoint of an interrupted run; the number of updates already made."""
        if not (self.job.out / STATE).is_file():
            return 0
        tensors = load_tensors(self.job.out / STATE)
        names = list(self.trained)
        restore(self.trained.values(), [tensors[f"now.{name}"] for name in names])
        self.best = [tensors[f"best.{name}"].to(self.job.device) for name in names]
        self.first_loss, self.best_loss = (float(value) for value in tensors["losses"])
        for name, parameter in self.trained.items():
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{name}" in tensors]
            if keys:
                optimizer.state[parameter] = {key: tensors[f"{key}.{name}"].to(self.job.device) for key in keys}
        return int(tensors["step"])


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
        )
        save_windows(job.out, windows)
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
    for file in [checkpoint.path / INDEX, *checkpoint.companion_files()]:
        if file.is_file():
            shutil.copyfile(file, job.out / file.name)
