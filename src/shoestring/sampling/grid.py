"""Many pictures as one: the grid that `sample` and previews save."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Picture = Image.Image | NDArray[np.uint8]


def grid(
    pictures: Sequence[Picture], columns: int | None = None, *, gap: int = 2, scale: int = 1
) -> Image.Image:
    """Pictures side by side, row by row, `gap` transparent pixels apart; RGBA, or RGB without a gap.

    `pictures` are PIL images or uint8 arrays (H, W, 3), all of one size, at least one. `columns` defaults to
    the least that makes the grid no higher than wide. `scale` repeats pixels, so that tiny pictures stay
    crisp.
    """
    images = [each if isinstance(each, Image.Image) else Image.fromarray(each) for each in pictures]
    sizes = {image.size for image in images}
    if len(sizes) != 1:
        raise ValueError(f"A grid needs at least one picture, all of one size; got sizes {sorted(sizes)}.")
    width, height = (scale * side for side in images[0].size)
    columns = columns or int(np.ceil(np.sqrt(len(images))))
    rows = -(-len(images) // columns)
    size = (columns * (width + gap) - gap, rows * (height + gap) - gap)
    full = gap == 0 and rows * columns == len(images)
    sheet = Image.new("RGB", size) if full else Image.new("RGBA", size, (0, 0, 0, 0))
    for k, image in enumerate(images):
        row, column = divmod(k, columns)
        big = image.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(big, (column * (width + gap), row * (height + gap)))
    return sheet
