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

from pydantic import Field, model_validator

from qatcli.recipe.fields import (
    Bits,
    Count,
    CountOrZero,
    DataFolder,
    DecayFactor,
    Folder,
    GroupSize,
    Name,
    Number,
    Positive,
    Rate,
    Section,
    Source,
    Text,
)
from qatcli.recipe.methods import Method, fill

Format = Literal["gptq", "bitblas", "native", "gguf", "awq", "compressed-tensors", "mlx", "dense"]
Baseline = Literal["full_precision", "round_to_nearest", "calibrate", "gptq", "block_ap"]


class ModelSection(Section):
    """The full-precision model."""

    source: Source
    """Hub id (`owner/name`), local folder, or GGUF file. A path starts with `.`, `/` or `~`, or ends in `.gguf`. A GGUF
    file is converted to fp32 once, into `~/.cache/qat` or `$XDG_CACHE_HOME/qat`: 4 bytes for every parameter."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; null takes the default branch."""
    gguf_file: str | None = None
    """Name of a GGUF file inside the repository or folder named by `source`."""
    trust_remote_code: bool = False
    """Execute Python code that comes with the model. Nothing downloaded is executed without it."""


class ModuleOverride(Section):
    """Other bits or another group size for some of the linears."""

    pattern: Name
    """Shell pattern on the full module name, for example `*.mlp.down_proj`; a later match wins over an earlier one."""
    bits: Bits | None = None
    """Bits of the matching linears; null keeps `quant.bits`."""
    group_size: GroupSize | None = None
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
    group_size: GroupSize = 64
    """Consecutive inputs of one output row that share a scale and a zero point: a positive divisor of the inputs, or -1
    for the whole row."""
    zero_points: Literal["any", "central", "middle"] = "any"
    """Zero points that a group may have: any of the grid; the central two, `2^(bits-1) - 1` and `2^(bits-1)`, with
    which 2-bit models fit GGUF's Q2_0 (2.25 bits per weight) exactly; or only the latter, a symmetric grid."""
    init: Literal["minmax", "absmax", "percentile", "entropy", "mse", "weighted"] = "weighted"
    """First scale and zero point of a group. `minmax`: its whole range; `absmax`: the same around zero; `percentile`:
    but for half a percent at each end. Searched: least squared error (`mse`), weighted by the second moments of the
    layer's inputs (`weighted`), or divergence between the distributions of the layer's weights (`entropy`)."""
    overrides: tuple[ModuleOverride, ...] = ()
    """Exceptions by module name, applied in order."""
    skip: tuple[Name, ...] = ("lm_head",)
    """Shell patterns of linears that stay in full precision. All that lies outside of the blocks always does."""

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

    source: Source
    """Hub data set (`owner/name`), or local files: a path, a folder, or a glob such as `./text/*.jsonl`."""
    name: str | None = None
    """Configuration of a hub data set, such as `en` of `allenai/c4`."""
    split: Name = "train"
    """Split of a hub data set."""
    revision: str | None = None
    """Branch, tag or commit of a hub data set; null takes the default branch."""
    files: Name | None = None
    """Pattern of data files to download from a hub data set and read one by one, instead of what `name` and `split`
    say; for repositories with a loading script, such as `"*.jsonl"` of `togethercomputer/RedPajama-Data-1T-Sample`."""
    field: Name = "text"
    """Column or JSON key that holds the text."""
    weight: Annotated[Positive, Field(le=1e6)] = 1.0
    """Share of the windows drawn from this source, relative to the weights of the others."""
    streaming: bool = False
    """Read a hub data set over the network as needed; nothing is stored on disk first."""
    format: Literal["auto", "text", "chat", "alpaca"] = "auto"
    """Shape of a record: plain text, a list of chat messages, or Alpaca's instruction, input and output. Of the last
    two only answers are learnt: the assistant's turns, the outputs."""
    template: Literal["alpaca", "chat"] = "alpaca"
    """How Alpaca's records become text: the Alpaca prompt, or the tokenizer's chat template as for messages."""
    packing: bool | None = None
    """Whether consecutive documents share a window. `false` is one document per window: a random part of a long text,
    an instruction followed by padding. null packs instructions, and texts that cannot fill the windows alone."""
    bos: Literal["document", "window"] = "document"
    """Where the beginning-of-text token stands: before each document, if the tokenizer puts it there, or at the start
    of every window as well, which Gemma needs: it never saw a text without."""


