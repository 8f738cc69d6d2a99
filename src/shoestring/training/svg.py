"""Curves and bars as SVG text, written by hand: no library, no script; colours come from the page's style.

A chart is 420 units wide, so that its text stays readable on a telephone. Class `s0` is the
usual colour, `n0` ... `n7` a scale from cool to warm, `r0` ... `r7` colours that stay apart, for runs, and
`raw` the faint line under a smoothed one.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import pairwise
from math import fsum

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 420, 230
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 26, 34
MAX_POINTS = 300
MAX_BINS = 3000
LEGEND = 8


@dataclass(frozen=True)
class Line:
    """A series: its points in order of x, its class in the style, and its name for the legend, if any.

    `label` is written at the line's end, in place of a legend; `dots` are moments marked on the line.
    """

    points: Points
    style: str = "s0"
    name: str = ""
    label: str = ""
    dots: Points = ()


@dataclass(frozen=True)
class Band:
    """A stretch of the x axis with a name: a phase."""

    name: str
    start: float
    stop: float


@dataclass(frozen=True)
class Mark:
    """A moment worth seeing, with the text shown when pointed at."""

    x: float
    text: str


@dataclass(frozen=True)
class _Scale:
    """A linear or logarithmic map from values to drawing units."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = self.low, self.high, value
        if self.log:
            low, high, at = math.log10(low), math.log10(high), math.log10(max(value, self.low))
        share = (at - low) / (high - low) if high > low else 0.5
        return round(self.start + min(1.0, max(0.0, share)) * (self.stop - self.start), 1)


def chart(
    title: str,
    lines: Sequence[Line],
    *,
    bands: Sequence[Band] = (),
    marks: Sequence[Mark] = (),
    x_label: str = "images",
    log: bool = False,
    log_x: bool = False,
    from_zero: bool = False,
) -> str:
    """A figure of curves with axes, phases and marks; empty where no line has a finite point.

    `log` and `log_x` make an axis logarithmic, without the points that are not above zero.
    """
    drawn = [replace(line, points=_finite(line.points, log, log_x)) for line in lines]
    drawn = [line for line in drawn if line.points]
    if not drawn:
        return ""
    x, y = _scales(drawn, bands, log, log_x, from_zero)
    parts = [
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>',
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">',
        *_bands(bands, x),
        *_y_axis(y),
        *_x_axis(x, x_label),
        *(_line(line, x, y) for line in drawn),
        *_labels(drawn, x, y),
        *_marks(marks, x),
        "</svg>",
        _legend(drawn),
        "</figure>",
    ]
    return "".join(parts)


def bar(value: float, low: float | None, high: float | None) -> str:
    """A share between 0 and 1 as a small bar with its interval."""
    width = 120
    interval = ""
    if low is not None and high is not None:
        start, stop = width * low, width * high
        ends = "".join(f'<path d="M{end:.1f} 4v8"/>' for end in (start, stop))
        interval = f'<g class="interval"><path d="M{start:.1f} 8H{stop:.1f}"/>{ends}</g>'
    return (
        f'<svg class="bar" viewBox="-1 0 {width + 2} 16" aria-hidden="true">'
        f'<rect class="track" y="4" width="{width}" height="8" rx="4"/>'
        f'<rect class="fill" y="4" width="{width * value:.1f}" height="8" rx="4"/>{interval}</svg>'
    )


