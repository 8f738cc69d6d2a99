"""Reads a picture of a scene back into the scene: exact on rendered scenes, forgiving on generated ones.

    picture --hue of each pixel--> labels --4-connected--> blobs
       |                                                     | centre of mass, area
       +--share of object over background, per pixel----> compared with each shape drawn at that place and
                                                          area, sharp and softened: the closest one wins

A background has no hue, so an edge pixel, a mix of object and background, keeps the object's hue, and its
share of the object is a projection onto the line from background to colour. Blur keeps a blob's area and
centre, so shapes are judged by their form alone. What a person would not call one of the shapes, colours or
places is called `other`. Needs numpy only.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoestring.data.scenes import (
    AREA,
    BACKGROUNDS,
    CENTROID,
    COLOURS,
    SHAPES,
    Scene,
    SceneObject,
    coverage,
)

FACETS = ("shape", "colour", "place", "count", "background", "all")
OTHER = "other"

MIN_SHARE = 0.5  # a pixel belongs to an object when at least this much of it has the object's hue
MIN_AREA = 0.007  # smaller blobs are specks and ignored, as a share of the picture (7 pixels at 32 px)
LEAST_AREA = 1.0  # pixels that a blob counts as, at least: what surrounds it may weigh against it
MAX_RESIDUAL = 0.05  # a blob further than this from every shape is no shape (see _residuals)
MAX_HUE_ERROR = 22.0  # degrees between a blob's hue and its colour's; hues lie at least 55 apart
MAX_BACKGROUND_ERROR = 0.16  # distance of the background's lightness from white, grey or black
MAX_STAIN = 0.02  # share of the picture that may be neither object nor background
MIDDLE = 0.1  # an object this close to the picture's middle lines is in no cell
CLEAR_OFFSET = 0.08  # a relation holds from this offset on
NOISY = 0.04  # pictures whose noise is estimated above this are smoothed before blobs are sought

Array = NDArray[np.floating[Any]]
Integers = NDArray[np.int64]

_PALETTE = np.array(list(COLOURS.values()), dtype=np.float32) / 255
_CHROMA = _PALETTE - _PALETTE.mean(axis=1, keepdims=True)
_CHROMA_LENGTH = np.linalg.norm(_CHROMA, axis=1)
_HUES = (_CHROMA / _CHROMA_LENGTH[:, None]).T  # (3, colours)
_GREYS = {name: value[0] / 255 for name, value in BACKGROUNDS.items()}


@dataclass(frozen=True)
class Rejected:
    """A picture that is no scene at all, and why."""

    reason: str


def parse(image: NDArray[np.uint8], level: str) -> Scene | Rejected:
    """The scene in a picture, uint8 (H, H, 3) with H >= 32.

    `Rejected` where there is no plain background or more than six blobs. Shapes and colours that are none of
    the known ones are `other`. Relations are left out: `compare` finds them in the places.
    """
    picture = _shrunk(image)
    noise = _noise(picture)
    smooth = _smoothed(picture) if noise > NOISY else picture
    labels = _labels(smooth)
    blobs, areas = _blobs(labels)
    size = picture.shape[0]
    found = np.flatnonzero(areas >= MIN_AREA * size**2)
    if len(found) > 6:
        return Rejected(f"{len(found)} coloured blobs")
    if len(found) == 0:
        return Rejected("no coloured blob")
    masks = blobs == found[:, None, None]  # (N, size, size)
    empty = ~_grown(_grown((labels > 0)[None]))[0]
    if empty.mean() < 0.05:
        return Rejected("no background")
    ground = picture[empty].mean(axis=0)
    name, error = _background(ground)
    if error > MAX_BACKGROUND_ERROR:
        return Rejected(
            f"background {np.rint(ground * 255).astype(int).tolist()} is not white, grey or black"
        )
    stained = np.abs(smooth[empty] - ground).max(axis=1) > 2 * MAX_BACKGROUND_ERROR
    if stained.sum() > MAX_STAIN * size**2:
        return Rejected("something without a known hue on the background")
    colours = labels.reshape(-1)[masks.reshape(len(masks), -1).argmax(axis=1)] - 1
    return Scene(level, name, _objects(picture, ground, noise, masks, colours))


def compare(scene: Scene, parsed: Scene | Rejected) -> dict[str, bool]:
    """Which facets of `scene` the parsed picture shows: {shape, colour, place, count, background, all: bool}.

    count        as many objects as asked
    background   as asked
    shape        the count is right and every object has its shape (level `free`: and its size)
    colour       the count is right and every object has its colour
    place        the count is right and every object is in its cell (level `free`: every relation holds)
    all          all of these

    Objects are matched one to one, in the way that makes `all` true if any does, else in the way that gets
    the most shapes, colours and places right; so a facet does not suffer for an error in another one.
    """
    if isinstance(parsed, Rejected):
        return dict.fromkeys(FACETS, False)
    count = len(scene.objects) == len(parsed.objects)
    background = scene.background == parsed.background
    shape = colour = place = False
    if count:
        judge = _cells_right if scene.level == "cells" else _free_right
        tries = [judge(scene, match) for match in permutations(parsed.objects)]
        best = max(tries, key=lambda right: (np.all(right), np.sum(right)))
        shape, colour, place = (bool(each) for each in np.all(best, axis=0))
    facets = {"shape": shape, "colour": colour, "place": place, "count": count, "background": background}
    return facets | {"all": all(facets.values())}


def cell_of(x: float, y: float) -> str:
    """The cell a point lies in, or `other` near the picture's middle lines."""
    if min(abs(x - 0.5), abs(y - 0.5)) < MIDDLE:
        return OTHER
    return SceneObject("", "", x, y, 0).cell


