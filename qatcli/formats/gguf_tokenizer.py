"""Tokenizer metadata of a GGUF file, from the Hugging Face tokenizer beside the checkpoint.

Two kinds exist. Byte-level BPE becomes tokenizer.ggml.model "gpt2" with its merges; llama.cpp splits text with one of
its built-in expressions, which `tokenizer.ggml.pre` names, so the tokenizer's own split is looked up in a table and an
unknown one is refused: any other name would tokenize differently without a word. SentencePiece BPE (byte fallback)
becomes "llama" with scores; llama.cpp merges the pair whose result scores highest, and the rank of a merge is that
order.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qatcli.errors import QatError

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The expressions of a tokenizer's Split steps, in order -> llama.cpp's name for them (src/llama-vocab.cpp).
PRE_TOKENIZERS = {
    (_WORDS + r"\p{N}{1,3}" + _REST,): "llama-bpe",
    (_WORDS + r"\p{N}" + _REST,): "qwen2",
    (_CASED,): "tekken",
    ("digits", "words"): "smollm",
    ("words",): "gpt-2",
}
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_UNMERGED = -1e6
_HINT = "export another format, or convert with llama.cpp's own converter from the dense export"


def add_tokenizer(writer: Any, directory: Path, vocabulary: int) -> None:
    """Add all tokenizer keys to a gguf.GGUFWriter. QatError when llama.cpp could not tokenize like this tokenizer."""
    import gguf

    try:
        tokenizer = load_tokenizer(directory)
        content = json.loads(tokenizer.backend_tokenizer.to_str())
    except (OSError, ValueError, AttributeError) as error:
        raise QatError(f"{directory} has no tokenizer that can go into a GGUF file: {error}", hint=_HINT) from error
    model = content["model"]
    if model["type"] != "BPE":
        raise QatError(f"GGUF export knows BPE tokenizers only, this is {model['type']}", hint=_HINT)
    sentencepiece = bool(model.get("byte_fallback"))
    normalizer = (content.get("normalizer") or {}).get("type", "NFC")
    if not sentencepiece and normalizer != "NFC":  # texts that are normal already lose nothing
        raise QatError(f"llama.cpp knows no {normalizer} before a byte-level tokenizer", hint=_HINT)
    tokens, types = token_list(content, vocabulary)
    writer.add_tokenizer_model("llama" if sentencepiece else "gpt2")
    writer.add_tokenizer_pre("default" if sentencepiece else pre_tokenizer_name(content.get("pre_tokenizer")))
    writer.add_token_list(tokens)
    if sentencepiece:
        writer.add_token_scores(scores(tokens, model["merges"]))
        writer.add_add_space_prefix(_prepends_space(content))
    writer.add_token_types(types)
    special = gguf.SpecialVocab(directory, n_vocab=vocabulary)
    if not sentencepiece:
        # llama.cpp refuses a file without merges; two zero bytes, which no token spells, stay two tokens all the same.
        special.merges = [" ".join(_pair(merge)) for merge in model["merges"]] or ["\u0100 \u0100"]
    special.add_special_token = {"bos": _adds_bos(tokenizer), "eos": False}
    special.special_token_ids |= {
        kind: getattr(tokenizer, f"{kind}_token_id")
        for kind in ("bos", "eos", "unk", "pad")
        if getattr(tokenizer, f"{kind}_token_id", None) is not None
    }
    special.chat_template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None
    special.add_to_gguf(writer, quiet=True)


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer as its file says: AutoTokenizer may add tokens that belong to the model type's own class."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    has_file = (directory / "tokenizer.json").is_file()
    return (PreTrainedTokenizerFast if has_file else AutoTokenizer).from_pretrained(directory)


def token_list(content: dict[str, Any], vocabulary: int) -> tuple[list[str], list[int]]:
    """Text and type of every id; ids the tokenizer lacks are unused. QatError when it has more than the model."""
    model = content["model"]
    texts: dict[int, str] = {number: text for text, number in model["vocab"].items()}
    added = {entry["id"]: entry for entry in content["added_tokens"]}
    texts |= {number: entry["content"] for number, entry in added.items()}
    if max(texts) >= vocabulary:
        raise QatError(f"the tokenizer has ids up to {max(texts)}, the model {vocabulary} embeddings", hint=_HINT)
    tokens, types = [], []
    for number in range(vocabulary):
        text = texts.get(number)
        if text is None:
            tokens.append(f"[PAD{number}]")
            types.append(_UNUSED)
            continue
        tokens.append(text)
        if text == model.get("unk_token") and model.get("byte_fallback"):
            types.append(_UNKNOWN)
        elif number in added:
            types.append(_CONTROL if added[number]["special"] else _USER_DEFINED)
        elif model.get("byte_fallback") and len(text) == 6 and text.startswith("<0x"):
            types.append(_BYTE)
        else:
            types.append(_NORMAL)
    return tokens, types


def scores(tokens: list[str], merges: list[Any]) -> list[float]:
    """The score of every piece: minus the rank of the first merge that makes it, so that merges happen in order."""
    rank: dict[str, int] = {}
    for number, merge in enumerate(merges):
        rank.setdefault("".join(_pair(merge)), number)
    return [-float(rank[token]) if token in rank else _UNMERGED for token in tokens]


def pre_tokenizer_name(pre_tokenizer: dict[str, Any] | None) -> str:
    """llama.cpp's name for a byte-level tokenizer's way to split text. QatError when it has none."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer] if pre_tokenizer else [])
    splits: list[str] = []
    for step in steps:
        if step["type"] == "Split":
            splits.append(step["pattern"].get("Regex") or step["pattern"]["String"])
        elif step["type"] == "Digits" and step["individual_digits"]:
            splits.append("digits")
        elif step["type"] == "ByteLevel" and step.get("add_prefix_space"):
            raise QatError("llama.cpp puts no space in front of a text for byte-level tokenizers", hint=_HINT)
        elif step["type"] == "ByteLevel":
            splits += ["words"] if step.get("use_regex", True) else []
        else:
            splits.append(step["type"])
    if tuple(splits) not in PRE_TOKENIZERS:
        raise QatError(f"llama.cpp has no name that is known here for the text splits {splits}", hint=_HINT)
    return PRE_TOKENIZERS[tuple(splits)]


def _pair(merge: Any) -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else list(merge)


def _prepends_space(content: dict[str, Any]) -> bool:
    text = json.dumps([content.get("normalizer"), content.get("pre_tokenizer")])
    return '"Prepend"' in text or '"prepend_scheme": "always"' in text or '"prepend_scheme": "first"' in text


def _adds_bos(tokenizer: Any) -> bool:
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and ids[0] == tokenizer.bos_token_id
