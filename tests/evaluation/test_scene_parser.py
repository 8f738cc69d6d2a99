"""The parser is exact on rendered scenes, and judges imperfect pictures as a person would."""

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from shoestring.data.scenes import (
    COLOURS,
    LEVELS,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    ScenesSource,
    render,
    render_many,
)
from shoestring.evaluation.scene_parser import OTHER, Rejected, cell_of, compare, parse

Picture = NDArray[np.uint8]


def mixed_scenes(level: str, count: int) -> list[Scene]:
    """Scenes of all splits, unseen pairs too."""
    source = ScenesSource(level=level, images=count - 2 * (count // 4), held_out=count // 4, seed=11)
    return [source.scene(row) for row in range(count)]


def check_exact(level: str, size: int, count: int) -> None:
    scenes = mixed_scenes(level, count)
    for scene, picture in zip(scenes, render_many(scenes, size), strict=True):
        parsed = parse(picture, level)
        assert isinstance(parsed, Scene), (scene, parsed)
        assert all(compare(scene, parsed).values()), (scene, parsed)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("size", [32, 64, 128])
def test_parser_is_exact_on_rendered_scenes(level: str, size: int) -> None:
    check_exact(level, size, 200)


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("size", [32, 64, 128])
def test_parser_is_exact_on_two_thousand_rendered_scenes(level: str, size: int) -> None:
    check_exact(level, size, 2000)


def test_parsed_boxes_lie_on_the_drawn_ones() -> None:
    for scene in mixed_scenes("free", 60):
        parsed = parse(render(scene, 64), "free")
        assert isinstance(parsed, Scene)
        found = {(one.shape, one.colour): one for one in parsed.objects}
        for one in scene.objects:
            other = found[one.shape, one.colour]
            assert abs(one.x - other.x) + abs(one.y - other.y) + abs(one.radius - other.radius) < 0.01


@pytest.mark.parametrize("level", LEVELS)
def test_light_noise_and_soft_edges_change_no_judgement(level: str) -> None:
    scenes = mixed_scenes(level, 100)
    images = render_many(scenes, 32)
    noise = np.random.default_rng(0).normal(0, 0.05 * 255, images.shape)
    noisy = np.clip(np.rint(images + noise), 0, 255).astype(np.uint8)
    soft = np.stack([np.asarray(Image.fromarray(each).resize((26, 26)).resize((32, 32))) for each in images])
    for disturbed in (noisy, soft):
        right = [
            compare(one, parse(picture, level))["all"] for one, picture in zip(scenes, disturbed, strict=True)
        ]
        assert np.mean(right) >= 0.98


def drawn(shape: str, box: tuple[float, float, float, float], colour: str = "red") -> Picture:
    """A 32 px picture of a form that PIL draws, averaged down from 512 px; white background."""
    image = Image.new("RGB", (512, 512), "white")
    pen = ImageDraw.Draw(image)
    left, top, right, bottom = (16 * each for each in box)
    middle, centre = (left + right) / 2, (top + bottom) / 2
    paint = COLOURS.get(colour, colour)
    forms = {
        "diamond": [(left, centre), (middle, top), (right, centre), (middle, bottom)],
        "triangle": [(middle, top), (right, bottom), (left, bottom)],
        "triangle upside down": [(left, top), (right, top), (middle, bottom)],
    }
    if shape in forms:
        pen.polygon(forms[shape], fill=paint)
    elif shape == "ellipse":
        pen.ellipse((left, top, right, bottom), fill=paint)
    elif shape == "ring":
        pen.ellipse((left, top, right, bottom), outline=paint, width=48)
    elif shape == "half circle":
        pen.pieslice((left, top, right, bottom), 0, 180, fill=paint)
    else:
        pen.rectangle((left, top, right, bottom), fill=paint)
    return np.asarray(image.resize((32, 32), Image.Resampling.BOX))


def only_object(picture: Picture) -> SceneObject:
    parsed = parse(picture, "cells")
    assert isinstance(parsed, Scene)
    (one,) = parsed.objects
    return one


@pytest.mark.parametrize(
    ("form", "box", "shape"),
    [
        ("ellipse", (3, 3, 13, 13), "circle"),
        ("ellipse", (3, 3.5, 13, 12.5), "circle"),
        ("rectangle", (3, 3, 13, 12), "square"),
        ("triangle", (3, 3, 13, 12), "triangle"),
        ("triangle", (4, 3, 13, 13), "triangle"),
        ("ellipse", (3, 5, 14, 11), OTHER),
        ("rectangle", (3, 5, 14, 10), OTHER),
        ("diamond", (2, 2, 14, 14), OTHER),
        ("triangle upside down", (3, 3, 13, 13), OTHER),
        ("ring", (3, 3, 13, 13), OTHER),
        ("half circle", (3, 3, 13, 13), OTHER),
    ],
)
def test_forms_drawn_by_pil_are_named_as_a_person_would(
    form: str, box: tuple[float, float, float, float], shape: str
) -> None:
    assert only_object(drawn(form, box)).shape == shape


def test_a_hue_between_two_colours_is_no_colour() -> None:
    assert only_object(drawn("ellipse", (3, 3, 13, 13), "#7f30e0")).colour == OTHER
    assert only_object(drawn("ellipse", (3, 3, 13, 13), "#ff0000")).colour == "red"


def test_an_object_in_the_middle_is_in_no_cell() -> None:
    one = only_object(drawn("ellipse", (11, 3, 21, 13)))
    assert cell_of(one.x, one.y) == OTHER
    assert cell_of(0.25, 0.7) == "bottom left"


def test_pictures_that_are_no_scene_are_rejected_with_a_reason() -> None:
    rng = np.random.default_rng(0)
    blank = np.full((32, 32, 3), 255, np.uint8)
    beige = drawn("ellipse", (3, 3, 13, 13)).copy()
    beige[beige.min(axis=2) == 255] = (235, 205, 180)
    smeared = drawn("ellipse", (3, 3, 13, 13)).copy()
    smeared[20:30, 20:30] = 90
    for picture, reason in [
        (blank, "no coloured blob"),
        (beige, "background"),
        (smeared, "without a known hue"),
        (rng.integers(0, 256, (32, 32, 3)).astype(np.uint8), ""),
    ]:
        parsed = parse(picture, "cells")
        assert isinstance(parsed, Rejected)
        assert reason in parsed.reason


def test_specks_are_ignored_and_third_objects_are_not() -> None:
    picture = drawn("ellipse", (3, 3, 13, 13)).copy()
    picture[25, 25:28] = COLOURS["blue"]
    assert only_object(picture).shape == "circle"
    picture[22:27, 22:27] = COLOURS["blue"]
    parsed = parse(picture, "cells")
    assert isinstance(parsed, Scene)
    assert len(parsed.objects) == 2


CIRCLE = SceneObject("circle", "red", 0.25, 0.25, 0.16)
CROSS = SceneObject("cross", "blue", 0.75, 0.75, 0.16)


def changed(one: SceneObject, **values: object) -> SceneObject:
    return SceneObject(**{**one.__dict__, **values})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("objects", "background", "wrong"),
    [
        ((CROSS, CIRCLE), "grey", set()),
        ((changed(CIRCLE, shape="square"), CROSS), "grey", {"shape"}),
        ((changed(CIRCLE, colour="blue"), CROSS), "grey", {"colour"}),
        ((changed(CIRCLE, x=0.75), CROSS), "grey", {"place"}),
        ((changed(CIRCLE, colour="blue"), changed(CROSS, colour="red")), "grey", {"colour"}),
        ((CIRCLE, CROSS), "black", {"background"}),
        ((CIRCLE,), "grey", {"shape", "colour", "place", "count"}),
        ((CIRCLE, CROSS, CROSS), "grey", {"shape", "colour", "place", "count"}),
    ],
)
def test_facets_name_what_is_wrong(
    objects: tuple[SceneObject, ...], background: str, wrong: set[str]
) -> None:
    asked = Scene("cells", "grey", (CIRCLE, CROSS))
    facets = compare(asked, Scene("cells", background, objects))
    assert {name for name, right in facets.items() if not right} == (wrong | {"all"} if wrong else set())


def test_relations_and_sizes_are_judged_at_level_free() -> None:
    asked = Scene("free", "grey", (CIRCLE, CROSS), ((0, "left of", 1),))
    small = changed(CIRCLE, radius=0.1)
    right_side = changed(CIRCLE, x=0.9)
    assert compare(asked, Scene("free", "grey", (CROSS, CIRCLE)))["all"]
    assert not compare(asked, Scene("free", "grey", (CROSS, small)))["shape"]
    assert not compare(asked, Scene("free", "grey", (CROSS, right_side)))["place"]
    assert compare(asked, Scene("free", "grey", (CROSS, right_side)))["colour"]


def test_a_rejected_picture_is_wrong_in_every_facet() -> None:
    assert not any(compare(Scene("cells", "grey", (CIRCLE,)), Rejected("blank")).values())


def test_every_pair_is_told_from_every_other_at_every_size() -> None:
    """All 24 pairs on 3 backgrounds, small and large."""
    for background in ("white", "grey", "black"):
        for size, radius in zip(SIZES, (0.105, 0.17), strict=True):
            for colour in COLOURS:
                for shape in SHAPES:
                    scene = Scene("free", background, (SceneObject(shape, colour, 0.47, 0.53, radius),))
                    assert compare(scene, parse(render(scene, 32), "free"))["all"], (size, colour, shape)


def test_blobs_whose_surroundings_weigh_against_them_are_parsed() -> None:
    """Saturated smears as badly trained networks draw them: some have a centre of mass off the picture."""
    random = np.random.default_rng(0)
    for _ in range(300):
        coarse = random.integers(0, 256, (3, 3, 3)).astype(np.uint8)
        smear = np.asarray(Image.fromarray(coarse).resize((32, 32), Image.Resampling.BICUBIC))
        blend = np.where(random.random((32, 32, 1)) < 0.5, smear, 255 * (smear > 128))
        for picture in (blend.astype(np.uint8), smear):
            parse(picture, "cells")
