"""What `qat plan` predicts beside what is then measured: host memory, disk and time of every stage of a chain.

    python benchmarks/plan_accuracy.py smollm2 --model SmolLM2-135M-Instruct.Q4_1.gguf --data /data
    python benchmarks/plan_accuracy.py llama-1b --layers 4 --data /data

--data is a folder with calib/rp1t_c4.jsonl, documents under the key `text`, and ppl/wiki.test.raw.
llama-1b is a Llama of the shape of Llama-3.2-1B with random bf16 weights, written to a temporary folder. Each stage is
a process of its own; memory is the peak that its stage.json states, disk the most that its folder held, looked at ten
times a second. Prints Markdown; exits 1 when a memory is further from its prediction than a quarter.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml

STAGES = ("calibrate", "block-ap", "e2e-qp", "pack", "eval", "export")
TOLERANCE = 0.25  # of the measured memory
MIB = 2**20
LLAMA_1B = {
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}
SIZES = {"smollm2": {"samples": 16, "seq_len": 512}, "llama-1b": {"samples": 8, "seq_len": 256}}


def main() -> None:
    """Predict, run, compare."""
    arguments = _arguments()
    with tempfile.TemporaryDirectory(prefix="qat-plan-") as name:
        folder = Path(name)
        source = arguments.model or _random_llama(folder / "model", arguments.layers)
        recipe, run = folder / "recipe.yaml", folder / "run"
        recipe.write_text(yaml.safe_dump(_recipe(source, arguments.data, **SIZES[arguments.name])))
        planned = json.loads(_qat("plan", recipe, "--run", run, "--json"))
        predicted = {row["stage"].split()[0]: row for row in planned["stages"]}
        print(_title(arguments, planned), flush=True)
        good = True
        for stage in STAGES:
            measured = _measure(stage, recipe, run)
            good = _print_row(stage, predicted[stage], measured) and good
    sys.exit(not good)


def _title(arguments: argparse.Namespace, planned: dict[str, Any]) -> str:
    size = SIZES[arguments.name]
    model = planned["model"]
    return (
        f"{arguments.name}: {model['parameters'] / 1e6:.0f} million parameters in {model['blocks']} blocks, "
        f"{size['samples']} windows of {size['seq_len']} tokens, "
        f"{planned['compute']}, {torch.get_num_threads()} threads, torch {torch.__version__}\n\n"
        "| stage | host MiB, planned | measured | ratio | largest part | disk MiB, planned | measured | ratio | "
        "seconds, planned | measured |\n|---|---|---|---|---|---|---|---|---|---|"
    )


def _print_row(stage: str, predicted: dict[str, Any], measured: dict[str, float]) -> bool:
    """One line of the table; whether its memory is as planned."""
    host, disk = predicted["host"], predicted["disk"] + predicted["cache"]
    largest = max(predicted["parts"].items(), key=lambda part: part[1])
    memory = host / measured["host"]
    cells = (
        *(stage, f"{host / MIB:.0f}", f"{measured['host'] / MIB:.0f}", f"{memory:.2f}"),
        f"{predicted['peak']}: {largest[0]} {largest[1] / MIB:.0f}",
        *(f"{disk / MIB:.0f}", f"{measured['disk'] / MIB:.0f}", f"{disk / measured['disk']:.2f}"),
        "" if predicted["seconds"] is None else f"{predicted['seconds']:.0f}",
        f"{measured['seconds']:.0f}",
    )
    print("| " + " | ".join(cells) + " |", flush=True)
    return abs(memory - 1) <= TOLERANCE


def _measure(stage: str, recipe: Path, run: Path) -> dict[str, float]:
    """Peak bytes in memory and on disk, and seconds, of one stage in a process of its own."""
    command = [sys.executable, "-m", "qatcli", stage, str(recipe), "--run", str(run), "-q"]
    disk = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            disk = max(disk, _size(run / stage), _size(run / f"{stage}.partial"))
            time.sleep(0.1)
        assert process.stdout is not None
        finished = Path(process.stdout.read().strip())
    if process.returncode:
        sys.exit(f"{stage} exits with {process.returncode}")
    facts = json.loads((finished / "stage.json").read_text())
    written = max(disk, _size(run / stage))
    return {"host": facts["peak_memory"]["host_bytes"], "disk": written, "seconds": facts["seconds"]}


def _size(folder: Path) -> int:
    """Bytes on disk below a folder, activations in unlinked files not seen; files may go while they are counted."""
    total = 0
    for file in folder.rglob("*"):
        try:
            total += file.stat().st_size if file.is_file() else 0
        except FileNotFoundError:
            continue
    return total


def _qat(*arguments: object) -> str:
    command = [sys.executable, "-m", "qatcli", *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def _recipe(source: Path, data: Path, *, samples: int, seq_len: int) -> dict[str, Any]:
    """The default method at 2 bits with little to compute: what fills memory is there, in full size."""
    text = {"name": "wikitext2", "source": str(data / "ppl" / "wiki.test.raw")}
    windows = {"samples": samples, "validation_samples": 4, "seq_len": seq_len}
    return {
        "model": {"source": str(source.absolute())},
        "quant": {"bits": 2, "group_size": 64},
        "calibrate": {"data": [{"source": str(data / "calib" / "rp1t_c4.jsonl")}], **windows},
        "block_ap": {"epochs": 1, "batch_size": 2},
        "e2e_qp": {**windows, "batch_size": 4, "micro_batch_size": 2, "gradient_checkpointing": False},
        "export": {"formats": ["gptq"], "runtimes": False},
        "eval": {"perplexity": [{**text, "seq_len": seq_len, "windows": 4}], "speed": None},
    }


def _random_llama(path: Path, layers: int) -> Path:
    """A Llama of 1B shape with random weights in bf16, and a tokenizer with a token for every byte."""
    import tokenizers
    import transformers

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", *alphabet])}
    fast = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = tokenizers.decoders.ByteLevel()
    config = transformers.LlamaConfig(**{**LLAMA_1B, "num_hidden_layers": layers}, bos_token_id=0, eos_token_id=1)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(path)
    transformers.PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", eos_token="</s>").save_pretrained(path)
    return path


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=SIZES, help="smollm2, with --model; llama-1b, random weights")
    parser.add_argument("--model", type=Path, help="a folder or GGUF file")
    parser.add_argument("--layers", type=int, default=LLAMA_1B["num_hidden_layers"], help="blocks of the random model")
    parser.add_argument("--data", type=Path, required=True, help="folder of the texts")
    return parser.parse_args()


if __name__ == "__main__":
    main()