def smoothed(
    points: Points, share: float = 0.02, places: int = MAX_POINTS, breaks: Sequence[float] = ()
) -> list[tuple[float, float]]:
    """Gaussian running mean over `share` of the x range (one standard deviation), at about so many places.

    Nothing is averaged over `breaks`, values of x after which a curve may jump: the ends of phases.
    """
    if len(points) < 3:
        return list(points)
    points = _binned(points)
    spread = max(share * (points[-1][0] - points[0][0]), 1e-12)
    step, reach = -(-len(points) // places), math.ceil(4 * share * len(points))
    ends = [bisect_right(points, x, key=lambda point: point[0]) for x in sorted(breaks)]
    out = []
    for start, stop in pairwise([0, *ends, len(points)]):
        part = points[start:stop]
        for k in [*range(0, len(part) - 1, step), *([len(part) - 1] if part else [])]:
            at = part[k][0]
            near = part[max(0, k - reach) : k + reach + 1]
            weights = [math.exp(-0.5 * ((x - at) / spread) ** 2) for x, _ in near]
            total = fsum(weight * y for weight, (_, y) in zip(weights, near, strict=True))
            out.append((at, total / fsum(weights)))
    return out


def value_at(points: Points, x: float) -> float:
    """The curve's value at x, on straight lines between its points; the first or last one's beyond them."""
    number = bisect_left(points, x, key=lambda point: point[0])
    if number in (0, len(points)):
        return points[max(0, number - 1)][1]
    (start, low), (stop, high) = points[number - 1], points[number]
    return low + (high - low) * (x - start) / (stop - start)


def thinned(points: Points) -> list[tuple[float, float]]:
    """At most about 600 points that keep the highs and lows: the extremes of each stretch of the curve."""
    step = -(-len(points) // MAX_POINTS)
    if step <= 2:
        return list(points)
    out: list[tuple[float, float]] = []
    for start in range(0, len(points), step):
        part = points[start : start + step]
        ends = {min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])}
        out.extend(sorted(ends))
    return out


def short(value: float) -> str:
    """A number in few characters: 0, 0.02, 1.5, 250, 60k, 1.2M, 3e-5."""
    if value == 0:
        return "0"
    size = abs(value)
    for limit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= limit:
            return f"{value / limit:.3g}{letter}"
    return f"{value:.3g}" if size >= 1e-4 else f"{value:.0e}".replace("e-0", "e-")


# --- parts of a chart ------------------------------------------------------------------------------------


