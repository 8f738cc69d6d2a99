"""Sizes of pictures that a network can take: multiples of a number, and the nearest of them."""

from __future__ import annotations

from shoestring.errors import RecipeError


def nearest_sides(side: int, multiple: int) -> list[int]:
    """The positive multiples at or around `side`, one or two, the nearer first."""
    low = max(side // multiple, 0) * multiple
    if side == low and low > 0:
        return [side]
    around = [each for each in (low, low + multiple) if each > 0]
    return sorted(around, key=lambda each: abs(each - side))


def nearest_sizes(height: int, width: int, multiple: int) -> list[tuple[int, int]]:
    """The valid (height, width) at or around a given one, the nearest first: one, two or four of them."""
    sizes = [
        (row, column) for row in nearest_sides(height, multiple) for column in nearest_sides(width, multiple)
    ]
    return sorted(sizes, key=lambda size: abs(size[0] - height) + abs(size[1] - width))


def check_size(height: int, width: int, multiple: int) -> None:
    """Raise `RecipeError`, naming the nearest sides, unless both are positive multiples of `multiple`."""
    for side in (height, width):
        near = nearest_sides(side, multiple)
        if near != [side]:
            raise RecipeError(
                f"height x width {height} x {width}: both must be multiples of {multiple}; "
                f"nearest to {side}: {' or '.join(map(str, sorted(near)))}."
            )
