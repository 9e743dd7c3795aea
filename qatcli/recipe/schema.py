"""The recipe: one frozen pydantic model per stage, the only place where a key, its range and its meaning are written.

The defaults below are the method `qat`; `methods.py` holds what another method changes. The docstring under a key
is its documentation: `reference.py` turns them into the table of docs/recipe.md. Nothing heavy is imported here, so
that a wrong recipe is refused before torch is loaded.

Left out on purpose: checks that need more than one key (`checks.py`) and reading files (`load.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, model_validator

from qatcli.recipe import locations
from qatcli.recipe.methods import Method, fill

Bits = Literal[2, 3, 4, 8]
Format = Literal["gptq", "bitblas", "native", "gguf", "awq", "compressed-tensors", "dense"]


def _not_a_boolean(value: Any) -> Any:
    """Python counts True as 1; in a recipe `samples: yes` is a mistake."""
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


def _group_size(value: int) -> int:
    if value == 0 or value < -1:
        raise ValueError("must be positive, or -1 for one group per row")
    return value


def _source(value: str, info: ValidationInfo) -> str:
    return value if info.context is None else locations.resolve_source(value, info.context)


def _text(value: str, info: ValidationInfo) -> str:
    return value if info.context is None else locations.resolve_text(value, info.context)


def _folder(value: str, info: ValidationInfo) -> str:
    return value if info.context is None else locations.absolute(value, info.context)


_Number = BeforeValidator(_not_a_boolean)
_Name = Annotated[str, Field(min_length=1)]
_Count = Annotated[int, _Number, Field(ge=1)]
_CountOrZero = Annotated[int, _Number, Field(ge=0)]
_Rate = Annotated[float, _Number, Field(ge=0)]
_Positive = Annotated[float, _Number, Field(gt=0)]
_DecayFactor = Annotated[float, _Number, Field(ge=1)]
_GroupSize = Annotated[int, _Number, AfterValidator(_group_size)]
_Source = Annotated[_Name, AfterValidator(_source)]
_Text = Annotated[_Name, AfterValidator(_text)]
_Folder = Annotated[_Name, AfterValidator(_folder)]


class Section(BaseModel):
    """What all sections share: unknown keys are errors, values never change, docstrings are descriptions."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class ModelSection(Section):
    """The full-precision model."""

    source: _Source
    """Hub id (`owner/name`), local folder, or GGUF file. A path starts with `.`, `/` or `~`, or ends in `.gguf`."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; null takes the default branch."""
    gguf_file: str | None = None
    """Name of a GGUF file inside the repository or folder named by `source`."""
    trust_remote_code: bool = False
    """Execute Python code that comes with the model. Nothing downloaded is executed without it."""


class ModuleOverride(Section):
    """Other bits or another group size for some of the linears."""

    pattern: _Name
    """Shell pattern on the full module name, for example `*.mlp.down_proj`; a later match wins over an earlier one."""
    bits: Bits | None = None
    """Bits of the matching linears; null keeps `quant.bits`."""
    group_size: _GroupSize | None = None
    """Group size of the matching linears, positive or -1; null keeps `quant.group_size`."""

    @model_validator(mode="after")
    def _changes_something(self) -> ModuleOverride:
        if self.bits is None and self.group_size is None:
            raise ValueError("must set bits, group_size or both")
        return self


class QuantSection(Section):
    """The quantization grid: `W = (q - zero_point) * scale`, one scale and zero point per group of inputs."""

    bits: Bits
    """Bits per weight."""
    group_size: _GroupSize = 64
    """Consecutive inputs of one output row that share a scale and a zero point: a positive divisor of the inputs, or -1
    for the whole row."""
    symmetric: bool = False
    """Fix every zero point at the middle of the grid, `2^(bits-1)`."""
    init: Literal["minmax", "absmax", "percentile", "mse", "weighted"] = "weighted"
    """Search for the first scale and zero point of a group; `weighted` minimises the squared error weighted by the
    second moments of the layer's inputs."""
    overrides: tuple[ModuleOverride, ...] = ()
    """Exceptions by module name, applied in order."""
    skip: tuple[_Name, ...] = ("lm_head",)
    """Shell patterns of linears that stay in full precision. Embeddings and norms always do."""

    def for_module(self, name: str) -> tuple[int, int] | None:
        """`(bits, group_size)` of the linear `name`, or None if it stays in full precision."""
        if any(fnmatchcase(name, pattern) for pattern in self.skip):
            return None
        bits: int = self.bits
        group_size = self.group_size
        for override in self.overrides:
            if fnmatchcase(name, override.pattern):
                bits = bits if override.bits is None else override.bits
                group_size = group_size if override.group_size is None else override.group_size
        return bits, group_size