def holds(relation: str, one: SceneObject, other: SceneObject) -> bool:
    """Whether `one` is clearly left of (right of, above, below) `other`."""
    offset = {
        "left of": other.x - one.x,
        "right of": one.x - other.x,
        "above": other.y - one.y,
        "below": one.y - other.y,
    }
    return offset[relation] >= CLEAR_OFFSET


def _cells_right(scene: Scene, match: tuple[SceneObject, ...]) -> list[tuple[bool, bool, bool]]:
    """(shape, colour, place) of each object against its match."""
    return [
        (one.shape == other.shape, one.colour == other.colour, one.cell == cell_of(other.x, other.y))
        for one, other in zip(scene.objects, match, strict=True)
    ]


def _free_right(scene: Scene, match: tuple[SceneObject, ...]) -> list[tuple[bool, bool, bool]]:
    right = [
        ((one.shape, one.size) == (other.shape, other.size), one.colour == other.colour)
        for one, other in zip(scene.objects, match, strict=True)
    ]
    wrong = {k for i, name, j in scene.relations if not holds(name, match[i], match[j]) for k in (i, j)}
    return [(shape, colour, k not in wrong) for k, (shape, colour) in enumerate(right)]


# --- blobs -----------------------------------------------------------------------------------------------


def _shrunk(image: NDArray[np.uint8]) -> Array:
    """The picture as float32 in [0, 1], halved until its side is below 128."""
    picture = image.astype(np.float32) / 255
    while picture.shape[0] >= 128 and picture.shape[0] % 2 == 0:
        size = picture.shape[0] // 2
        picture = picture.reshape(size, 2, size, 2, 3).mean(axis=(1, 3))
    return picture


def _smoothed(planes: Array) -> Array:
    """Weights 1 2 1 over 4 along the first two axes, edges repeated."""
    for _ in range(2):
        planes = np.concatenate([planes[:1], planes, planes[-1:]])
        planes = (planes[:-2] + 2 * planes[1:-1] + planes[2:]) / 4
        planes = planes.swapaxes(0, 1)
    return planes


