"""Damaged, wrong and hostile inputs end in an error with the exit code of the contract, never in a traceback."""

from __future__ import annotations

from pathlib import Path

import pytest
from cases import CASES
from harness import Chain
from hostile import Case, attempt


@pytest.mark.parametrize("bad", CASES, ids=lambda bad: bad.name)
def test_a_bad_input_is_refused(chain: Chain, bad: Case, tiny_llama: Path, tmp_path: Path) -> None:
    done, problems = attempt(chain, bad, tmp_path, tiny_llama)
    assert problems == [], done.stderr


def test_the_cases_have_names_of_their_own() -> None:
    assert len(CASES) > 80
    assert len({bad.name for bad in CASES}) == len(CASES)
