"""Curves are where the numbers are, inside the drawing; what makes them lighter keeps their shape."""

from __future__ import annotations

import math
import re
import time
from xml.etree import ElementTree

import numpy as np
import pytest

from shoestring.training.svg import Line, bar, chart, short, smoothed, thinned, ticks, value_at


@pytest.mark.parametrize(
    ("low", "high", "log"), [(0, 1, False), (0.03, 0.9, True), (3, 3.2, True), (5, 6e6, True)]
)
def test_ticks_are_three_to_seven_round_values_inside(low: float, high: float, log: bool) -> None:
    values = ticks(low, high, log)
    assert 3 <= len(values) <= 7
    assert values == sorted(values)
    assert low <= values[0]
    assert values[-1] <= high * (1 + 1e-9)
    assert all(len(short(value)) <= 6 for value in values)


def test_curves_lie_inside_the_drawing_and_higher_values_are_higher() -> None:
    points = drawn(chart("t", [Line([(0, 1.0), (50, 10.0), (100, 100.0)])], log=True))
    assert (np.diff(points[:, 1]) < 0).all()
    assert points[1, 1] == pytest.approx(points[::2, 1].mean(), abs=0.2), "10 is halfway from 1 to 100"
    assert points.min() >= 0
    assert points[:, 0].max() <= 420


def test_a_smoothed_line_stays_straight_and_calms_noise() -> None:
    line = [(float(x), 2.0 * x) for x in range(1000)]
    inner = [(x, y) for x, y in smoothed(line) if 100 < x < 900]
    assert all(y == pytest.approx(2 * x, rel=1e-6) for x, y in inner)
    noise = np.random.default_rng(0).normal(size=1000)
    calm = [y for _, y in smoothed(list(enumerate(noise)))]
    assert np.std(calm) < 0.25


def test_thinning_keeps_highs_and_lows() -> None:
    values = np.random.default_rng(0).normal(size=5000)
    thin = thinned(list(enumerate(values)))
    assert len(thin) <= 700
    assert max(y for _, y in thin) == values.max()
    assert min(y for _, y in thin) == values.min()
    assert [x for x, _ in thin] == sorted(x for x, _ in thin)


def test_a_bar_is_as_long_as_its_share() -> None:
    track, fill = ElementTree.fromstring(bar(0.25, 0.2, 0.3)).findall("rect")
    assert float(fill.attrib["width"]) / float(track.attrib["width"]) == 0.25


def test_nothing_is_averaged_over_the_end_of_a_phase() -> None:
    """A curve that jumps from 1 to 3 after 300 is 1 up to there and 3 from there on."""
    jump = [(float(x), 1.0 if x <= 300 else 3.0) for x in range(1000)]
    assert all(y == pytest.approx(1 if x <= 300 else 3) for x, y in smoothed(jump, breaks=[300]))
    blurred = [y for x, y in smoothed(jump) if 290 < x < 310]
    assert any(1.5 < y < 2.5 for y in blurred), "without the break it is blurred"
    for breaks in ([-5.0, 0.0, 300.0, 300.0, 999.0, 5000.0], [299.5]):
        assert [x for x, _ in smoothed(jump, breaks=breaks)][-1] == 999


def test_a_million_readings_are_smoothed_at_once_and_right() -> None:
    """Half a million readings a curve are what a published training leaves."""
    noise = np.random.default_rng(0).normal(size=500_000)
    line = [(float(x), 3e-6 * x + y) for x, y in enumerate(noise)]
    started = time.process_time()
    calm = smoothed(line)
    assert time.process_time() - started < 5
    assert len(calm) <= 301
    assert all(y == pytest.approx(3e-6 * x, abs=0.05) for x, y in calm if 5e4 < x < 4.5e5)


def test_a_value_between_points_is_on_the_straight_line() -> None:
    points = [(0.0, 1.0), (10.0, 3.0), (20.0, -1.0)]
    given = [-5, 0, 5, 10, 17.5, 20, 99]
    xs, ys = zip(*points, strict=True)
    assert [value_at(points, x) for x in given] == pytest.approx(np.interp(given, xs, ys).tolist())
    assert value_at(points[:1], 7) == 1.0


def test_a_logarithmic_axis_of_images_shows_short_and_long_runs() -> None:
    """100, 10,000 and 1,000,000 are equally far apart; what lies at zero has no place."""
    points = drawn(chart("t", [Line([(0, 9.0), (100, 3.0), (10_000, 2.0), (1_000_000, 1.0)])], log_x=True))
    assert len(points) == 3
    assert np.diff(points[:, 0]) == pytest.approx([178, 178], abs=0.2)


def test_labels_at_the_ends_do_not_cover_each_other() -> None:
    """Eight lines that end in one place, three elsewhere: every letter is there and stands free."""
    ends = [(100.0, 1 + 1e-3 * k) for k in range(8)] + [(50.0, 1.0), (50.0, 1.0), (99.0, 5.0)]
    lines = [
        Line([(0, 2.0), end], f"r{k % 8}", f"run {k}", label="ABCDEFGHIJK"[k]) for k, end in enumerate(ends)
    ]
    figure = chart("t", lines)
    places = re.findall(r'<text class="end r\d" x="([\d.-]+)" y="([\d.-]+)">(\w)</text>', figure)
    assert sorted(label for _, _, label in places) == list("ABCDEFGHIJK")
    spots = [(float(x), float(y)) for x, y, _ in places]
    for k, (x, y) in enumerate(spots):
        assert 0 < x < 420 - 8
        assert 10 < y < 230
        assert all(abs(x - a) >= 11 or abs(y - b) >= 10.9 for a, b in spots[:k])
    assert 'class="legend"' not in figure, "letters stand in place of a legend"


def test_a_long_scale_is_named_by_its_ends() -> None:
    lines = [Line([(0, k), (1, k)], f"n{k % 8}", f"layer {k}") for k in range(1, 12)]
    assert re.findall(r"</i>(layer \d+)</span>", chart("t", lines)) == ["layer 1", "layer 11"]
    assert len(re.findall(r"</i>(layer \d+)</span>", chart("t", lines[:8]))) == 8
    assert len(re.findall(r"<title>layer \d+</title>", chart("t", lines))) == 11, "all can be pointed at"


def test_rings_lie_on_their_line() -> None:
    figure = chart("t", [Line([(0, 1.0), (100, 3.0)], dots=[(50, 2.0)])])
    points = drawn(figure)
    ((x, y),) = re.findall(r'<circle class="dot s0" cx="([\d.]+)" cy="([\d.]+)"', figure)
    assert (float(x), float(y)) == pytest.approx(tuple(points.mean(axis=0)), abs=0.11)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_left_out(value: float) -> None:
    assert len(drawn(chart("t", [Line([(0, 1.0), (1, value), (value, 2.0), (3, 4.0)])]))) == 2
    assert chart("t", [Line([(0, value)])]) == ""


def drawn(figure: str) -> np.ndarray:
    """The points (n, 2) of a figure's one line, in drawing units."""
    (path,) = re.findall(r'class="line \w+" d="M(.*?)"', figure)
    return np.array([[float(each) for each in point.split()] for point in path.split("L")])