def _binned(points: Points) -> Points:
    """The means of up to 3,000 stretches of equally many points, so that smoothing a long run stays quick."""
    size = -(-len(points) // MAX_BINS)
    if size == 1:
        return points
    parts = (points[start : start + size] for start in range(0, len(points), size))
    return [(fsum(x for x, _ in part) / len(part), fsum(y for _, y in part) / len(part)) for part in parts]


def _finite(points: Points, log: bool, log_x: bool) -> list[tuple[float, float]]:
    return [
        (x, y)
        for x, y in points
        if math.isfinite(x) and math.isfinite(y) and (y > 0 or not log) and (x > 0 or not log_x)
    ]


def _scales(
    lines: Sequence[Line], bands: Sequence[Band], log: bool, log_x: bool, from_zero: bool
) -> tuple[_Scale, _Scale]:
    xs = [x for line in lines for x, _ in line.points] + [band.stop for band in bands]
    ys = [y for line in lines for _, y in line.points]
    low, high = min(ys), max(ys)
    if log:
        low, high = (low / 1.1, high * 1.1) if high > low else (low / 2, high * 2)
    else:
        low = 0.0 if from_zero and low >= 0 else low
        room = 0.06 * (high - low) or abs(high) or 1.0
        low, high = low if low == 0 else low - room, high + room
    return (
        _Scale(min(xs) if log_x else 0.0, max(xs) or 1.0, LEFT, WIDTH - RIGHT, log_x),
        _Scale(low, high, HEIGHT - BOTTOM, TOP, log),
    )


def ticks(low: float, high: float, log: bool = False) -> list[float]:
    """Three to seven round values from `low` to `high`."""
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for steps in ([1], [1, 3], [1, 2, 5], [*range(1, 10)]):
            chosen = [step * 10.0**k for k in decades for step in steps if low <= step * 10.0**k <= high]
            if len(chosen) >= 3:
                return chosen[:: -(-len(chosen) // 6)]
    step = _round_step((high - low) / 5)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _round_step(step: float) -> float:
    """The least of 1, 2, 2.5, 5 times a power of ten that is at least `step`."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(k * power for k in (1, 2, 2.5, 5, 10) if k * power >= step * (1 - 1e-9))


def _y_axis(y: _Scale) -> list[str]:
    out = []
    for value in ticks(y.low, y.high, y.log):
        at = y(value)
        out.append(f'<path class="rule" d="M{LEFT} {at}H{WIDTH - RIGHT}"/>')
        out.append(
            f'<text class="tick" x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{short(value)}</text>'
        )
    return out


def _x_axis(x: _Scale, label: str) -> list[str]:
    foot = HEIGHT - BOTTOM
    out = [f'<path class="axis" d="M{LEFT} {foot}H{WIDTH - RIGHT}"/>']
    for value in ticks(x.low, x.high, x.log):
        out.append(
            f'<text class="tick" x="{x(value)}" y="{foot + 15}" text-anchor="middle">{short(value)}</text>'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    out.append(
        f'<text class="label" x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{escape(label)}</text>'
    )
    return out


def _bands(bands: Sequence[Band], x: _Scale) -> list[str]:
    out = []
    for k, band in enumerate(bands):
        start, stop = x(band.start), x(band.stop)
        height = HEIGHT - BOTTOM - TOP
        name = escape(band.name)
        out.append(
            f'<rect class="band b{k % 2}" x="{start}" y="{TOP}" width="{stop - start:.1f}" height="{height}">'
            f"<title>{name}</title></rect>"
        )
        if stop - start > 6 * len(band.name) + 6:
            out.append(f'<text class="phase" x="{start + 4}" y="{TOP - 6}">{name}</text>')
    return out


def _marks(marks: Sequence[Mark], x: _Scale) -> list[str]:
    foot = HEIGHT - BOTTOM
    return [
        f'<path class="mark" d="M{x(mark.x)} {foot}l-4 7h8z"><title>{escape(mark.text)}</title></path>'
        for mark in marks
    ]


def _line(line: Line, x: _Scale, y: _Scale) -> str:
    title = f"<title>{escape(line.name)}</title>" if line.name else ""
    path = f'<path class="line {line.style}" d="{_path(line.points, x, y)}">{title}</path>'
    spots = (f'<circle class="dot {line.style}" cx="{x(at)}" cy="{y(to)}" r="2.6"/>' for at, to in line.dots)
    return path + "".join(spots)


def _labels(lines: Sequence[Line], x: _Scale, y: _Scale) -> list[str]:
    """Labels at the lines' ends, from the lowest up, each raised over those in its way."""
    placed: list[tuple[float, float]] = []
    out = []
    ends = [(x(line.points[-1][0]) + 3, y(line.points[-1][1]) + 4, line) for line in lines if line.label]
    for left, foot, line in sorted(ends, key=lambda end: -end[1]):
        while clash := [at for beside, at in placed if abs(beside - left) < 11 and abs(at - foot) < 11]:
            foot = min(clash) - 11
        placed.append((left, foot))
        label = escape(line.label)
        out.append(f'<text class="end {line.style}" x="{left:.1f}" y="{foot:.1f}">{label}</text>')
    return out


def _path(points: Points, x: Callable[[float], float], y: Callable[[float], float]) -> str:
    if len(points) == 1:
        points = [*points, points[0]]
    return "M" + "L".join(f"{x(at):g} {y(value):g}" for at, value in points)


def _legend(lines: Sequence[Line]) -> str:
    named = [line for line in lines if line.name and not line.label]
    if not named:
        return ""
    if len(named) > LEGEND:  # a long scale is named by its ends
        named = [named[0], named[-1]]
    items = "".join(f'<span><i class="key {line.style}"></i>{escape(line.name)}</span>' for line in named)
    return f'<div class="legend">{items}</div>'
