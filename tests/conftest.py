"""What every test runs under, and the small model and text they share.

Nothing here reaches the network: the hub is switched off, and its caches lie in a folder that is removed at the end.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
_CACHE = tempfile.TemporaryDirectory(prefix="qat-tests-")
os.environ["HF_HOME"] = _CACHE.name
os.environ["XDG_CACHE_HOME"] = _CACHE.name
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])  # processes that tests start

import torch  # noqa: E402

if not torch.cuda.is_available():
    # Read by `@triton.jit` when a kernel is defined, so it has to be there before any kernel module is imported.
    assert "triton" not in sys.modules, "triton was imported before the interpreter could be chosen"
    os.environ["TRITON_INTERPRET"] = "1"
torch.set_num_threads(1)  # sums in one order whatever the machine; the workers of pytest-xdist use the other cores


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers for a test whichever tests ran before it."""
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def qat_data() -> Path:
    """The folder of real text and zero-shot sets: $QAT_DATA, else ../shared/data beside the repository."""
    folder = Path(os.environ.get("QAT_DATA") or ROOT.parent / "shared" / "data")
    if not (folder / "ppl").is_dir():
        pytest.skip(f"no test data at {folder}: set QAT_DATA to a folder with calib/, ppl/ and zeroshot/")
    return folder


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .jsonl file of 200 documents {"text": ...} of 300 to 700 ASCII characters with an easy grammar."""
    choose = random.Random(0)
    who = ["the cat", "a dog", "my sister", "the old man", "one bird"]
    does = {"sees": ["the sea", "a red ball"], "eats": ["some bread", "an apple"], "hears": ["a song", "the rain"]}

    def sentence() -> str:
        verb = choose.choice(list(does))
        return f"{choose.choice(who)} {verb} {choose.choice(does[verb])}."

    documents = [" ".join(sentence() for _ in range(choose.randint(14, 22))) for _ in range(200)]
    path = tmp_path_factory.mktemp("text") / "tiny.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_llama(save_tiny_llama: Callable[..., Path]) -> Path:
    """A Llama that has learnt `tiny_text` a little: 3 blocks, hidden 64, intermediate 96, byte tokens, fp32."""
    return save_tiny_llama("tiny-llama")


@pytest.fixture(scope="session")
def tiny_llama_tied(save_tiny_llama: Callable[..., Path]) -> Path:
    """`tiny_llama` with one tensor for the embedding and the output layer."""
    return save_tiny_llama("tiny-llama-tied", tie_word_embeddings=True)


@pytest.fixture(scope="session")
def save_tiny_llama(tmp_path_factory: pytest.TempPathFactory, tiny_text: Path) -> Callable[..., Path]:
    """A function that trains and saves a tiny Llama: (folder name, **overrides of LlamaConfig) -> its folder.

    Trained, if only for a second: quantizing random weights changes neither perplexity nor anything a test could see.
    """
    import transformers

    def save(name: str, **overrides: object) -> Path:
        tokenizer = _byte_tokenizer()
        config = transformers.LlamaConfig(
            **{
                "vocab_size": len(tokenizer),
                "hidden_size": 64,
                "intermediate_size": 96,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 512,
                "initializer_range": 0.1,
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": tokenizer.eos_token_id,
                "tie_word_embeddings": False,
                "dtype": "float32",
                **overrides,
            }
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = transformers.LlamaForCausalLM(config)
            _train(model, _token_stream(tokenizer, tiny_text))
        path = tmp_path_factory.mktemp("models") / name
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        return path

    return save


def _byte_tokenizer():  # type: ignore[no-untyped-def]
    """A fast tokenizer with one token for each of the 256 bytes, and <s> and </s>; adds <s> in front."""
    import tokenizers
    import transformers

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", *alphabet])}
    fast = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = tokenizers.decoders.ByteLevel()
    fast.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", eos_token="</s>")


def _token_stream(tokenizer, text: Path) -> torch.Tensor:  # type: ignore[no-untyped-def]
    documents = [json.loads(line)["text"] for line in text.read_text(encoding="utf-8").splitlines()]
    return torch.tensor([token for ids in tokenizer(documents)["input_ids"] for token in ids])


def _train(model: torch.nn.Module, stream: torch.Tensor, *, steps: int = 200, batch: int = 4, length: int = 64) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps, pct_start=0.2)
    for _ in range(steps):
        starts = torch.randint(len(stream) - length, (batch,))
        windows = torch.stack([stream[start : start + length] for start in starts])
        optimizer.zero_grad()
        model(input_ids=windows, labels=windows).loss.backward()
        optimizer.step()
        schedule.step()
