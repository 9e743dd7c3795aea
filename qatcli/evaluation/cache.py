"""Figures of full-precision models, kept so that a machine measures each of them once.

A result is found again only under everything it depends on: the bytes of the model's files, the text or tasks, device,
dtype, the versions of the libraries and the code of this package. Files: `~/.cache/qat/evaluation/<sha256>.json`, each
with its key in the clear; removing them only costs time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from qatcli.directory import write_json
from qatcli.inputs import sha256
from qatcli.machine import device_name
from qatcli.models.gguf import cache_directory

LIBRARIES = ("torch", "transformers", "tokenizers")
# sha256 over the code that measures, as it is when it is loaded
CODE = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py")))).hexdigest()


def remembered(protocol: dict[str, Any], model: Path, device: torch.device, measure: Callable[[], Any]) -> Any:
    """What `measure` returned for the same protocol, model files and circumstances, or else returns now.

    protocol: JSON that says what is measured. `measure` returns JSON.
    """
    key = {
        "protocol": protocol,
        "model": files_digest(model),
        "device": device_name(device),
        "versions": {name: version(name) for name in LIBRARIES},
        "code": CODE,
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    file = cache_directory() / "evaluation" / f"{name}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):  # damaged, or of another user: measured again
        return json.loads(file.read_text(encoding="utf-8"))["result"]
    result = measure()
    with suppress(OSError):  # a cache that cannot be written is worth less than what was measured
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"key": key, "result": result})
    return result


@cache
def files_digest(path: Path) -> str:
    """sha256 over the names and contents of the files of a model directory."""
    digest = hashlib.sha256()
    for file in sorted(file for file in path.iterdir() if file.is_file()):
        digest.update(f"{file.name} {sha256(file)}\n".encode())
    return digest.hexdigest()