class CalibrateSection(Section):
    """`qat calibrate`: token windows, first scales and zero points, errors of layers."""

    data: Annotated[tuple[DataSource, ...], Field(min_length=1)]
    """Where the windows come from."""
    samples: Count = 4096
    """Training windows."""
    validation_samples: Count = 64
    """Held-out windows, from the last tenth of each file's documents, or of the text where these are fewer than ten."""
    seq_len: Annotated[int, Number, Field(ge=8)] = 2048
    """Tokens per window."""
    seed: Annotated[CountOrZero, Field(lt=2**32)] = 2
    """Seed of the choice of documents and windows, of the order of training and of `e2e_qp.teacher_tokens`."""
    moment_samples: CountOrZero = 64
    """Training windows, at most, from which the second moments of every linear's inputs are measured, and GPTQ's."""


class CacheSection(Section):
    """Where the activations of all windows live while a block is trained."""

    device_gb: Annotated[Rate, Field(le=1e6)] | None = None
    """GPU memory that the activations may use, in GiB; null is half of what is free when the stage starts."""
    host_gb: Annotated[Rate, Field(le=1e6)] | None = None
    """Host memory that the activations may use beyond that, in GiB, pinned for a GPU; null is half of what is available
    when the stage starts, control groups respected."""
    dir: Folder | None = None
    """Folder for memory-mapped files that hold what does not fit; null puts them in the stage's own directory."""


class BlockApSection(Section):
    """`qat block-ap`: train every block against the full-precision block."""

    epochs: CountOrZero = 2
    """Passes over the training windows; 0 trains nothing and leaves the rounded model."""
    batch_size: Count = 2
    """Windows per optimizer step."""
    loss: Literal["downstream", "relative", "mse"] = "downstream"
    """`mse` of the block's output; `relative`: each token's squared error over its squared norm; `downstream`: the same
    with channels weighted as later linears weight them. So a few massive activations do not hide the rest."""
    lookahead: bool = True
    """Train for the mean of this error and of the one after the next full-precision block. Takes 1.6 times as long."""
    rounding: Literal["nearest", "gptq"] = "nearest"
    """First rounding: to nearest, or with GPTQ's error feedback, better only where nothing is trained (`epochs: 0`)."""
    lr_units: Literal["reach", "absolute"] = "reach"
    """Unit of the `lr_` keys. `absolute`: the peak rate given to AdamW. `reach`: the whole distance over which the
    cosine schedule lets Adam move a parameter. The peak rate is derived from it, so a recipe means the same for any
    number of steps and any magnitude of weights."""
    lr_weights: Rate = 0.5
    """Weights of the linears; as reach, in mean step sizes (scales) of the linear. 0 does not train them."""
    lr_scales: Rate = 0.3
    """Scales; as reach, how far the outermost level of the grid may move, in step sizes. The scale itself then changes
    by up to this over `2^(bits-1)`: by 7.5 % at 3 bits with 0.3. 0 does not train them."""
    lr_zero_points: Rate = 0.0
    """Zero points, with `quant.zero_points: any`; as reach, in integer steps. 0 does not train them."""
    lr_norms: Rate = 0.1
    """Norm weights; as reach, relative to their own magnitude. 0 does not train them."""
    min_lr_factor: DecayFactor | None = 20.0
    """The cosine schedule ends at the peak rate divided by this; null ends at zero."""
    keep_best: bool = True
    """Keep the state with the lowest validation loss, the untrained one included: a block never ends worse."""
    shuffle: bool = True
    """New order of the windows in every epoch."""
    grad_clip: Positive | None = None
    """Largest norm of the gradient; null does not clip."""
    amp: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Arithmetic of the blocks, in `calibrate` too; `auto` is bfloat16 where that is faster, else float32. float16
    scales its losses, and needs hidden states below 65504. Parameters are always fp32."""
    compile: bool | None = None
    """`torch.compile` the blocks that train; null does so on a GPU. Results differ by rounding."""
    cache: CacheSection = CacheSection()
    """Where the activations live, those of the other stages too."""


class E2eQpSection(Section):
    """`qat e2e-qp`: train the scales of the whole model on frozen codes."""

    data: Annotated[tuple[DataSource, ...], Field(min_length=1)] | None = None
    """Where the windows come from; null takes `calibrate.data`. Instruction data make this stage fine-tuning."""
    samples: Count = 4096
    """Training windows."""
    validation_samples: Count = 16
    """Held-out windows."""
    seq_len: Annotated[int, Number, Field(ge=8)] = 4096
    """Tokens per window."""
    epochs: CountOrZero = 1
    """Passes over the training windows; 0 trains nothing."""
    batch_size: Count = 32
    """Windows per optimizer step."""
    micro_batch_size: Count = 1
    """Windows per forward pass; divides `batch_size`. Changes memory and speed, not the result."""
    text_weight: Annotated[float, Number, Field(ge=0, le=1)] = 0.25
    """What is learned: this much the text's next token, the rest the full-precision model's distribution of it. 0 is
    distillation alone, 1 the text alone."""
    teacher_tokens: Annotated[int, Number, Field(ge=2)] = 64
    """Tokens that are kept of each of these distributions, half the likeliest and half drawn from the rest: 6 bytes
    each on disk. They are made before the training, block by block; the expected gradient is that of all tokens."""
    train: Annotated[tuple[Literal["scales", "norms"], ...], Field(min_length=1)] = ("scales",)
    """Parameters that train."""
    lr_units: Literal["reach", "absolute"] = "reach"
    """Unit of the `lr_` keys, as in `block_ap.lr_units`."""
    lr_scales: Rate = 0.3
    """Scales; as reach, in step sizes by which the outermost level of the grid moves, each relative to itself."""
    lr_norms: Rate = 0.0
    """Norm weights; as reach, relative to their own magnitude."""
    max_step: Positive | None = 0.02
    """With `lr_units: reach`, the largest peak rate, in the units of the `lr_` keys: short runs would otherwise take
    steps that undo more than they teach. null does not bound it."""
    min_lr_factor: DecayFactor | None = 20.0
    """The cosine schedule ends at the peak rate divided by this; null ends at zero."""
    warmup: Annotated[float, Number, Field(ge=0, lt=1)] = 0.1
    """Fraction of the steps over which the rate rises from zero, rounded up to whole steps."""
    grad_clip: Positive | None = 1.0
    """Largest norm of the gradient; null does not clip."""
    gradient_checkpointing: bool = True
    """Recompute each block in the backward pass: less memory, more time, the same result (but dropout acts if any)."""
    amp: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Arithmetic of the model; `auto` is bfloat16 where that is faster, else float32. float16 scales its losses.
    Trained parameters are always fp32."""
    checkpoint_every: Count = 16
    """Optimizer steps between two states that `keep_best` chooses from; a resume starts there or ten minutes back."""
    keep_best: bool = True
    """Keep the state with the lowest validation loss, the untrained one included."""


