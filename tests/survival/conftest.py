"""The harness, and one undisturbed chain on the tiny model that the tests of this folder compare with."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from harness import SMALLEST, Chain, Served, environment

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "smoke" / "w2g32.yaml"


@pytest.fixture(scope="session")
def chain(tiny_llama: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    folder = tmp_path_factory.mktemp("survival")
    served = Served(folder, environment(tiny_llama, tiny_text, folder / "cache"))
    undisturbed = Chain(RECIPE, folder, served, options=SMALLEST)
    undisturbed.undisturbed()
    yield undisturbed
    served.close()
