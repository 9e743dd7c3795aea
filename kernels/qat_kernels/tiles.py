"""Tile sizes of the Triton kernels, as pure functions of the shape.

There is no `@triton.autotune`: timing candidates needs a GPU, which would break the interpreter tests, and it would
make the same run take different kernels. The kernels here are bound by memory traffic and have no matrix product in
them, which leaves little to tune.
"""

TILE = 2048
"""Weights a program holds at a time: 16 per thread with Triton's default of 4 warps."""


def group_tile(group_size: int) -> tuple[int, int]:
    """(groups per program, columns of a group per step), powers of two, for kernels that reduce over groups.

    Groups longer than a tile are walked in steps, one group per program.
    """
    columns = min(next_power_of_two(group_size), TILE)
    return TILE // columns, columns


def row_tile(length: int) -> int:
    """Columns per program for kernels that work along rows of this length."""
    return min(next_power_of_two(length), TILE // 2)


def next_power_of_two(number: int) -> int:
    """The smallest power of two that is at least number (at least 1)."""
    return 1 << max(0, number - 1).bit_length()