class PackSection(Section):
    """`qat pack`: the checkpoint that is deployed."""

    scale_dtype: Literal["float16", "float32"] = "float16"
    """Stored type of the scales."""
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    """Stored type of everything that is not quantized, and the type to compute in that config.json states. `auto` keeps
    the source's, but stores float32 as float16."""


class ExportSection(Section):
    """`qat export`: formats of other runtimes."""

    formats: Annotated[tuple[Format, ...], Field(min_length=1)] = ("native",)
    """What `qat export` writes, which is no part of `qat run`; `--format` chooses others."""
    verify: bool = True
    """Read every export back with other code and compare it; `qat export --verify` and `--no-verify` set this."""
    runtimes: bool = True
    """Also load it in the installed libraries that serve the format and compare logits."""
    dtype: Literal["auto", "float16", "bfloat16"] = "auto"
    """native, dense: type of everything that is not quantized; `auto`: bfloat16 where the model is stored so or
    is of a family that float16 does not hold (Gemma 2 and 3, GLM-4, PLaMo 2), else float16."""
    max_shard_gb: Positive = 5.0
    """Size, in 1e9 bytes, above which a new safetensors shard begins."""
    awq_promote: bool = False
    """awq: let 2- and 3-bit codes ride in 4 bits."""
    bitblas_zeros: Literal["qzeros", "zeros"] = "qzeros"
    """bitblas: name of the zero-point tensor, `qzeros` since GPTQModel 5, `zeros` before."""
    gguf_type: Literal["auto", "exact", "Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q2_K", "Q4_K", "Q2_0"] = "auto"
    """gguf: `auto` (smallest that fits), `exact` (no rounded offset), or one block type for all."""
    gguf_embedding: Literal["F16", "Q8_0"] = "F16"
    """gguf: type of the embeddings and the head."""