def _noise(picture: Array) -> float:
    """Standard deviation of the noise of a pixel's channel, from second differences; 0 on a clean picture."""
    green = picture[:, :, 1]
    bend = green[:, :-2] - 2 * green[:, 1:-1] + green[:, 2:]  # variance 1 + 4 + 1 times the noise's
    return float(np.median(np.abs(bend)) * 1.4826 / 6**0.5)


def _labels(picture: Array) -> Integers:
    """0 for background, else 1 + the number of the colour whose hue is nearest: (size, size)."""
    chroma = picture - picture.mean(axis=2, keepdims=True)
    along = chroma @ _HUES  # (size, size, colours)
    nearest = along.argmax(axis=2)
    share = along.max(axis=2) / _CHROMA_LENGTH[nearest]
    labels: Integers = np.where(share >= MIN_SHARE, nearest + 1, 0)
    return labels


def _blobs(labels: Integers) -> tuple[Integers, Integers]:
    """4-connected areas of one label: their number at each pixel (-1: none), and the area of each.

    Runs along the rows are joined to the overlapping runs of the row above by union-find.
    """
    size = labels.shape[1] + 1  # one column of 0 between rows ends every run
    flat = np.pad(labels, ((0, 0), (0, 1))).reshape(-1)
    edge = np.flatnonzero(np.diff(flat, prepend=0))
    inside = flat[edge] > 0
    starts, stops = edge[inside], np.append(edge, len(flat))[1:][inside]
    parent = list(range(len(starts)))
    runs = list(zip(starts.tolist(), stops.tolist(), flat[starts].tolist(), strict=True))
    above = 0
    for k, (start, stop, label) in enumerate(runs):
        while runs[above][1] + size <= start:
            above += 1
        other = above
        while runs[other][0] + size < stop:
            if runs[other][2] == label:
                parent[_root(parent, k)] = _root(parent, other)
            other += 1
    roots, number = np.unique([_root(parent, k) for k in range(len(runs))], return_inverse=True)
    blobs = np.full(len(flat), -1, dtype=np.int64)
    lengths = stops - starts
    blobs[np.flatnonzero(flat)] = np.repeat(number, lengths)
    areas = np.bincount(number, weights=lengths, minlength=len(roots)).astype(np.int64)
    return blobs.reshape(-1, size)[:, :-1], areas


def _root(parent: list[int], k: int) -> int:
    while parent[k] != k:
        parent[k] = k = parent[parent[k]]
    return k


