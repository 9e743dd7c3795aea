"""Tile sizes that follow from the shape alone. Those worth timing are in `candidates`."""

SMALLEST_COLUMNS = 8
"""Fewest columns of a step along a group: 32 bytes of fp32, the unit of a memory access."""

ROW_TILE = 1024
"""Columns per program of the kernels that only move codes."""


def group_tile(group_size: int, elements: int) -> tuple[int, int]:
    """(groups per program, columns of a group per step), powers of two with a product of elements.

    A group that is no power of two is walked in steps that leave few lanes idle: the longest step that wastes at most
    a twentieth, else the one that wastes least (groups of 96 take steps of 32, rows of 11008 steps of 1024).
    """
    longest = min(next_power_of_two(group_size), elements)
    steps = [longest]
    while steps[-1] > SMALLEST_COLUMNS:
        steps.append(steps[-1] // 2)

    def waste(columns: int) -> float:
        return -(-group_size // columns) * columns / group_size - 1

    columns = next((columns for columns in steps if waste(columns) <= 0.05), min(steps, key=waste))
    return elements // columns, columns


def row_tile(length: int) -> int:
    """Columns per program for kernels that work along rows of this length."""
    return min(next_power_of_two(length), ROW_TILE)


def next_power_of_two(number: int) -> int:
    """The smallest power of two that is at least number (at least 1)."""
    return 1 << max(0, number - 1).bit_length()