class DataSource(Section):
    """One source of training text."""

    source: _Source
    """Hub data set (`owner/name`), or local files: a path or a glob such as `./text/*.jsonl`."""
    name: str | None = None
    """Configuration of a hub data set."""
    split: _Name = "train"
    """Split of a hub data set."""
    field: _Name = "text"
    """Column or JSON key that holds the text."""
    weight: _Positive = 1.0
    """Share of the windows drawn from this source, relative to the weights of the others."""
    streaming: bool = False
    """Read a hub data set over the network as needed; nothing is stored on disk first."""
    format: Literal["auto", "text", "chat", "alpaca"] = "auto"
    """Shape of a record: plain text, a list of chat messages, or Alpaca's instruction, input and output."""


class CalibrateSection(Section):
    """`qat calibrate`: token windows, first scales and zero points, sensitivities."""

    data: Annotated[tuple[DataSource, ...], Field(min_length=1)]
    """Where the windows come from."""
    samples: _Count = 4096
    """Training windows."""
    validation_samples: _CountOrZero = 64
    """Held-out windows, from documents that the training windows do not touch."""
    seq_len: Annotated[int, _Number, Field(ge=8)] = 2048
    """Tokens per window."""
    seed: _CountOrZero = 2
    """Seed of the choice of documents and windows, and of the order of training."""
    moment_samples: _CountOrZero = 64
    """Training windows, at most, from which the second moments of every linear's inputs are measured."""


class CacheSection(Section):
    """Where the activations of all windows live while a block is trained."""

    host_gb: _Rate | None = None
    """Host memory that the activations may use, in GB; null is half of the memory available when the stage starts."""
    dir: _Folder | None = None
    """Folder for memory-mapped files that hold what does not fit; null puts them in the stage's own directory."""


class BlockApSection(Section):
    """`qat block-ap`: train every block against the full-precision block."""

    epochs: _CountOrZero = 2
    """Passes over the training windows; 0 trains nothing and leaves the rounded model."""
    batch_size: _Count = 2
    """Windows per optimizer step."""
    loss: Literal["relative", "mse"] = "relative"
    """`mse` on the block's output, or that error relative to the energy of the target, so that tokens and channels
    with massive activations do not hide the rest."""
    rounding: Literal["nearest", "gptq"] = "gptq"
    """First rounding of the weights: to nearest, or with GPTQ's error feedback."""
    lr_units: Literal["reach", "absolute"] = "reach"
    """Unit of the `lr_` keys. `absolute`: the peak rate given to AdamW. `reach`: the whole distance over which the
    cosine schedule lets Adam move a parameter. The peak rate is derived from it, so a recipe means the same for any
    number of steps and any magnitude of weights."""
    lr_weights: _Rate = 0.75
    """Weights of the linears; as reach, in step sizes (scales) of the weight's own group. 0 does not train them."""
    lr_scales: _Rate = 1.0
    """Scales; as reach, relative to the scale itself. 0 does not train them."""
    lr_zero_points: _Rate = 0.0
    """Zero points; as reach, in integer steps. 0 does not train them."""
    lr_norms: _Rate = 0.1
    """Norm weights; as reach, relative to their own magnitude. 0 does not train them."""
    min_lr_factor: _DecayFactor | None = 20.0
    """The cosine schedule ends at the peak rate divided by this; null ends at zero."""
    keep_best: bool = True
    """Keep the state with the lowest validation loss, the untrained one included: a block never ends worse."""
    shuffle: bool = True
    """New order of the windows in every epoch."""
    grad_clip: _Positive | None = None
    """Largest norm of the gradient; null does not clip."""
    amp: Literal["auto", "bfloat16", "float32"] = "auto"
    """Arithmetic of the blocks; `auto` is bfloat16 where the hardware has it. Parameters are always fp32."""
    cache: CacheSection = CacheSection()
    """Where the activations live."""


