"""A grid holds every picture, unchanged, in reading order."""

import numpy as np
import pytest
from PIL import Image

from shoestring.sampling.grid import grid


def pictures(count: int) -> list[np.ndarray]:
    return [np.full((4, 6, 3), 10 * k, np.uint8) for k in range(count)]


def test_pictures_stand_in_reading_order() -> None:
    sheet = np.asarray(grid(pictures(5), columns=3, gap=2))
    assert sheet.shape == (4 + 2 + 4, 6 + 2 + 6 + 2 + 6, 4)
    assert (sheet[0:4, 8:14, :3] == 10).all()
    assert (sheet[6:10, 0:6, :3] == 30).all()
    assert (sheet[6:10, 16:22, 3] == 0).all(), "the place without a picture is transparent"


def test_scale_repeats_pixels_and_a_full_grid_without_gap_is_rgb() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (3, 3, 3)).astype(np.uint8)
    sheet = grid([picture, Image.fromarray(picture)], columns=2, gap=0, scale=2)
    assert sheet.mode == "RGB"
    doubled = picture.repeat(2, axis=0).repeat(2, axis=1)
    np.testing.assert_array_equal(np.asarray(sheet), np.concatenate([doubled, doubled], axis=1))


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (4, 2), (5, 3), (16, 4)])
def test_a_grid_is_at_least_as_many_pictures_wide_as_high(count: int, columns: int) -> None:
    assert grid(pictures(count), gap=0).width == 6 * columns


def test_pictures_of_two_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="all of one size"):
        grid([np.zeros((4, 4, 3), np.uint8), np.zeros((5, 4, 3), np.uint8)])
