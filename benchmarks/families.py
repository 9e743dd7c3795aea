"""Which families of models go through: a tiny random model of each, from calibration to every export.

    python benchmarks/families.py TOKENIZER TEXT [--only REGEX] [--out FILE]

TOKENIZER is the folder of any tokenizer, TEXT a text of some thousand tokens. Prints a Markdown table: how far the
model, read block by block, is from the whole one (largest difference of logits, relative to the largest of them),
whether the chain of `qat run` ends, and what each export says, verified in the runtimes that are installed. Random
weights say nothing about quality: this is about names, shapes and replayed arguments.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
import yaml

import qatcli
from qatcli.activations import StreamBudget
from qatcli.chain import run_all, run_exports
from qatcli.errors import QatError
from qatcli.formats import FORMATS
from qatcli.models.blocks import open_blocks
from qatcli.models.source import open_source
from qatcli.progress import Bar
from qatcli.streaming import StreamedModel

CPU, TOKENS = torch.device("cpu"), 48  # more than a sliding window below
COMMON: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "pad_token_id": 0}
GATED = {**COMMON, "intermediate_size": 96, "num_key_value_heads": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": GATED,
    "Mistral": {**GATED, "sliding_window": 32},
    "Qwen2": GATED,
    "Qwen3": {**GATED, "head_dim": 16},
    "Gemma2": {**GATED, "head_dim": 16, "sliding_window": 32},
    "Gemma3Text": {**GATED, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 32},
    "Phi": {**COMMON, "intermediate_size": 96},
    "Phi3": GATED,
    "Olmo2": GATED,
    "Cohere2": {**GATED, "sliding_window": 32},
    "StableLm": GATED,
    "Granite": GATED,
    "SmolLM3": GATED,
    "Starcoder2": GATED,
    "GPTNeoX": {**COMMON, "intermediate_size": 96},
    "GPTJ": {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256, "rotary_dim": 8},
    "Falcon": {**COMMON, "alibi": False},
    "OPT": {**COMMON, "word_embed_proj_dim": 64, "ffn_dim": 96},
    "GPT2": {"n_embd": 64, "n_layer": 3, "n_head": 4},
    "Mixtral": {**GATED, "num_local_experts": 4},
}


def main(
    tokenizer: Annotated[Path, typer.Argument(exists=True, help="Folder of a tokenizer.")],
    text: Annotated[Path, typer.Argument(exists=True, help="Text for training and evaluation.")],
    only: Annotated[str, typer.Option(metavar="REGEX", help="Families whose whole name this matches.")] = ".*",
    out: Annotated[Path | None, typer.Option(help="Write the table to this file, too.")] = None,
) -> None:
    """Run every family and print the table."""
    lines = [
        "# Families of models\n",
        "    python benchmarks/families.py TOKENIZER TEXT\n",
        f"qat {qatcli.__version__}, transformers {transformers.__version__}, torch {torch.__version__}; tiny random",
        "models, 3 bits in groups of 32 (awq: promoted to 4); exports verified in the runtimes that are installed.\n",
        "| family | block by block against the whole | chain | " + " | ".join(FORMATS) + " |",
        "|---" * (3 + len(FORMATS)) + "|",
    ]
    print("\n".join(lines), flush=True)
    for name in FAMILIES:
        if re.fullmatch(only, name):
            with tempfile.TemporaryDirectory() as folder:
                lines.append("| " + " | ".join([name, *_row(name, Path(folder), tokenizer, text)]) + " |")
            print(lines[-1], flush=True)
    if out:
        out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _row(name: str, folder: Path, tokenizer: Path, text: Path) -> Iterator[str]:
    model = _save(name, folder / "model", tokenizer)
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(_recipe(model, text)), encoding="utf-8")
    yield _said(lambda: f"{_difference(model):.0e}").replace(f"{folder}/", "")
    where: dict[str, Any] = {"run_dir": folder / "run", "restart": False, "device": "cpu", "verbosity": -1}
    chain = _said(lambda: "ends" if run_all(recipe, [], **where) else "").replace(f"{folder}/", "")
    yield chain
    for kind in FORMATS:
        yield _said(partial(_exported, recipe, kind, where)) if chain == "ends" else ""


def _exported(recipe: Path, kind: str, where: dict[str, Any]) -> str:
    (done,) = run_exports(recipe, ["export.awq_promote=true"], [kind], source=None, **where)
    return "ok" if done["path"] else ""


def _said(measure: Callable[[], str]) -> str:
    """What was measured, or the error's first words; what nobody foresaw by its class."""
    try:
        return measure()
    except QatError as error:
        words = error.message.replace("|", "/")
    except Exception as error:
        words = f"**{type(error).__name__}**: {error}".replace("|", "/").replace("\n", " ")
    return words if len(words) < 120 else words[:117] + "..."


def _save(name: str, folder: Path, tokenizer: Path) -> Path:
    """A random model of a family, and the tokenizer."""
    loaded = transformers.AutoTokenizer.from_pretrained(tokenizer)
    config = getattr(transformers, f"{name}Config")(vocab_size=len(loaded), dtype="float32", **FAMILIES[name])
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    loaded.save_pretrained(folder)
    return folder


def _difference(path: Path) -> float:
    """Of the logits, block by block and in one pass, over the largest of them."""
    source = open_source(str(path))
    windows = torch.randint(0, 1000, (2, TOKENS), dtype=torch.int32)
    model = StreamedModel(open_blocks(source), lambda: StreamBudget(CPU, 0, 2**30, path))
    bar = Bar("", model.steps(windows), 0, lambda _: None)
    found = torch.stack([each.clone() for each in model.logits(windows, torch.float32, bar)])
    with torch.no_grad():
        expected = source.load_model(torch.float32, CPU)(input_ids=windows.long(), use_cache=False).logits
    return float((found - expected).abs().max() / expected.abs().max())


def _recipe(model: Path, text: Path) -> dict[str, Any]:
    size = {"samples": 16, "validation_samples": 4, "seq_len": 64}
    return {
        "model": {"source": str(model)},
        "quant": {"bits": 3, "group_size": 32},
        "calibrate": {"data": [{"source": str(text.absolute())}], **size},
        "block_ap": {"epochs": 1, "batch_size": 4},
        "e2e_qp": {**size, "batch_size": 4, "micro_batch_size": 4},
        "eval": {
            "perplexity": [{"name": "text", "source": str(text.absolute()), "seq_len": 64, "windows": 4}],
            "speed": None,
            "baselines": [],
        },
    }


if __name__ == "__main__":
    typer.run(main)
