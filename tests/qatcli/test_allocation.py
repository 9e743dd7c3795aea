"""The allocation of bits against the best of all."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qatcli.allocation import Part, allocate

Parts = st.lists(st.tuples(st.integers(1, 9), st.floats(1e-6, 10)), min_size=1, max_size=6)


def parts_of(sizes: list[tuple[int, float]], choices: tuple[int, ...]) -> list[Part]:
    """Parts whose divergence falls fourfold with every bit, as that of rounding does."""
    return [
        Part((f"a{index}", f"b{index}"), weights, {bits: cost * 4.0**-bits for bits in choices})
        for index, (weights, cost) in enumerate(sizes)
    ]


@given(sizes=Parts, average=st.floats(2, 4), choices=st.sampled_from([(2, 3, 4), (4, 2), (2, 4, 8)]))
def test_the_mean_is_kept_and_no_part_could_be_raised(
    sizes: list[tuple[int, float]], average: float, choices: tuple[int, ...]
) -> None:
    parts = parts_of(sizes, choices)
    bits = allocate(parts, choices=choices, average=average)
    total = sum(part.weights for part in parts)
    used = sum(bits[part.names[0]] * part.weights for part in parts)
    assert used <= average * total + 1e-9
    for part in parts:
        assert len({bits[name] for name in part.names}) == 1
        higher = [choice for choice in choices if choice > bits[part.names[0]]]
        if higher:
            assert used + (min(higher) - bits[part.names[0]]) * part.weights > average * total - 1e-9


@given(costs=st.lists(st.floats(1e-6, 10), min_size=1, max_size=5), quarters=st.integers(8, 16))
def test_parts_of_one_size_get_the_least_sum_of_divergences(costs: list[float], quarters: int) -> None:
    """With equal sizes nothing is left over, and the greedy choice is the best of all."""
    choices, average = (2, 3, 4), quarters / 4
    parts = parts_of([(1, cost) for cost in costs], choices)
    bits = allocate(parts, choices=choices, average=average)
    found = sum(part.divergence[bits[part.names[0]]] for part in parts)
    fitting = (c for c in product(choices, repeat=len(parts)) if sum(c) <= average * len(parts) + 1e-9)
    best = min(sum(part.divergence[b] for part, b in zip(parts, c, strict=True)) for c in fitting)
    assert found == pytest.approx(best, rel=1e-9)


def test_one_choice_is_given_to_all_and_too_small_a_mean_is_refused() -> None:
    parts = parts_of([(1, 1.0), (2, 1.0)], (3,))
    assert set(allocate(parts, choices=(3, 3), average=3).values()) == {3}
    with pytest.raises(ValueError, match="no choice"):
        allocate(parts, choices=(3,), average=2.9)
