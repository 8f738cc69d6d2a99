"""Pictures come out square, upright, opaque and antialiased, or say why not."""

from __future__ import annotations

import io
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from shoestring.data.transforms import (
    BadImage,
    crop_corner,
    decode,
    mirrored,
    original_size,
    prepare,
    quiet_pillow,
    says_side,
)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def smooth(width: int, height: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    y, x = np.mgrid[:height, :width]
    waves = [127 + 120 * np.sin(x / 9 + c) * np.cos(y / 7 - c) for c in range(3)]
    return np.stack(waves, axis=-1).astype(np.uint8)


@pytest.mark.parametrize(
    ("width", "height", "size"), [(64, 64, 32), (90, 60, 32), (50, 131, 16), (32, 32, 32)]
)
def test_resizing_agrees_with_torch(width: int, height: int, size: int) -> None:
    """Centre crop and torch's bicubic with antialias, to two roundings to 8 bits."""
    pixels = smooth(width, height)
    side = min(width, height)
    top, left = (height - side) // 2, (width - side) // 2
    square = (
        torch.from_numpy(pixels[top : top + side, left : left + side].copy()).permute(2, 0, 1)[None].float()
    )
    expected = torch.nn.functional.interpolate(square, (size, size), mode="bicubic", antialias=True)
    ours = prepare(pixels, [size]).pictures[size]
    theirs = expected[0].clamp(0, 255).permute(1, 2, 0).numpy()
    assert np.abs(ours - theirs).max() <= 2


def test_fine_stripes_become_grey_and_not_other_stripes() -> None:
    """Without antialias, every fourth of black and white columns would come out all black or all white."""
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    small = prepare(stripes, [16]).pictures[16]
    assert np.abs(small[:, 2:-2].astype(int) - 127).max() < 10


def test_several_sizes_come_from_the_original() -> None:
    pixels = smooth(128, 128)
    both = prepare(pixels, [32, 64]).pictures
    assert np.array_equal(both[32], prepare(pixels, [32]).pictures[32])
    assert np.array_equal(both[64], prepare(pixels, [64]).pictures[64])


def test_size_and_crop_are_what_sdxl_is_told() -> None:
    """Original size; the crop in pixels of the picture resized so that its short side is the target."""
    assert prepare(smooth(100, 60), [30]).size_crop == (60, 100, 0, 10, 30, 30)
    assert prepare(smooth(40, 80), [16, 20]).size_crop == (80, 40, 10, 0, 20, 20)


@pytest.mark.parametrize("turned", [False, True])
def test_sdxl_ids_are_those_of_diffusers_training_script_plain_and_mirrored(turned: bool) -> None:
    """Its `--center_crop` and `--random_flip`: short side to `size`, mirrored, cropped at round(rest / 2).

    Within the pixel that rounding the long side first may shift it by.
    """
    generator = np.random.default_rng(0)
    for _ in range(300):
        height, width = (int(side) for side in generator.integers(64, 3000, 2))
        size = int(generator.integers(1, min(height, width) // 8 + 1)) * 8
        scale = size / min(height, width)
        resized = int(height * scale), int(width * scale)
        expected = [round((side - size) / 2) for side in resized]
        top, left = crop_corner(height, width, size)
        if turned:
            left = resized[1] - size - left  # from the other side
        assert abs(top - expected[0]) <= 1
        assert abs(left - expected[1]) <= 1
        assert min(top, left) >= -1


def test_the_crop_of_the_ids_is_the_crop_of_the_picture() -> None:
    """The resized whole, cut at top and left of the ids, is the stored picture but for its filtered rim."""
    for width, height, size in ((300, 100, 50), (64, 160, 32)):
        whole = Image.fromarray(smooth(width, height))
        prepared = prepare(np.asarray(whole), [size])
        _, _, top, left, *target = prepared.size_crop
        scale = size / min(width, height)
        resized = whole.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)
        cut = np.asarray(resized)[top : top + size, left : left + size].astype(int)
        assert target == [size, size]
        assert np.abs(cut - prepared.pictures[size])[3:-3, 3:-3].max() <= 1


def test_a_picture_of_the_right_size_is_untouched() -> None:
    pixels = smooth(16, 16)
    assert prepare(pixels, [16]).pictures[16] is pixels
    assert np.array_equal(prepare(encoded(Image.fromarray(pixels)), [16]).pictures[16], pixels)


def test_too_small_is_refused_unless_enlarging_is_asked_for() -> None:
    with pytest.raises(BadImage, match="too small"):
        prepare(smooth(31, 100), [32])
    assert prepare(smooth(31, 100), [32], upscale=True).pictures[32].shape == (32, 32, 3)


def test_transparent_is_white() -> None:
    layer = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    layer.putpixel((1, 0), (255, 0, 0, 255))
    assert np.asarray(decode(encoded(layer))).tolist() == [[[255, 255, 255], [255, 0, 0]]]


def test_palette_grey_and_cmyk_become_rgb() -> None:
    red = Image.new("RGB", (4, 4), (255, 0, 0))
    assert np.asarray(decode(encoded(red.quantize(4))))[0, 0].tolist() == [255, 0, 0]
    assert np.asarray(decode(encoded(Image.new("L", (4, 4), 77))))[0, 0].tolist() == [77, 77, 77]
    assert decode(encoded(red.convert("CMYK"), "JPEG")).mode == "RGB"


@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
def test_a_colour_named_transparent_is_white(mode: str) -> None:
    """A file without an alpha channel may name a colour that stands for transparent."""
    picture = Image.new("RGB", (2, 1), (255, 0, 0))
    picture.putpixel((1, 0), (0, 0, 255))
    picture = picture.quantize(2) if mode == "P" else picture.convert(mode)
    kept = np.asarray(picture.convert("RGB"))[0, 0].tolist()
    data = encoded(picture, transparency=picture.getpixel((1, 0)))
    assert np.asarray(decode(data))[0].tolist() == [kept, [255, 255, 255]]


def test_sixteen_bit_grey_keeps_its_range() -> None:
    values = np.array([[0, 0x8000, 0xFFFF]], dtype=np.uint16)
    files = {
        "png": encoded(Image.fromarray(values)),
        "little-endian tiff": encoded(Image.fromarray(values), "TIFF"),
        "32-bit tiff": encoded(Image.fromarray(values.astype(np.int32)), "TIFF"),
        "pgm": b"P5 3 1 65535\n" + values.astype(">u2").tobytes(),
    }
    for name, data in files.items():
        assert np.asarray(decode(data))[0, :, 0].tolist() == [0, 128, 255], name


def test_values_of_unknown_range_are_refused() -> None:
    """Pillow would make a float picture black, and larger whole numbers white."""
    for values in (np.full((4, 4), 0.5, np.float32), np.full((4, 4), 2**20, np.int32)):
        with pytest.raises(BadImage, match=r"^more than 16 bits a value$"):
            decode(encoded(Image.fromarray(values), "TIFF"))


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_picture_is_taken(form: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if form == "WEBP" else {}
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)
    assert np.asarray(decode(data))[4, 4].tolist() == [255, 0, 0]


def test_broken_metadata_does_not_cost_a_picture() -> None:
    """Nor does Pillow's complaint about it reach the console from any of the threads that decode."""
    picture = Image.fromarray(smooth(32, 32))
    broken = b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12"
    files = [encoded(picture, "JPEG", exif=broken) for _ in range(64)]
    before = list(warnings.filters)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        with ThreadPoolExecutor(8) as pool, quiet_pillow():
            decoded = list(pool.map(decode, files))
        assert not heard
        decode(files[0])
        assert heard, "outside, Pillow may say what it likes"
    assert {each.size for each in decoded} == {(32, 32)}
    assert warnings.filters == before


def test_a_turned_photo_is_set_upright() -> None:
    image = Image.fromarray(smooth(8, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    assert decode(encoded(image, "JPEG", exif=exif)).size == (4, 8)


@pytest.mark.parametrize("orientation", [None, *range(1, 9)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_the_header_tells_the_upright_size(kind: str, orientation: int | None) -> None:
    """As decoding the whole picture does."""
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    data = encoded(Image.fromarray(smooth(8, 4)), kind, exif=exif)
    width, height = decode(data).size
    assert original_size(data) == (height, width)
    assert original_size(smooth(8, 4)) == (4, 8)
    with pytest.raises(BadImage, match="unreadable image"):
        original_size(data[:3])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "unreadable image"),
        (b"not an image", "unreadable image"),
        (encoded(Image.fromarray(smooth(64, 64)))[:2000], "truncated image"),
        (encoded(Image.fromarray(smooth(64, 64)), "JPEG")[:900], "truncated image"),
    ],
)
def test_damaged_files_are_named(data: bytes, reason: str) -> None:
    with pytest.raises(BadImage, match=f"^{reason}$"):
        decode(data)


def test_an_image_of_absurd_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(BadImage, match="too large"):
        decode(encoded(Image.new("RGB", (30, 30))))


@pytest.mark.parametrize(
    ("caption", "says"),
    [
        ("a cat on the Left", True),
        ("right-handed bat", True),
        ("bright leftovers", False),
        ("a copyright sign", False),
        ("top left: a red circle", True),
    ],
)
def test_sides_are_whole_words(caption: str, says: bool) -> None:
    assert says_side(["a dog", caption]) is says


def test_mirroring_swaps_left_and_right() -> None:
    pixels = smooth(5, 3)
    assert np.array_equal(mirrored(pixels), pixels[:, ::-1])
    assert mirrored(pixels).flags.c_contiguous
