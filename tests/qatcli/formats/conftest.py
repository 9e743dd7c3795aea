"""Packed checkpoints made by round-to-nearest from the shared tiny Llama."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qatcli.formats import runtimes
from qatcli.packed import (
    PackedCheckpoint,
    PackedWriter,
    QuantizedLinear,
    companion_files,
    quantization_config,
    read_config,
)

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def round_to_nearest(weight: torch.Tensor, bits: int, group_size: int, *, symmetric: bool = False) -> QuantizedLinear:
    """Minmax grid per group; symmetric puts every zero point at 2^(bits-1)."""
    rows, columns = weight.shape
    groups = weight.float().reshape(rows, 1 if group_size == -1 else columns // group_size, -1)
    high = 2**bits - 1
    low, top = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    if symmetric:
        middle = 2 ** (bits - 1)
        scale = (torch.maximum(-low, top) / middle).clamp(min=1e-4)
        zero_point = torch.full_like(scale, middle)
    else:
        scale = ((top - low) / high).clamp(min=1e-4)
        zero_point = (-low / scale).round()
    codes = (groups / scale[..., None] + zero_point[..., None]).round().clamp(0, high).to(torch.uint8)
    return QuantizedLinear(codes.reshape(rows, columns), scale, zero_point.to(torch.uint8), bits, group_size)


def pack_model(
    source: Path,
    out: Path,
    *,
    bits: int,
    group_size: int = 32,
    symmetric: bool = False,
    kinds: dict[str, tuple[int, int]] | None = None,
    skip: tuple[str, ...] = (),
) -> PackedCheckpoint:
    """Quantize a saved model. `kinds` gives some linears (by substring) other bits and group sizes."""
    writer = PackedWriter(out)
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        if module.rsplit(".", 1)[-1] not in PROJECTIONS or any(part in module for part in skip):
            writer.add_tensor(name, tensor)
        elif leaf == "weight":
            kind = next((kind for part, kind in (kinds or {}).items() if part in module), (bits, group_size))
            linear = round_to_nearest(tensor, *kind, symmetric=symmetric)
            bias = tensors.get(module + ".bias")
            writer.add_linear(module, QuantizedLinear(linear.codes, linear.scale, linear.zero_point, *kind, bias=bias))
    quantization = quantization_config(
        writer.modules, bits=bits, group_size=group_size, symmetric=symmetric, scale_dtype=torch.float32
    )
    writer.close({**read_config(source), "quantization_config": quantization})
    for file in companion_files(source):
        (out / file.name).write_bytes(file.read_bytes())
    return PackedCheckpoint.open(out)


@pytest.fixture(scope="session")
def _server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """Runs a runtime's command in a fork of a process that has its imports behind it."""
    command, output = (
        [sys.executable, str(Path(__file__).with_name("preloaded.py"))],
        tmp_path_factory.mktemp("child") / "err",
    )
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None and server.stdout is not None

        def serve(command: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
            request = {"arguments": command[3:], "environment": env, "output": str(output)}
            print(json.dumps(request), file=server.stdin, flush=True)
            status = int(server.stdout.readline())
            return subprocess.CompletedProcess(command, status, "", output.read_text(encoding="utf-8"))

        yield serve
        server.stdin.close()


@pytest.fixture(autouse=True)
def _preloaded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runtimes are started by the server, which the first of them starts."""
    real = subprocess.run

    def run(command: Any, **options: Any) -> Any:
        if list(command[1:3]) == ["-m", "qatcli.formats.runtimes.child"] and options["timeout"] > 60:
            return request.getfixturevalue("_server")(command, options["env"])
        return real(command, **options)

    monkeypatch.setattr(runtimes.subprocess, "run", run)


@pytest.fixture(scope="session")
def packed(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., PackedCheckpoint]:
    """A function (bits, **options of pack_model) -> packed tiny Llama; the same arguments give the same directory."""
    made: dict[str, PackedCheckpoint] = {}

    def make(bits: int, **options: object) -> PackedCheckpoint:
        key = f"{bits}-{sorted(options.items(), key=str)}"
        if key not in made:
            out = tmp_path_factory.mktemp("packed") / "model"
            made[key] = pack_model(tiny_llama, out, bits=bits, **options)
        return made[key]

    return make


@pytest.fixture(scope="session")
def pack() -> Callable[..., PackedCheckpoint]:
    """`pack_model` itself, for tests with a model of their own."""
    return pack_model
