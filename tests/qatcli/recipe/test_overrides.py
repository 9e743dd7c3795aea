"""`--set key.path=value`."""

from __future__ import annotations

from typing import Any

import pytest

from qatcli.recipe.overrides import apply


def test_values_are_yaml_and_order_counts() -> None:
    data: dict[str, Any] = {"quant": {"bits": 2, "skip": ["a", "b"]}, "block_ap": None}
    changes = ["quant.bits=3", "quant.bits=4", "quant.skip.1=c", "block_ap.grad_clip=null", "e2e_qp.train=[scales]"]
    keys, problems = apply(data, changes)
    assert problems == []
    assert keys[2] == ("quant", "skip", 1)
    expected = {
        "quant": {"bits": 4, "skip": ["a", "c"]},
        "block_ap": {"grad_clip": None},
        "e2e_qp": {"train": ["scales"]},
    }
    assert data == expected


def test_items_of_a_list_by_number() -> None:
    data: dict[str, Any] = {"calibrate": {"data": [{"source": "a"}, {"source": "b"}]}}
    apply(data, ["calibrate.data.1.source=x=y"])
    assert data == {"calibrate": {"data": [{"source": "a"}, {"source": "x=y"}]}}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("quant.bits", "must be key.path=value"),
        ("=3", "must be key.path=value"),
        ("quant.\udcff=3", "must be key.path=value"),
        ("quant..bits=3", "must be key.path=value"),
        ("quant.bits=[1", "line 1, column"),
        ("quant.bits.more=3", "quant.bits is a value, not a section"),
        ("list.2=3", "list is a list of 2; its items are numbered from 0"),
        ("list.first=3", "list is a list of 2"),
        ("list.-1=3", "list is a list of 2"),
    ],
)
def test_refusals(override: str, message: str) -> None:
    data: dict[str, Any] = {"quant": {"bits": 2}, "list": [1, 2]}
    keys, problems = apply(data, [override])
    assert keys == []
    assert len(problems) == 1
    assert problems[0].text.startswith(override)
    assert message in problems[0].text
    assert data == {"quant": {"bits": 2}, "list": [1, 2]}


def test_figures_that_are_expected_have_names_with_dots() -> None:
    data: dict[str, Any] = {"expect": {"wiki.kl": {"value": 1, "tolerance": 2}}}
    overrides = [
        "expect.wiki.kl.value=3",
        "expect.wiki.kl_99={value: 4}",
        "expect.wiki={value: 5}",
        "expect.wiki.value=6",
    ]
    _, problems = apply(data, overrides)
    assert problems == []
    assert data["expect"] == {
        "wiki.kl": {"value": 3, "tolerance": 2},
        "wiki.kl_99": {"value": 4},
        "wiki": {"value": 6},
    }
