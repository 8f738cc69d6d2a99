"""Sizes that a Würstchen cascade can make: pictures, Stage C's cells and Stage B's cells.

A cell of Stage C covers 42.67 px (32 of the compressor's, which sees pictures at 3/4 of their size), so its
grid is whole at multiples of 128 px; Stage B's levels halve its grid of 4 px cells further. The published
code rounds up and truncates instead, and fails or makes another size at all others.
"""

from __future__ import annotations

import logging
import math

RESOLUTIONS = ("refuse", "round")
_NEARLY = 0.05  # of a cell: published scales are rounded, 42.67 for 128 / 3 and 10.67 for 32 / 3

logger = logging.getLogger(__name__)


def whole_multiple(cell: float) -> int:
    """The smallest side in pixels that is a whole number of cells: 42.67 -> 128, 64 / 3 -> 64, 8 -> 8."""
    for count in range(1, 17):
        side = count * cell
        if abs(side - round(side)) <= _NEARLY and round(side):
            return round(side)
    return math.ceil(cell)


def cells(side: float, cell: float) -> int:
    """Cells of size `cell` that cover a side: ceil, but for what rounding of `cell` adds."""
    return max(1, math.ceil(side / cell - _NEARLY))


def scaled_cells(count: int, scale: float) -> int:
    """Stage B's cells along a side of `count` cells of Stage C: 24 cells x 10.67 -> 256."""
    return int(count * scale + _NEARLY)


def fit_size(height: int, width: int, multiple: int, resolution: str = "refuse") -> tuple[int, int]:
    """The size to make when `height` x `width` px is asked for.

    `resolution` says what becomes of a side that is no multiple of `multiple`: "refuse" raises `ValueError`
    with the nearest ones, "round" takes the nearest (of two, the larger) and says so in the log.
    """
    if resolution not in RESOLUTIONS:
        raise ValueError(f"resolution {resolution!r}: unknown. Use {' or '.join(RESOLUTIONS)}.")
    wrong = {
        name: side
        for name, side in (("height", height), ("width", width))
        if side != int(side) or side % multiple or side < multiple
    }
    if not wrong:
        return int(height), int(width)
    if resolution == "refuse":
        nearest = ", ".join(f"{name} {_neighbours(side, multiple)}" for name, side in wrong.items())
        raise ValueError(
            f"height x width {height} x {width}: both must be multiples of {multiple}; nearest: {nearest}. "
            "Or give resolution='round'."
        )
    rows, columns = nearest_side(height, multiple), nearest_side(width, multiple)
    logger.warning(
        "height x width %s x %s: made at %s x %s (multiples of %s).", height, width, rows, columns, multiple
    )
    return rows, columns


def nearest_side(side: float, multiple: int) -> int:
    """The multiple nearest to a side in pixels, at least one; of two, the larger."""
    return max(1, math.floor(side / multiple + 0.5)) * multiple


def _neighbours(side: float, multiple: int) -> str:
    below = math.floor(side / multiple) * multiple
    return f"{below} or {below + multiple}" if below >= multiple else str(multiple)
