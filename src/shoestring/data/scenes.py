"""Procedural captioned pictures whose content is known exactly (docs/scenes.md).

    row number --keyed draws--> Scene --render--> uint8 (size, size, 3)
                                  |----captions--> "a red circle in the top left on a white background"

Everything is a function of (seed, row): no file, no state. Needs numpy only. Lengths are shares of the
picture's side, x to the right and y down; backgrounds have no hue, so that a mix of object and background
along an edge keeps the object's hue.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoestring.errors import SourceError

LEVELS = ("cells", "free")
SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (225, 40, 40),
    "yellow": (230, 215, 30),
    "green": (35, 180, 50),
    "cyan": (25, 200, 205),
    "blue": (50, 55, 235),
    "magenta": (215, 40, 210),
}
BACKGROUNDS = {"white": (255, 255, 255), "grey": (128, 128, 128), "black": (0, 0, 0)}
CELLS = ("top left", "top right", "bottom left", "bottom right")
SIZES = ("small", "large")
RELATIONS = ("left of", "right of", "above", "below")
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
SPLITS = ("train", "unseen_scenes", "unseen_pairs")

UNSEEN_PAIRS = frozenset(
    {("circle", "yellow"), ("square", "magenta"), ("triangle", "blue"), ("cross", "green")}
)
"""The 4 of 24 (shape, colour) pairs that no scene of `train` or `unseen_scenes` holds."""

OBJECT_COUNTS = (1, 2, 2, 3, 3)  # a scene's number of objects is drawn from these
CELL_RADIUS = (0.155, 0.178)  # half the side of an object's box: at 32 px, boxes of 10 to 11.4 px
CELL_JITTER = 0.05  # how far a centre may lie from its cell's; neighbours stay 1.4 px apart at 32 px
FREE_RADIUS = {"small": (0.100, 0.115), "large": (0.160, 0.185)}
SIZE_LIMIT = 0.1375  # objects of a smaller radius are "small"
FREE_GAP = 0.06  # least distance between the boxes of two objects, and half of it to the picture's edge
FREE_OFFSET = 0.25  # a relation is told when the offset along its axis is at least this ...
FREE_SLANT = 1.3  # ... and this many times the offset along the other axis

AREA = {"circle": math.pi, "square": 3.0976, "triangle": 1.9, "cross": 2.3616}
"""Area of each shape in units of its radius squared."""
CENTROID = {"circle": 0.0, "square": 0.0, "triangle": 0.8 / 3, "cross": 0.0}
"""How far below the middle of its box (y = 0) each shape's centre of mass lies, in radii."""

Image = NDArray[np.uint8]
_GOLDEN, _MASK = 0x9E3779B97F4A7C15, 0xFFFFFFFFFFFFFFFF


@dataclass(frozen=True)
class SceneObject:
    """One object: `x`, `y` the middle of its box, `radius` half the box's side, in shares of the picture."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float

    @property
    def cell(self) -> str:
        """The quarter of the picture that holds the object's middle."""
        return CELLS[2 * (self.y >= 0.5) + (self.x >= 0.5)]

    @property
    def size(self) -> str:
        """`small` or `large`: what captions of level `free` call it."""
        return SIZES[self.radius >= SIZE_LIMIT]


