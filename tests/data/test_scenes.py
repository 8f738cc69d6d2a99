"""Scenes are keyed, captioned fully, split by content, and rendered as geometry says."""

import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest

from shoestring.data.scenes import (
    AREA,
    BACKGROUNDS,
    CENTROID,
    COLOURS,
    LEVELS,
    SHAPES,
    UNSEEN_PAIRS,
    Scene,
    SceneObject,
    ScenesSource,
    captions,
    content,
    render,
    render_many,
    split_of,
)
from shoestring.errors import SourceError


def scenes(level: str, count: int = 300, seed: int = 0) -> list[Scene]:
    source = ScenesSource(level=level, images=count, seed=seed)
    return [source.scene(row) for row in range(count)]


@pytest.mark.parametrize("shape", SHAPES)
def test_area_and_centre_of_mass_of_a_shape_are_the_tables(shape: str) -> None:
    picture = render(Scene("free", "black", (SceneObject(shape, "red", 0.43, 0.52, 0.18),)), 256)
    share = picture[:, :, 0] / COLOURS["red"][0]
    assert share.sum() == pytest.approx(AREA[shape] * (0.18 * 256) ** 2, rel=5e-3)
    points = (np.arange(256) + 0.5) / 256
    assert share.sum(axis=0) @ points / share.sum() == pytest.approx(0.43, abs=1e-3)
    assert share.sum(axis=1) @ points / share.sum() == pytest.approx(0.52 + 0.18 * CENTROID[shape], abs=1e-3)


@pytest.mark.parametrize("level", LEVELS)
def test_a_small_picture_is_the_average_of_a_large_one(level: str) -> None:
    some = scenes(level, 20)
    large = render_many(some, 256).reshape(20, 32, 8, 32, 8, 3).mean(axis=(2, 4))
    assert np.abs(render_many(some, 32) - large).max() < 20  # of 255, at edges only
    assert np.abs(render_many(some, 32) - large).mean() < 0.2


def test_a_scene_alone_has_the_same_picture_as_among_others() -> None:
    some = scenes("free", 40)
    np.testing.assert_array_equal(render_many(some, 32), np.stack([render(each, 32) for each in some]))


def test_a_row_depends_on_seed_split_and_place_alone() -> None:
    few = ScenesSource(images=10, held_out=5)
    many = ScenesSource(images=100, held_out=50)
    assert few.scene(3) == many.scene(3)
    assert few.scene(10) == many.scene(100)
    assert few.captions(16) == many.captions(151)
    assert few.scene(3) != ScenesSource(images=10, held_out=5, seed=1).scene(3)


def test_the_first_scene_never_changes() -> None:
    """Stores made by different versions must agree on what a row is."""
    source = ScenesSource(images=10, held_out=5)
    assert source.captions(4) == (
        "a green circle in the bottom left and a yellow triangle in the bottom right on a black background",
    )
    assert source.captions(12) == ("cyan circle bottom left, cyan circle bottom right, white background",)
    first = source.scene(4).objects[0]
    assert first == SceneObject("circle", "green", 0.2216796875, 0.708251953125, 0.165771484375)


@pytest.mark.parametrize("level", LEVELS)
def test_json_round_trip_is_exact(level: str) -> None:
    for each in scenes(level, 50):
        assert Scene.from_json(json.loads(json.dumps(each.to_json()))) == each


@pytest.mark.parametrize("level", LEVELS)
def test_splits_share_no_content_whatever_the_seed(level: str) -> None:
    train = {content(each) for each in scenes(level, 1000)}
    source = ScenesSource(level=level, images=1, held_out=200, seed=7)
    unseen = {content(source.scene(row)) for row in range(1, 201)}
    pairs = [source.scene(row) for row in range(201, 401)]
    assert not train & unseen
    for each in pairs:
        assert any((one.shape, one.colour) in UNSEEN_PAIRS for one in each.objects)
    for _, *told in train | unseen:
        assert not any(f"{colour} {shape}" in one for one in told for shape, colour in UNSEEN_PAIRS)


def test_a_tenth_of_contents_is_unseen() -> None:
    source = ScenesSource(images=2000)
    contents = {content(source.scene(row)) for row in range(2000)}
    # train scenes only; give each another background: its split is drawn anew
    other = [
        split_of(Scene("cells", ground, source.scene(row).objects))
        for row in range(1000)
        for ground in BACKGROUNDS
        if ground != source.scene(row).background
    ]
    assert len(contents) > 1500
    assert other.count("unseen_scenes") / len(other) == pytest.approx(0.1, abs=0.02)


def test_unseen_pairs_take_one_colour_from_each_shape() -> None:
    assert sorted(shape for shape, _ in UNSEEN_PAIRS) == sorted(SHAPES)
    assert len({colour for _, colour in UNSEEN_PAIRS}) == 4


