"""Tile sizes: powers of two that cover a group or a row without exceeding a program's share."""

from __future__ import annotations

import pytest

from qat_kernels import tiles


@pytest.mark.parametrize("group_size", [1, 24, 32, 64, 96, 128, 2048, 2100, 11008])
def test_group_tile_fills_a_program(group_size: int) -> None:
    groups, columns = tiles.group_tile(group_size)
    assert groups * columns == tiles.TILE
    assert groups & (groups - 1) == 0
    assert columns == tiles.TILE or group_size <= columns < 2 * group_size


@pytest.mark.parametrize(("length", "columns"), [(1, 1), (3, 4), (576, 1024), (11008, 1024)])
def test_row_tile(length: int, columns: int) -> None:
    assert tiles.row_tile(length) == columns
