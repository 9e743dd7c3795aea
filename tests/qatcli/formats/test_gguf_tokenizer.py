"""Text splits: the name a GGUF file gives llama.cpp makes it split text as the tokenizer itself does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from qatcli.errors import QatError
from qatcli.formats import FORMATS, ExportOptions
from qatcli.formats.gguf_readback import open_gguf
from qatcli.formats.gguf_tokenizer import PRE_TOKENIZERS
from qatcli.formats.runtimes import run
from qatcli.formats.runtimes.child import TEXT
from qatcli.formats.runtimes.reference import reference
from qatcli.packed import PackedCheckpoint

pytest.importorskip("gguf", reason="gguf is not installed (pip install 'qatcli[gguf]')")
pytest.importorskip("xllamacpp", reason="llama.cpp is not installed (pip install 'qatcli[runtimes]')")

VOCABULARY = 420
# Enough of what the splits treat differently for merges to form across it where a split lets them.
TRAINING = [
    TEXT,
    "It's 1234567 o'clock!?  \n\n\tWE'RE here, CamelCase 3.14159\r\n (don't) // na\u00efve \u00c5ngstr\u00f6m 12 345",
] * 8


def step(kind: str) -> list[pre_tokenizers.PreTokenizer]:
    """One entry of a key of PRE_TOKENIZERS as steps of the tokenizers library."""
    if kind == "digits":
        return [pre_tokenizers.Digits(individual_digits=True)]
    if kind == "words":
        return [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return [pre_tokenizers.Split(Regex(kind), behavior="isolated"), whole]


@pytest.mark.slow
@pytest.mark.parametrize(("splits", "name"), PRE_TOKENIZERS.items(), ids=PRE_TOKENIZERS.values())
def test_llama_cpp_splits_text_as_the_tokenizer_does(
    save_tiny_llama: Callable[..., Path],
    pack: Callable[..., PackedCheckpoint],
    tmp_path: Path,
    splits: tuple[str, ...],
    name: str,
) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([part for kind in splits for part in step(kind)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TRAINING, trainer)
    assert tokenizer.get_vocab_size() > 300, "there are merges"
    folder = save_tiny_llama(f"splits-{name}", vocab_size=VOCABULARY, num_hidden_layers=1)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    checkpoint, out = pack(folder, tmp_path / "packed", bits=2), tmp_path / "out"
    FORMATS["gguf"].write(checkpoint, out, ExportOptions(runtimes=False))
    assert open_gguf(out / "model.gguf").fields["tokenizer.ggml.pre"] == name
    report = run("llama.cpp", checkpoint, out, reference(checkpoint))
    assert report.ran
    assert report.differences == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "no Lowercase before a byte-level tokenizer"),
        (
            {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True, "trim_offsets": True}},
            "no space in front",
        ),
    ],
)
def test_what_llama_cpp_does_not_do_to_a_text_is_refused(
    tiny_llama: Path, pack: Callable[..., PackedCheckpoint], tmp_path: Path, change: dict[str, object], message: str
) -> None:
    checkpoint = pack(tiny_llama, tmp_path / "packed", bits=4)
    file = tmp_path / "packed" / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **change}), encoding="utf-8")
    with pytest.raises(QatError, match=message):
        FORMATS["gguf"].write(checkpoint, tmp_path / "out", ExportOptions(runtimes=False))
    assert not (tmp_path / "out").exists()