def test_content_forgets_jitter_and_order() -> None:
    one = SceneObject("circle", "red", 0.25, 0.25, 0.16)
    moved = SceneObject("circle", "red", 0.28, 0.21, 0.17)
    other = SceneObject("cross", "blue", 0.75, 0.75, 0.16)
    assert content(Scene("cells", "grey", (one, other))) == content(Scene("cells", "grey", (other, moved)))
    left = Scene("free", "grey", (one, other), ((0, "left of", 1),))
    assert content(left) == content(Scene("free", "grey", (other, one), ((0, "right of", 1),)))


@pytest.mark.parametrize("level", LEVELS)
def test_every_wording_tells_every_object_and_the_background(level: str) -> None:
    for row, scene in enumerate(scenes(level, 100)):
        wordings = captions(scene, row=row, count=4)
        assert len(set(wordings)) == 4
        for caption in wordings:
            assert _read(caption, level) == content(scene), caption


def _read(caption: str, level: str) -> tuple[str, ...]:
    """A caption's content, by an independent reader: pattern matching on the words."""
    (background,) = re.findall("|".join(BACKGROUNDS), caption)
    colours, shapes = "|".join(COLOURS), "|".join(SHAPES)
    if level == "cells":
        cell = r"((?:top|bottom) (?:left|right))"
        pattern = rf"({colours}) ({shapes})"
        if re.search(rf"{cell}: a ", caption):
            told = [(c, s, p) for p, c, s in re.findall(rf"{cell}: a {pattern}", caption)]
        else:
            told = re.findall(rf"{pattern} (?:in the |at the |){cell}", caption)
        return (background, *sorted(f"{place} {colour} {shape}" for colour, shape, place in told))
    named = re.findall(
        rf"(?:(left of|right of|above|below) )?a (small|large) ({colours}) ({shapes})", caption
    )
    objects = tuple(
        SceneObject(shape, colour, 0.5, 0.5, 0.1 if size == "small" else 0.17)
        for _, size, colour, shape in named
    )
    relations = tuple((0, relation, j) for j, (relation, *_) in enumerate(named) if relation)
    assert len(relations) == len(objects) - 1
    return content(Scene("free", background, objects, relations))


def test_objects_stay_inside_and_apart() -> None:
    for level in LEVELS:
        for scene in scenes(level, 200):
            for k, one in enumerate(scene.objects):
                assert one.radius < min(one.x, one.y, 1 - one.x, 1 - one.y)
                for other in scene.objects[:k]:
                    gap = max(abs(one.x - other.x), abs(one.y - other.y)) - one.radius - other.radius
                    assert gap * 32 >= 1.4


def test_words_are_spread_evenly() -> None:
    objects = [one for scene in scenes("cells", 3000) for one in scene.objects]
    assert len(objects) / 3000 == pytest.approx(2.2, abs=0.05)
    for cell in ("top left", "bottom right"):
        assert sum(one.cell == cell for one in objects) / len(objects) == pytest.approx(0.25, abs=0.02)
    for shape in SHAPES:
        assert sum(one.shape == shape for one in objects) / len(objects) == pytest.approx(0.25, abs=0.02)


def test_batch_is_the_rows_themselves() -> None:
    source = ScenesSource(images=20, held_out=4, captions_per_image=2)
    pictures, told, drawn = source.batch([3, 25, 21])
    assert pictures.shape == (3, 32, 32, 3)
    assert drawn[1] == source.scene(25)
    assert told[1] == source.captions(25)
    assert len(told[0]) == 2
    np.testing.assert_array_equal(pictures[2], render(source.scene(21), 32))
    assert [source.split(row) for row in (0, 19, 20, 24)] == [
        "train",
        "train",
        "unseen_scenes",
        "unseen_pairs",
    ]
    assert len(source) == 28


@pytest.mark.parametrize(
    "wrong", [{"level": "rows"}, {"size": 4}, {"images": 0}, {"held_out": -1}, {"captions_per_image": 9}]
)
def test_wrong_options_are_refused_with_what_is_allowed(wrong: dict[str, object]) -> None:
    with pytest.raises(SourceError, match=r"Use (one of|at least|\d)"):
        ScenesSource(**wrong)  # type: ignore[arg-type]


def test_hues_are_at_least_55_degrees_apart() -> None:
    """The parser tells colours by hue alone."""
    palette = np.array(list(COLOURS.values()), dtype=float)
    chroma = palette - palette.mean(axis=1, keepdims=True)
    chroma /= np.linalg.norm(chroma, axis=1, keepdims=True)
    angles = np.degrees(np.arccos(np.clip(chroma @ chroma.T, -1, 1))) + 360 * np.eye(6)
    assert angles.min() > 55
    assert math.isclose(np.ptp(np.array(list(BACKGROUNDS.values())), axis=1).max(), 0)


def test_scenes_need_no_torch() -> None:
    code = "import sys, shoestring.data.scenes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