@dataclass(frozen=True)
class Scene:
    """A picture's content. `relations` (level `free`) are what its captions say of places.

    A relation (i, name, j) reads "object i is <name> object j".
    """

    level: str
    background: str
    objects: tuple[SceneObject, ...]
    relations: tuple[tuple[int, str, int], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """A JSON value that `from_json` turns back into an equal scene."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Scene:
        """The scene that `to_json` wrote."""
        return cls(
            value["level"],
            value["background"],
            tuple(SceneObject(**each) for each in value["objects"]),
            tuple((int(i), str(name), int(j)) for i, name, j in value["relations"]),
        )


# --- pictures --------------------------------------------------------------------------------------------


def half_width(shape: NDArray[np.int64], y: NDArray[np.float32]) -> NDArray[np.float32]:
    """Half the width of each shape at height `y`, both in radii; negative outside. Broadcasts.

    All four shapes are symmetric about x = 0, so a shape is its half-width as a function of y:
    circle sqrt(1 - y^2); square 0.88; triangle from its tip (y = -1) to its base (y = 0.9) by (y + 1) / 1.9;
    cross 1 within its bar (|y| < 0.36), else 0.36.
    """
    height = np.abs(y)
    circle = np.sqrt(np.maximum(1 - y * y, 0))
    square = np.where(height < 0.88, np.float32(0.88), np.float32(-1))
    triangle = np.where((y > -1) & (y < 0.9), (y + 1) * np.float32(1 / 1.9), np.float32(-1))
    cross = np.where(height < 0.36, np.float32(1), np.float32(0.36))
    cross = np.where(height < 1, cross, np.float32(-1))
    width: NDArray[np.float32] = np.choose(shape, (circle, square, triangle, cross))
    return width


def coverage(
    shape: NDArray[np.int64],
    box: NDArray[np.float64],
    corner: NDArray[np.int64],
    side: int,
    lines: int = 8,
) -> NDArray[np.float32]:
    """How much of each pixel N objects cover, in square windows of `side` pixels: (N, side, side) in [0, 1].

    `box` (N, 3) holds each object's x, y and radius, `corner` (N, 2) its window's first column and row, all
    in pixels. Exact along x, the mean of `lines` thin lines a pixel along y.
    """
    x, y = (box[:, :2] - corner).astype(np.float32).T
    radius = box[:, 2, None].astype(np.float32)
    heights = (np.arange(side * lines, dtype=np.float32) + 0.5) / lines - y[:, None]
    width = half_width(shape[:, None], heights / radius) * radius  # (N, side * lines)
    columns = np.arange(side, dtype=np.float32) - x[:, None]  # (N, side)
    spans = np.minimum(columns[:, None, :] + 1, width[:, :, None])
    spans -= np.maximum(columns[:, None, :], -width[:, :, None])
    np.clip(spans, 0, 1, out=spans)
    covered: NDArray[np.float32] = spans.reshape(len(shape), side, lines, side).mean(axis=2)
    return covered


def render_many(scenes: Sequence[Scene], size: int) -> Image:
    """Antialiased pictures of scenes, uint8 (B, size, size, 3); the same bits however scenes are grouped."""
    out = np.empty((len(scenes), size, size, 3), dtype=np.uint8)
    step = max(1, 2**18 // size**2)
    for start in range(0, len(scenes), step):
        out[start : start + step] = _render_chunk(scenes[start : start + step], size)
    return out


def render(scene: Scene, size: int) -> Image:
    """The antialiased picture of one scene, uint8 (size, size, 3)."""
    picture: Image = render_many([scene], size)[0]
    return picture


def _render_chunk(scenes: Sequence[Scene], size: int) -> Image:
    side = 2 * math.ceil(size * FREE_RADIUS["large"][1]) + 2
    pad = side  # windows may reach past the picture
    canvas = np.empty((len(scenes), size + 2 * pad, size + 2 * pad, 3), dtype=np.float32)
    canvas[:] = np.array([BACKGROUNDS[scene.background] for scene in scenes], dtype=np.float32)[:, None, None]
    for turn in range(max(len(scene.objects) for scene in scenes)):
        picture = np.array([i for i, scene in enumerate(scenes) if len(scene.objects) > turn])
        objects = [scenes[i].objects[turn] for i in picture]
        shape = np.array([SHAPES.index(each.shape) for each in objects])
        colour = np.array([COLOURS[each.colour] for each in objects], dtype=np.float32)
        box = np.array([(each.x, each.y, each.radius) for each in objects]) * size
        corner = np.rint(box[:, :2] - side / 2).astype(np.int64)
        covered = coverage(shape, box, corner, side, lines=8 if size < 64 else 4)
        column, row = (corner[:, :, None] + np.arange(side) + pad).transpose(1, 0, 2)  # (N, side) each
        where = (picture[:, None, None], row[:, :, None], column[:, None, :])
        canvas[where] += covered[..., None] * (colour[:, None, None] - canvas[where])
    pictures: Image = np.rint(canvas[:, pad:-pad, pad:-pad]).astype(np.uint8)
    return pictures


# --- captions --------------------------------------------------------------------------------------------


def captions(scene: Scene, *, seed: int = 0, row: int = 0, count: int = 1) -> tuple[str, ...]:
    """`count` different wordings of a scene (at most 4), objects in a keyed order.

    Each tells every object's colour, shape and place and the background: at level `cells` the place is a
    quarter of the picture; at level `free` it is the side of the first object the others lie on, and the
    object's size is told too.
    """
    draws = _Draws(seed, "caption", row)
    wordings = _CELLS_WORDINGS if scene.level == "cells" else _FREE_WORDINGS
    return tuple(wording(scene, draws) for wording in draws.shuffled(wordings)[:count])


def _cells_parts(scene: Scene, draws: _Draws) -> list[tuple[str, str]]:
    """(what, where) of each object, shuffled."""
    return [(f"a {each.colour} {each.shape}", each.cell) for each in draws.shuffled(scene.objects)]


def _cells_prose(scene: Scene, draws: _Draws) -> str:
    parts = [f"{what} in the {cell}" for what, cell in _cells_parts(scene, draws)]
    return f"{_listed(parts)} on a {scene.background} background"


def _cells_background_first(scene: Scene, draws: _Draws) -> str:
    parts = [f"{what} at the {cell}" for what, cell in _cells_parts(scene, draws)]
    return f"a {scene.background} background with {_listed(parts)}"


def _cells_place_first(scene: Scene, draws: _Draws) -> str:
    parts = [f"{cell}: {what}" for what, cell in _cells_parts(scene, draws)]
    return f"{', '.join(parts)}, background: {scene.background}"


def _cells_terse(scene: Scene, draws: _Draws) -> str:
    parts = [f"{what[2:]} {cell}" for what, cell in _cells_parts(scene, draws)]
    return f"{', '.join(parts)}, {scene.background} background"


def _free_parts(scene: Scene, draws: _Draws) -> str:
    """The first object, then what it is left of, right of, above or below, shuffled.

    With one relation either object may come first.
    """
    named = [f"a {each.size} {each.colour} {each.shape}" for each in scene.objects]
    relations = list(scene.relations)
    if len(relations) == 1 and draws.below(2):
        (i, relation, j) = relations[0]
        relations = [(j, INVERSE[relation], i)]
    first = relations[0][0] if relations else 0
    told = [f"{relation} {named[j]}" for _, relation, j in draws.shuffled(relations)]
    return " ".join([named[first], *([_listed(told)] if told else [])])


_CELLS_WORDINGS = (_cells_prose, _cells_background_first, _cells_place_first, _cells_terse)
_FREE_WORDINGS = (
    lambda scene, draws: f"{_free_parts(scene, draws)} on a {scene.background} background",
    lambda scene, draws: f"a {scene.background} background with {_free_parts(scene, draws)}",
    lambda scene, draws: f"{_free_parts(scene, draws)}, {scene.background} background",
    lambda scene, draws: f"background: {scene.background}, {_free_parts(scene, draws)}",
)


def _listed(parts: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


# --- draws -----------------------------------------------------------------------------------------------


class _Draws:
    """A stream of draws fixed by (seed, purpose, row): splitmix64 in plain integers, equal everywhere."""

    def __init__(self, seed: int, purpose: str, row: int) -> None:
        state = _mix(seed * _GOLDEN + int.from_bytes(purpose.encode(), "little"))
        self.state = _mix(state ^ (row * _GOLDEN))

    def unit(self) -> float:
        """Uniform in [0, 1)."""
        self.state = (self.state + _GOLDEN) & _MASK
        return (_mix(self.state) >> 11) * 2.0**-53

    def below(self, count: int) -> int:
        """Uniform in 0 .. count - 1."""
        return int(self.unit() * count)

    def between(self, low: float, high: float) -> float:
        """Uniform in [low, high], in steps of 1/4096, so that JSON holds it in few digits, exactly."""
        return round((low + (high - low) * self.unit()) * 4096) / 4096

    def shuffled(self, items: Sequence[Any]) -> list[Any]:
        """A uniformly drawn order of `items`."""
        rest = list(items)
        return [rest.pop(self.below(len(rest))) for _ in items]


def _mix(z: int) -> int:
    """The splitmix64 finaliser on 64 bits."""
    z &= _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def _draw_cells(draws: _Draws, count: int) -> Scene:
    """`count` objects in cells drawn without replacement."""
    cells = sorted(draws.shuffled(range(4))[:count])
    return Scene("cells", _one_of(draws, tuple(BACKGROUNDS)), tuple(_draw_in_cell(draws, c) for c in cells))


def _draw_in_cell(draws: _Draws, cell: int) -> SceneObject:
    return SceneObject(
        shape=_one_of(draws, SHAPES),
        colour=_one_of(draws, tuple(COLOURS)),
        x=draws.between(-CELL_JITTER, CELL_JITTER) + (0.75 if cell % 2 else 0.25),
        y=draws.between(-CELL_JITTER, CELL_JITTER) + (0.75 if cell >= 2 else 0.25),
        radius=draws.between(*CELL_RADIUS),
    )


def _draw_free(draws: _Draws, count: int) -> Scene:
    """`count` objects anywhere, apart from each other, no shape-colour pair twice.

    The first object's relation to each other one is clear-cut; drawn again until all this holds.
    """
    objects: list[SceneObject] = []
    while len(objects) < count:
        objects.append(_draw_anywhere(draws))
        if not _fits(objects):
            objects.clear()
    relations = [(0, _relation(objects[0], each) or "", j) for j, each in enumerate(objects) if j]
    return Scene("free", _one_of(draws, tuple(BACKGROUNDS)), tuple(objects), tuple(relations))


def _draw_anywhere(draws: _Draws) -> SceneObject:
    radius = draws.between(*FREE_RADIUS[_one_of(draws, SIZES)])
    edge = radius + FREE_GAP / 2
    return SceneObject(
        shape=_one_of(draws, SHAPES),
        colour=_one_of(draws, tuple(COLOURS)),
        x=draws.between(edge, 1 - edge),
        y=draws.between(edge, 1 - edge),
        radius=radius,
    )


def _relation(first: SceneObject, other: SceneObject) -> str | None:
    """Where `first` lies as seen from `other`, or None when it could be argued."""
    dx, dy = first.x - other.x, first.y - other.y
    along, across = max(abs(dx), abs(dy)), min(abs(dx), abs(dy))
    if along < FREE_OFFSET or along < FREE_SLANT * across:
        return None
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def _fits(objects: Sequence[SceneObject]) -> bool:
    """Whether the last object differs from the others, lies apart and is clearly related to the first."""
    *others, last = objects
    for other in others:
        gap = max(abs(last.x - other.x), abs(last.y - other.y)) - last.radius - other.radius
        if gap < FREE_GAP or (last.shape, last.colour) == (other.shape, other.colour):
            return False
    return not others or _relation(others[0], last) is not None


def _one_of(draws: _Draws, items: Sequence[str]) -> str:
    return items[draws.below(len(items))]


# --- splits ----------------------------------------------------------------------------------------------


def content(scene: Scene) -> tuple[str, ...]:
    """What the captions of a scene tell, in one order: equal for scenes that differ in jitter alone."""
    if scene.level == "cells":
        told = sorted(f"{each.cell} {each.colour} {each.shape}" for each in scene.objects)
        return (scene.background, *told)
    named = [f"{each.size} {each.colour} {each.shape}" for each in scene.objects]
    if len(named) == 1:
        return (scene.background, named[0])
    ways = [(named[0], sorted(f"{relation} {named[j]}" for _, relation, j in scene.relations))]
    if len(named) == 2:
        ways.append((named[1], [f"{INVERSE[scene.relations[0][1]]} {named[0]}"]))
    first, others = min(ways)
    return (scene.background, first, *others)


def split_of(scene: Scene) -> str:
    """The split a scene belongs to, by its content alone, whatever the seed.

    Any unseen pair: `unseen_pairs`. Else a tenth of all contents, picked by hash: `unseen_scenes`.
    """
    if any((each.shape, each.colour) in UNSEEN_PAIRS for each in scene.objects):
        return "unseen_pairs"
    key = zlib.crc32("|".join(content(scene)).encode())
    return "unseen_scenes" if _mix(key) % 10 == 0 else "train"


@dataclass(frozen=True)
class ScenesSource:
    """Captioned scenes as numbered rows: `images` of train, then `held_out` of each unseen split.

    A row depends on (level, seed, split, place in the split, most `objects`) alone: more images change none
    of the others.
    """

    level: str = "cells"
    images: int = 60_000
    size: int = 32
    seed: int = 0
    held_out: int = 1024
    captions_per_image: int = 1
    objects: int = max(OBJECT_COUNTS)

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise SourceError(f"scenes: level {self.level!r} is unknown. Use one of {', '.join(LEVELS)}.")
        if not 8 <= self.size <= 1024:
            raise SourceError(f"scenes: size {self.size} is out of range. Use 8 to 1024 pixels.")
        if self.images < 1 or self.held_out < 0:
            raise SourceError(
                f"scenes: images {self.images} and held_out {self.held_out} are out of range. "
                "Use at least 1 image and 0 or more held out."
            )
        if self.seed < 0:
            raise SourceError(f"scenes: seed {self.seed} is out of range. Use 0 or more.")
        if not 1 <= self.objects <= max(OBJECT_COUNTS):
            raise SourceError(
                f"scenes: objects {self.objects} is out of range. Use at most 1 to {max(OBJECT_COUNTS)}."
            )
        if not 1 <= self.captions_per_image <= 4:
            raise SourceError(
                f"scenes: captions_per_image {self.captions_per_image} is out of range. Use 1 to 4."
            )

    def __len__(self) -> int:
        return self.images + 2 * self.held_out

    @property
    def splits(self) -> dict[str, tuple[int, int]]:
        """First row and end of each split."""
        end = self.images + self.held_out
        ranges = ((0, self.images), (self.images, end), (end, end + self.held_out))
        return {name: bounds for name, bounds in zip(SPLITS, ranges, strict=True) if bounds[0] < bounds[1]}

    def describe(self) -> dict[str, Any]:
        """What identifies these rows: equal descriptions give equal pictures and captions."""
        told = {"kind": "scenes", "version": 1, **asdict(self)}
        if self.objects == max(OBJECT_COUNTS):  # as stores have it that were made before it could be fewer
            del told["objects"]
        return told

    def split(self, row: int) -> str:
        """The name of the split that holds a row."""
        return next(name for name, (start, stop) in self.splits.items() if start <= row < stop)

    def scene(self, row: int) -> Scene:
        """The scene of a row: drawn, keyed by the row, until one of the row's split comes up."""
        split = self.split(row)
        draws = _Draws(self.seed, f"{self.level} {split}", row - self.splits[split][0])
        counts = [count for count in OBJECT_COUNTS if count <= self.objects]
        count = counts[draws.below(len(counts))]
        draw = _draw_cells if self.level == "cells" else _draw_free
        while True:
            scene = draw(draws, count)
            if split_of(scene) == split:
                return scene

    def captions(self, row: int, scene: Scene | None = None) -> tuple[str, ...]:
        """The captions of a row; give its scene where it is at hand."""
        place = row - self.splits[self.split(row)][0]
        chosen = self.scene(row) if scene is None else scene
        return captions(chosen, seed=self.seed, row=place, count=self.captions_per_image)

    def batch(self, rows: Sequence[int]) -> tuple[Image, list[tuple[str, ...]], list[Scene]]:
        """Pictures uint8 (B, size, size, 3), captions and scenes of some rows, quickly."""
        scenes = [self.scene(row) for row in rows]
        told = [self.captions(row, scene) for row, scene in zip(rows, scenes, strict=True)]
        return render_many(scenes, self.size), told, scenes