def _grown(masks: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Masks (N, size, size) grown by one pixel in all eight directions."""
    wide = masks.copy()
    wide[:, :, 1:] |= masks[:, :, :-1]
    wide[:, :, :-1] |= masks[:, :, 1:]
    grown = wide.copy()
    grown[:, 1:] |= wide[:, :-1]
    grown[:, :-1] |= wide[:, 1:]
    return grown


def _background(ground: Array) -> tuple[str, float]:
    """The nearest background and how far off it is, as the largest difference of a channel."""
    errors = {name: float(np.abs(ground - grey).max()) for name, grey in _GREYS.items()}
    name = min(errors, key=errors.__getitem__)
    return name, errors[name]


# --- objects ---------------------------------------------------------------------------------------------


def _objects(
    picture: Array, ground: Array, noise: float, masks: NDArray[np.bool_], colours: Integers
) -> tuple[SceneObject, ...]:
    """What each blob is, from the share of its colour in its own pixels and those around it."""
    size = picture.shape[0]
    near = _grown(masks)
    crowd = near.sum(axis=0)
    reach = _grown(near) & ((crowd - near) == 0)  # within 2 pixels, and not beside another blob
    paint = _PALETTE[colours] - ground  # (N, 3)
    share = np.einsum("hwc,nc->nhw", picture - ground, paint) / (paint**2).sum(axis=1)[:, None, None]
    share = np.where(reach, share, 0).astype(np.float32)
    area = np.maximum(share.sum(axis=(1, 2)), LEAST_AREA)
    points = np.arange(size) + 0.5
    centre = np.stack([share.sum(axis=1) @ points, share.sum(axis=2) @ points], axis=1) / area[:, None]
    centre = centre.clip(0, size)  # pixels of the opposite colour weigh less than nothing
    boxes = _boxes(area, centre)  # (N, shapes, 3)
    expected = noise**2 / (paint**2).sum(axis=1) * reach.sum(axis=(1, 2)) / area  # what noise adds
    residuals = _residuals(share, area, centre, boxes) - expected[:, None]
    hue_errors = _hue_errors(picture, masks, colours)
    objects = []
    for k, colour in enumerate(colours):
        best = int(residuals[k].argmin())
        x, y, radius = (boxes[k, best] / size).tolist()
        objects.append(
            SceneObject(
                shape=SHAPES[best] if residuals[k, best] <= MAX_RESIDUAL else OTHER,
                colour=list(COLOURS)[colour] if hue_errors[k] <= MAX_HUE_ERROR else OTHER,
                x=x,
                y=y,
                radius=radius,
            )
        )
    return tuple(objects)


def _boxes(area: Array, centre: NDArray[Any]) -> NDArray[np.float64]:
    """x, y, radius that give each shape the blobs' area and centre of mass: (N, shapes, 3) in pixels."""
    radius = np.sqrt(area[:, None] / np.array([AREA[shape] for shape in SHAPES]))
    down = radius * np.array([CENTROID[shape] for shape in SHAPES])
    x = np.broadcast_to(centre[:, 0, None], radius.shape)
    return np.stack([x, centre[:, 1, None] - down, radius], axis=-1)


def _residuals(share: Array, area: Array, centre: NDArray[Any], boxes: NDArray[np.float64]) -> Array:
    """Distance of each blob from each shape, (N, shapes): sum of squared differences over the blob's area.

    The least over the shape drawn sharp, softened once and softened four times. Rendered scenes stay under
    0.01 from the true shape and above 0.03 from the others; a diamond is 0.063 from the nearest, an ellipse
    of axes 10:7 is 0.09, a half circle or a rectangle of 2:1 0.2.
    """
    blobs, shapes = boxes.shape[:2]
    side = 2 * int(np.ceil(boxes[:, :, 2].max())) + 6
    corner = np.rint(centre - side / 2).astype(np.int64)
    drawn = coverage(
        np.tile(np.arange(shapes), blobs),
        boxes.reshape(-1, 3),
        np.repeat(corner, shapes, axis=0),
        side,
        lines=4,
    )
    pad = side
    padded = np.pad(share, ((0, 0), (pad, pad), (pad, pad)))
    window = np.stack(
        [each[y : y + side, x : x + side] for each, (x, y) in zip(padded, corner + pad, strict=True)]
    )
    planes = drawn.transpose(1, 2, 0)
    residuals = []
    for passes in (0, 1, 3):
        for _ in range(passes):
            planes = _smoothed(planes)
        forms = planes.transpose(2, 0, 1).reshape(blobs, shapes, side, side)
        residuals.append(((window[:, None] - forms) ** 2).sum(axis=(2, 3)) / area[:, None])
    least: Array = np.min(residuals, axis=0)
    return least


def _hue_errors(picture: Array, masks: NDArray[np.bool_], colours: Integers) -> Array:
    """Degrees between the mean hue of each blob and its colour's."""
    mean = np.einsum("hwc,nhw->nc", picture, masks) / masks.sum(axis=(1, 2))[:, None]
    chroma = mean - mean.mean(axis=1, keepdims=True)
    cosine = np.einsum("nc,cn->n", chroma, _HUES[:, colours]) / np.linalg.norm(chroma, axis=1)
    degrees: Array = np.degrees(np.arccos(np.clip(cosine, -1, 1)))
    return degrees
