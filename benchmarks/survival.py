"""Kill, interrupt and break the disk under every stage at random points; the same command again must give the bits of
an undisturbed chain. Prints a line per disturbance and a table; exits 1 when anything went wrong.

    python benchmarks/survival.py                                     a tiny random Llama: about 20 minutes
    python benchmarks/survival.py --model DIR --text FILE --kills 12  a model with a tokenizer, and a text file
    python benchmarks/survival.py --inputs                            bad inputs instead, with the exit code of each

A third of the kills and of the signals come from outside after a random time, to processes started as a user starts
them. The others strike at a random operation on a file (tests/survival/faults.py), in forks of one process that has
imported everything. What a disturbance costs is the processor time of both commands beyond that of one undisturbed.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "survival"))

from cases import CASES  # noqa: E402
from harness import (  # noqa: E402
    DISK,
    SIGNALLED,
    SMALLEST,
    STAGES,
    Chain,
    Fault,
    Served,
    Spawned,
    environment,
    random_fault,
    summary,
    table,
)
from hostile import attempt  # noqa: E402

PARTS = ("the old cat", "a red bird", "my sister", "sees the sea.", "hears a song.", "eats some bread.")


def main() -> None:
    """Disturb, print, judge."""
    arguments = _arguments()
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's background job would pass on that it is ignored
    choose = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory(prefix="qat-survival-") as name:
        folder = Path(name)
        model = arguments.model or _random_model(folder / "model")
        text = arguments.text or _random_text(folder / "text.txt", choose)
        env = environment(model.absolute(), text.absolute(), folder / "cache")
        env["PYTHONPATH"] = f"{ROOT}:{ROOT / 'kernels'}"
        served, spawned = Served(folder, env), Spawned(env)
        chain = Chain(ROOT / "recipes" / "smoke" / "w2g32.yaml", folder, served, options=SMALLEST)
        chain.undisturbed()
        good = _inputs(chain, model, folder) if arguments.inputs else _disturb(chain, spawned, arguments, choose)
        served.close()
    sys.exit(not good)


def _inputs(chain: Chain, model: Path, folder: Path) -> bool:
    """Every bad input, and whether all were refused as they should be."""
    print("| input | command | exit | error |\n|---|---|---|---|")
    good = True
    for number, bad in enumerate(CASES):
        place = folder / f"input-{number}"
        place.mkdir()
        done, problems = attempt(chain, bad, place, model)
        error = done.stderr.partition("error: ")[2].splitlines()[:1]
        said = "".join(error).replace(f"{folder}/", "").replace(f"input-{number}/", "").replace("|", "")[:120]
        print(f"| {bad.name} | {bad.stage} | {done.code} | {said} |", *problems, flush=True)
        good = good and not problems
        shutil.rmtree(place)
    print(f"\n{len(CASES)} bad inputs")
    return good


def _disturb(chain: Chain, spawned: Spawned, arguments: argparse.Namespace, choose: random.Random) -> bool:
    """Every disturbance, and whether all were survived."""
    served, inside = chain.launch, dict(chain.cpu)
    cpu, seconds = {}, {}
    for stage in STAGES:
        started = time.monotonic()
        cpu[stage] = spawned(chain.command(stage, chain.folder / "timed")).cpu
        seconds[stage] = time.monotonic() - started
    print("processor seconds as processes:", {stage: round(used, 1) for stage, used in cpu.items()}, flush=True)
    rows = []
    for stage, fault in _plan(chain, arguments, seconds, choose):
        timed = fault.kind == "time"
        chain.launch, chain.cpu = (spawned, cpu) if timed else (served, inside)
        row = chain.disturb(stage, fault)
        rows.append(row)
        line = f"{len(rows):3} {stage:10} {fault!s:32} exit {row.code:4} lost {row.lost:5.1f} s"
        print(line, *row.problems, flush=True)
    print(table(rows), summary(rows, inside), sep="\n\n")
    bad = sum(bool(row.problems) or not row.equal or not row.untouched or row.resumed != 0 for row in rows)
    print(f"\n{len(rows)} disturbances, {len(rows) - bad} resumed to equal digests, {bad} went wrong")
    return bad == 0


def _plan(
    chain: Chain, arguments: argparse.Namespace, seconds: dict[str, float], choose: random.Random
) -> Iterator[tuple[str, Fault]]:
    """Stage by stage, so that every stage gets its share of each kind of fault."""
    for names, count in (
        (("kill", "kill-after"), arguments.kills),
        (SIGNALLED, arguments.signals),
        (DISK, arguments.disk),
    ):
        for number in range(count):
            stage = STAGES[number % len(STAGES)]
            turn = number + number // len(STAGES)  # so that every stage has its turn
            if names is not DISK and turn % 3 == 2:
                name = "SIGKILL" if "kill" in names else choose.choice(names)
                yield stage, Fault("time", choose.uniform(0.2, 1.0) * seconds[stage], name)
            else:
                yield stage, random_fault(chain, stage, names, choose)


def _random_model(path: Path) -> Path:
    """A Llama of 3 blocks with random weights, and a tokenizer with a token for every byte."""
    import tokenizers
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", *alphabet])}
    fast = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = tokenizers.decoders.ByteLevel()
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=len(vocabulary), **sizes, bos_token_id=0, eos_token_id=1)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(path)
    return path


def _random_text(path: Path, choose: random.Random) -> Path:
    """Documents of 40 phrases, two empty lines apart."""
    path.write_text("\n\n\n".join(" ".join(choose.choices(PARTS, k=40)) for _ in range(100)))
    return path


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="model folder; a random one otherwise")
    parser.add_argument("--text", type=Path, help="text file to calibrate and evaluate on")
    parser.add_argument("--kills", type=int, default=48)
    parser.add_argument("--signals", type=int, default=18)
    parser.add_argument("--disk", type=int, default=24, help="full, failing and read-only disks")
    parser.add_argument("--inputs", action="store_true", help="the bad inputs of tests/survival/cases_*.py")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
