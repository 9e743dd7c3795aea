"""What libraries raise about files that are not what they should be, as an error that a user can act on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from qatcli.errors import InputError, QatError


@contextmanager
def refused(what: str) -> Iterator[None]:
    """InputError for whatever a library raises about a file that is not what it should be.

    There is no telling what: a config with a list for a number fails at the first sum, wherever that is. Too little
    memory stays what it is.
    """
    try:
        yield
    except (QatError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if "can't allocate memory" in str(error):
            raise
        reason = " ".join(str(error).split())[:500] or "no reason given"
        raise InputError(f"{what}: {reason}", hint="check or replace the files of the model") from error


def load_complete(path: Path, **options: Any) -> Any:
    """The model in a directory, as transformers loads it. InputError when it does not, or lacks tensors: transformers
    would give these random values."""
    with refused(f"{path}: transformers cannot load it"):
        model, found = AutoModelForCausalLM.from_pretrained(
            path, use_safetensors=True, output_loading_info=True, **options
        )
    if missing := sorted(found["missing_keys"]):
        raise InputError(
            f"{path} lacks {len(missing)} tensors of its architecture, first: {missing[0]}",
            hint="copy the checkpoint again, or take one that is complete",
        )
    return model