class E2eQpSection(Section):
    """`qat e2e-qp`: train the scales of the whole model on frozen codes."""

    data: Annotated[tuple[DataSource, ...], Field(min_length=1)] | None = None
    """Where the windows come from; null takes `calibrate.data`. Instruction data make this stage fine-tuning."""
    samples: _Count = 4096
    """Training windows."""
    validation_samples: _CountOrZero = 16
    """Held-out windows."""
    seq_len: Annotated[int, _Number, Field(ge=8)] = 4096
    """Tokens per window."""
    epochs: _CountOrZero = 1
    """Passes over the training windows; 0 trains nothing."""
    batch_size: _Count = 32
    """Windows per optimizer step."""
    micro_batch_size: _Count = 1
    """Windows per forward pass; divides `batch_size`. Changes memory and speed, not the result."""
    loss: Literal["kl", "next-token"] = "kl"
    """Distance to the full-precision model's next-token distribution, or cross-entropy on the text."""
    train: Annotated[tuple[Literal["scales", "norms"], ...], Field(min_length=1)] = ("scales",)
    """Parameters that train."""
    lr_units: Literal["reach", "absolute"] = "reach"
    """Unit of the `lr_` keys, as in `block_ap.lr_units`."""
    lr_scales: _Rate = 0.15
    """Scales; as reach, relative to the scale itself."""
    lr_norms: _Rate = 0.0
    """Norm weights; as reach, relative to their own magnitude."""
    min_lr_factor: _DecayFactor | None = 20.0
    """The cosine schedule ends at the peak rate divided by this; null ends at zero."""
    warmup: Annotated[float, _Number, Field(ge=0, lt=1)] = 0.03
    """Fraction of the steps over which the rate rises from zero."""
    grad_clip: _Positive | None = 1.0
    """Largest norm of the gradient; null does not clip."""
    gradient_checkpointing: bool = True
    """Recompute each block in the backward pass: less memory, more time, the same result."""
    amp: Literal["auto", "bfloat16", "float32"] = "auto"
    """Arithmetic of the model; `auto` is bfloat16 where the hardware has it. Trained parameters are always fp32."""
    checkpoint_every: _Count = 16
    """Optimizer steps between two states from which an interrupted run resumes."""
    keep_best: bool = True
    """Keep the state with the lowest validation loss, the untrained one included."""


class PackSection(Section):
    """`qat pack`: the checkpoint that is deployed."""

    scale_dtype: Literal["float16", "float32"] = "float16"
    """Stored type of the scales."""
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    """Stored type of everything that is not quantized; `auto` keeps the source's."""


class ExportSection(Section):
    """`qat export`: formats of other runtimes."""

    formats: tuple[Format, ...] = ("native",)
    """What to write; `qat export --format` chooses others."""
    verify: bool = True
    """Read every export back with other code and compare it; `qat export --no-verify` sets this to false."""
    runtimes: bool = True
    """Also load it in the installed libraries that serve the format and compare logits."""
    dtype: Literal["float16", "bfloat16"] = "float16"
    """native, dense: type of everything that is not quantized."""
    max_shard_gb: _Positive = 5.0
    """Size above which a new safetensors shard begins."""
    awq_promote: bool = False
    """awq: let 2- and 3-bit codes ride in 4 bits."""
    bitblas_zeros: Literal["qzeros", "zeros"] = "qzeros"
    """bitblas: name of the zero-point tensor, `qzeros` since GPTQModel 5, `zeros` before."""
    gguf_type: _Name = "auto"
    """gguf: `auto` (smallest that fits), `exact` (no rounded offset), or a block type such as `Q8_0`."""
    gguf_embedding: Literal["F16", "Q8_0"] = "F16"
    """gguf: type of the embeddings and the head."""


class PerplexityText(Section):
    """One text whose perplexity is measured over windows that do not overlap."""

    name: _Name
    """Name of the metric, used in the report and in `expect`."""
    source: _Text
    """`wikitext2` (test split), `c4` (validation), or the path of a text file."""
    seq_len: Annotated[int, _Number, Field(ge=8)] = 2048
    """Tokens per window."""
    windows: _Count | None = None
    """Windows to measure, from the start of the text; null is all of them."""


class EvalSection(Section):
    """`qat eval`: what is measured, and against what."""

    perplexity: tuple[PerplexityText, ...] = (PerplexityText(name="wikitext2", source="wikitext2"),)
    """Texts for perplexity."""
    kl: bool = True
    """Also measure the distance to the full-precision model's next-token distribution on these texts."""
    baselines: tuple[Literal["full_precision", "round_to_nearest", "block_ap"], ...] = (
        "full_precision",
        "round_to_nearest",
        "block_ap",
    )
    """Models measured beside the result."""
    prompts: tuple[str, ...] = ()
    """Prompts that every measured model continues, for the report."""
    max_new_tokens: _Count = 64
    """Length of these continuations, in tokens."""


class Expectation(Section):
    """A figure that the run must reach."""

    value: Annotated[float, _Number]
    """The figure, in the metric's own unit."""
    tolerance: _Rate = 0.0
    """How much worse than `value` still passes, in the same unit. Better always passes."""


class Recipe(Section):
    """One experiment, from a model and a text to a measured quantized checkpoint."""

    method: Method = "qat"
    """Preset for the keys that are left out: `qat` is ours, `efficientqat` is the published recipe of the paper."""
    model: ModelSection
    quant: QuantSection
    calibrate: CalibrateSection
    block_ap: BlockApSection = BlockApSection()
    e2e_qp: E2eQpSection = E2eQpSection()
    pack: PackSection = PackSection()
    export: ExportSection = ExportSection()
    eval: EvalSection = EvalSection()
    expect: dict[str, Expectation] = {}
    """Figures to reach, by metric name; `qat eval` and `qat report` check them."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_method(cls, data: Any) -> Any:
        return fill(data) if isinstance(data, Mapping) else data