class PerplexityText(Section):
    """One text whose perplexity is measured over windows that do not overlap."""

    name: Name
    """Name of the metric, used in the report and in `expect`."""
    source: Text
    """`wikitext2` (test split), `c4` (validation), or the path of a text file."""
    file: Text | None = None
    """Local copy of what `wikitext2` or `c4` reads from the hub: `wiki.test.raw`, C4's first validation shard."""
    seq_len: Annotated[int, Number, Field(ge=8)] = 2048
    """Tokens per window."""
    windows: Count | None = None
    """Windows to measure, from the start of the text; null is all of them."""
    bos: Literal["document", "window"] = "document"
    """`window` begins every window with the beginning-of-text token, as Gemma needs; no published protocol does."""


class ZeroShotSection(Section):
    """Accuracy on lm-eval's tasks. Needs `pip install 'qatcli[eval]'`."""

    tasks: Annotated[tuple[Name, ...], Field(min_length=1)] = (
        "winogrande",
        "piqa",
        "hellaswag",
        "arc_easy",
        "arc_challenge",
    )
    """lm-eval's names. The default are the paper's five: `acc`, no examples in the prompt. Other tasks keep lm-eval's
    own settings."""
    data: DataFolder | None = None
    """Folder of local rows for these five: `hellaswag_val.jsonl`, `piqa_val.jsonl`, `winogrande_xl_val.jsonl`,
    `arc_easy_test.jsonl`, `arc_challenge_test.jsonl`; null, and any other task, takes lm-eval's data from the hub."""
    limit: Count | None = None
    """Rows of each task, from its start; null is all of them."""
    batch_tokens: Count = 1024
    """Tokens per forward pass. Changes memory and speed, not the result beyond rounding."""


class SpeedSection(Section):
    """How fast one sequence is read and continued, with the weights as they are loaded."""

    prompt_tokens: Count = 512
    """Tokens of the prompt."""
    new_tokens: Count = 16
    """Tokens generated after it."""
    repeats: Count = 3
    """Measurements, of which the median counts; the prompt and one token more warm up."""


class EvalSection(Section):
    """`qat eval`: what is measured, and against what."""

    perplexity: tuple[PerplexityText, ...] = (PerplexityText(name="wikitext2", source="wikitext2"),)
    """Texts for perplexity."""
    kl: bool = True
    """Also measure the distance to the full-precision model's next-token distribution on these texts."""
    zero_shot: ZeroShotSection | None = None
    """Accuracy on tasks; `{}` takes the paper's five from the hub, null measures none."""
    speed: SpeedSection | None = SpeedSection()
    """Tokens per second and memory; null measures neither."""
    cache: bool = True
    """Keep the full-precision model's perplexities and accuracies in the user's cache directory, so that a machine
    measures them once. They are used for the same files, texts, tasks, device and versions only."""
    baselines: tuple[Baseline, ...] = ("full_precision", "round_to_nearest", "block_ap")
    """Models measured beside the result. `round_to_nearest` has min-max grids, `calibrate` the searched ones; `gptq`
    searches its own and is made in `<run>/gptq`. The last three are left out where the run lacks their stage."""
    prompts: tuple[str, ...] = ()
    """Prompts that full precision and the result continue, for the table and the report."""
    max_new_tokens: Count = 64
    """Length of these continuations, in tokens."""


class Expectation(Section):
    """A figure that the run must reach."""

    value: Annotated[float, Number]
    """The figure, in the metric's own unit."""
    tolerance: Rate = 0.0
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
    expect: dict[str, Expectation] = {}  # noqa: RUF012 (pydantic copies it)
    """Figures to reach; `qat eval`, `qat run` and `qat report` check them and exit with 4 on a miss. Names: a text's is
    its perplexity, `<text>.kl`, `<text>.kl_99` and `<text>.top1_agreement` its divergence; a zero-shot task's is its
    accuracy in [0, 1], `zero_shot` the mean; `bits_per_weight` and `bits_per_parameter`."""
    track: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Also send recipe and figures to TensorBoard (`<run>/tensorboard`) or Weights & Biases while a stage runs.
    log.jsonl always has them. Needs `pip install 'qatcli[tracking]'`; the result does not depend on it."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_method(cls, data: Any) -> Any:
        return fill(data) if isinstance(data, Mapping) else data
