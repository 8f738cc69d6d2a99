"""From an encoded file to a square picture: decode, centre crop, resize with antialias.

Pillow does it in one pass on 8-bit values, without a tensor in between: its bicubic filter widens with the
reduction (antialias) as torch's does, and the two differ by rounding alone.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

Pixels = NDArray[np.uint8]
_SIDES = re.compile(
    r"\b(left|right|leftmost|rightmost|leftward|rightward|lefthand|righthand)s?\b", re.IGNORECASE
)


class BadImage(Exception):
    """An image that cannot be used; the message is the reason it is counted under."""


@dataclass(frozen=True)
class Prepared:
    """One image at every size asked for.

    `size_crop` = (original height, original width, crop top, crop left, target height, target width) for
    the largest size, the crop in pixels of the resized image: what SDXL is told of its training images
    (arXiv 2307.01952, section 2.2). A mirrored picture has the same: of a centre crop both sides are alike.
    """

    pictures: dict[int, Pixels]  # size -> (size, size, 3)
    size_crop: tuple[int, int, int, int, int, int]


def prepare(image: bytes | Pixels, sizes: Iterable[int], upscale: bool = False) -> Prepared:
    """The centre square of an image at each size; raises `BadImage` for one that is damaged or too small."""
    sizes = sorted(sizes)
    if isinstance(image, np.ndarray):
        height, width = image.shape[:2]
        picture = None if height == width == sizes[0] == sizes[-1] else Image.fromarray(image)
        if picture is None:  # already as asked: nothing to decode
            return Prepared({width: image}, (height, width, 0, 0, height, width))
    else:
        picture = decode(image)
        width, height = picture.size
    side, largest = min(width, height), sizes[-1]
    if side < largest and not upscale:
        raise BadImage("too small")
    left, top = (width - side) // 2, (height - side) // 2
    box = (left, top, left + side, top + side)
    pictures = {size: np.asarray(_resized(picture, size, box)) for size in sizes}
    return Prepared(pictures, (height, width, *crop_corner(height, width, largest), largest, largest))


def crop_corner(height: int, width: int, size: int) -> tuple[int, int]:
    """Top and left of the centre square in an image resized so that its shorter side is `size`."""
    side = min(height, width)
    return round((height - side) // 2 * size / side), round((width - side) // 2 * size / side)


def original_size(image: bytes | Pixels) -> tuple[int, int]:
    """Height and width of an image as it stands upright, from its header; raises `BadImage`."""
    if isinstance(image, np.ndarray):
        return image.shape[0], image.shape[1]
    try:
        picture = Image.open(io.BytesIO(image))
        width, height = picture.size
        turned = picture.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        turned &= picture.format != "TIFF"  # whose size Pillow tells upright
    except Exception as error:  # as in `decode`
        raise BadImage("unreadable image") from error
    return (width, height) if turned else (height, width)


def decode(data: bytes) -> Image.Image:
    """An encoded image as RGB, upright, on white where it is transparent; raises `BadImage`."""
    try:
        picture = Image.open(io.BytesIO(data))
        picture.load()
        return _rgb(ImageOps.exif_transpose(picture))
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise BadImage("unreadable image") from None
    except Image.DecompressionBombError:
        raise BadImage("image too large") from None
    except Exception as error:  # damaged files raise nearly anything from Pillow's many readers
        raise BadImage("truncated image" if "truncated" in str(error) else "unreadable image") from error


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """Pillow warns of odd metadata; only failures count.

    To be entered by one thread around all that decode: Python's warning filters are shared by all of them.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def mirrored(pixels: Pixels) -> Pixels:
    """A picture, left and right swapped."""
    return np.ascontiguousarray(pixels[:, ::-1])


def says_side(captions: Iterable[str]) -> bool:
    """True where a caption says left or right as a whole word, so that a mirrored picture would belie it."""
    return any(_SIDES.search(caption) for caption in captions)


def _resized(picture: Image.Image, size: int, box: tuple[int, int, int, int]) -> Image.Image:
    if box == (0, 0, size, size) and picture.size == (size, size):
        return picture
    return picture.resize((size, size), Image.Resampling.BICUBIC, box=box)


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # 16 bits a grey value, which `convert` would cut off at 255
        grey = np.asarray(picture)
        if grey.min() < 0 or grey.max() > 0xFFFF:
            raise BadImage("more than 16 bits a value")
        return Image.fromarray((grey >> 8).astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:  # a file without alpha may name a colour that stands for it
        layer = picture.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    if picture.mode == "F":
        raise BadImage("more than 16 bits a value")
    return picture if picture.mode == "RGB" else picture.convert("RGB")
