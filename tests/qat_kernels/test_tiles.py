"""Tile sizes: powers of two that cover a group or a row without exceeding a program's share."""

from __future__ import annotations

import pytest

from qat_kernels import tiles


@pytest.mark.parametrize(
    ("group_size", "columns"),
    [(1, 1), (24, 8), (32, 32), (64, 64), (96, 32), (100, 8), (128, 128), (2048, 2048), (2100, 128), (11008, 1024)],
)
def test_group_tile_leaves_few_lanes_idle(group_size: int, columns: int) -> None:
    assert tiles.group_tile(group_size, 2048) == (2048 // columns, columns)


def test_group_tile_keeps_to_its_share_and_to_powers_of_two() -> None:
    wasteful = []
    for group_size in range(1, 3000):
        groups, columns = tiles.group_tile(group_size, 1024)
        assert groups * columns == 1024
        assert columns & (columns - 1) == 0
        steps = -(-group_size // columns)
        assert (steps - 1) * columns < group_size
        if steps * columns > 1.05 * group_size:
            wasteful.append(group_size)
    assert max(wasteful) < 160  # steps of 8 columns waste at most 7 of them


@pytest.mark.parametrize(("length", "columns"), [(1, 1), (3, 4), (576, 1024), (11008, 1024)])
def test_row_tile(length: int, columns: int) -> None:
    assert tiles.row_tile(length) == columns
