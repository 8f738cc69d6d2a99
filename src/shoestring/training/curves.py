"""A run's curves: loss, by noise level and on held-out images too, rate, gradient, speed, memory, experts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from shoestring.training.records import Point, RunFiles, X, is_number, keys_under, phase_ends, series
from shoestring.training.svg import Band, Line, Mark, chart, smoothed, thinned
from shoestring.training.tracking import Record

TONES = 8  # of the scale from cool to warm
SELDOM = 0.25  # a noise level met in a smaller share of the readings is too noisy to be a curve
PLACES = 120  # points of a curve that is one of many


def curves(run: RunFiles) -> str:
    """The section made of metrics.jsonl's records and the ledger's phases; empty without records."""
    train, held_out = run.kind("train"), run.kind("held_out")
    bands, ends = _bands(train, run.phases), phase_ends(train)
    marks = [Mark(event["images"], str(event.get("text", ""))) for event in run.kind("event")]
    figures = [
        loss_chart("Loss", series(train, "loss"), ends, bands, marks),
        _noise_chart("Loss by noise level", train, bands, readings=True),
        _noise_chart("Held-out loss by noise level", held_out, bands, readings=False),
        _by_time(train),
        loss_chart("Gradient norm", series(train, "grad_norm"), ends, bands, marks),
        chart("Learning rate", [Line(thinned(series(train, "lr")))], bands=bands, from_zero=True),
        _mask_chart(train, bands),
        _with_mean("Images a second", series(train, "images_per_second"), ends, bands),
        _with_mean("Waiting for data, % of the time", scaled(series(train, "data_wait"), 100), ends, bands),
        chart(
            "Peak memory of the phase, GiB",
            [Line(thinned(scaled(series(train, "memory_bytes"), 2**-30)))],
            bands=bands,
            from_zero=True,
        ),
        *_expert_charts(held_out, bands),
    ]
    if not any(figures):
        return ""
    note = "Bands are the phases. " + ("Triangles are events: point at them. " if marks else "")
    return (
        f'<section><h2>Curves</h2><p class="soft">{note}Faint lines are single readings, strong lines their '
        f'running mean.</p><div class="grid">{"".join(figures)}</div></section>'
    )


def loss_chart(
    title: str,
    points: Sequence[Point],
    ends: Sequence[float] = (),
    bands: Sequence[Band] = (),
    marks: Sequence[Mark] = (),
    x_label: str = "images",
) -> str:
    """Readings and their running mean between `ends` of phases, on a logarithmic axis if they span much."""
    lines = [Line(thinned(points), "raw"), Line(smoothed(points, breaks=ends))]
    return chart(title, lines, bands=bands, marks=marks, x_label=x_label, log=wide(points))


def wide(points: Sequence[Point]) -> bool:
    """Whether values span so much that a logarithmic axis shows them better."""
    values = [value for _, value in points]
    return bool(values) and min(values) > 0 and max(values) > 4 * min(values)


def scaled(points: Sequence[Point], factor: float) -> list[Point]:
    """The same points in another unit."""
    return [(x, y * factor) for x, y in points]


def time_unit(longest: float) -> tuple[float, str]:
    """(seconds a unit, its name) for an axis as long as `longest` seconds."""
    return (3600.0, "hours") if longest >= 2 * 3600 else (60.0, "minutes")


def noise_levels(records: Sequence[Record]) -> list[str]:
    """The log sigmas that have a curve, lowest first: of `by_noise`, those in a quarter of the records."""
    found = [record["by_noise"] for record in records if isinstance(record.get("by_noise"), dict)]
    counts = Counter(level for levels in found for level in levels)
    return sorted((level for level, count in counts.items() if count >= SELDOM * len(found)), key=float)


def in_units(key: str, unit: float) -> X:
    """The axis of the number that records have under `key`, such as their seconds, in units of so many."""
    return lambda record: record[key] / unit if is_number(record.get(key)) else None


def _with_mean(title: str, points: Sequence[Point], ends: Sequence[float], bands: Sequence[Band]) -> str:
    lines = [Line(thinned(points), "raw"), Line(smoothed(points, breaks=ends))]
    return chart(title, lines, bands=bands, from_zero=True)


def _by_time(train: Sequence[Record]) -> str:
    unit, name = time_unit(max((seconds for _, seconds in series(train, "seconds")), default=0.0))
    x = in_units("seconds", unit)
    return loss_chart("Loss by training time", series(train, "loss", x=x), phase_ends(train, x), x_label=name)


def _noise_chart(title: str, records: Sequence[Record], bands: Sequence[Band], *, readings: bool) -> str:
    """A line a noise level from cool (little noise) to warm; of held-out losses their mean besides.

    `readings` of single windows are noisy: they are smoothed, and their mean has a chart of its own.
    """
    levels = noise_levels(records)
    lines = []
    for number, level in enumerate(levels):
        points = series(records, "by_noise", level)
        if readings:
            points = smoothed(points, places=PLACES, breaks=phase_ends(records))
        lines.append(Line(points, _tone(number, len(levels)), f"log σ {float(level):g}"))
    if not readings and len(levels) != 1:
        lines.append(Line(series(records, "loss"), "mean", "mean" if levels else ""))
    return chart(title, lines, bands=bands, log=wide([point for line in lines for point in line.points]))


def _mask_chart(train: Sequence[Record], bands: Sequence[Band]) -> str:
    """The share of patches left out, where it changes within a phase; else the phases' table says it."""
    ratios: dict[str, set[float]] = {}
    for record in train:
        ratios.setdefault(str(record.get("phase")), set()).add(record.get("mask") or 0.0)
    if all(len(each) == 1 for each in ratios.values()):
        return ""
    points = scaled(series(train, "mask"), 100)
    return chart("Patches left out, %", [Line(thinned(points))], bands=bands, from_zero=True)


def _expert_charts(held_out: Sequence[Record], bands: Sequence[Band]) -> list[str]:
    """How the experts of each layer are used, from cool (the first layer) to warm (the last)."""
    layers = keys_under(held_out, "experts")

    def lines(key: str, factor: float = 1.0, named: bool = True) -> list[Line]:
        return [
            Line(
                scaled(series(held_out, "experts", layer, key), factor),
                _tone(number, len(layers)),
                layer if named else "",
            )
            for number, layer in enumerate(layers)
        ]

    both = [*lines("heaviest"), *lines("lightest", named=False)]
    return [
        chart("Tokens that no expert takes, %", lines("unused", 100), bands=bands, from_zero=True),
        chart("Tokens that three or more take, %", lines("many", 100), bands=bands, from_zero=True),
        chart("Heaviest and lightest expert, 1 is even", both, bands=bands, log=True),
    ]


def _tone(number: int, count: int) -> str:
    return f"n{round((TONES - 1) * number / max(1, count - 1))}"


def _bands(train: Sequence[Record], phases: Sequence[Record]) -> list[Band]:
    """The phases on the axis of images: from the ledger, and from the records where they go further."""
    bands: list[Band] = []
    for phase in phases:
        start = bands[-1].stop if bands else 0
        bands.append(Band(str(phase.get("name", "")), start, start + int(phase.get("images") or 0)))
    for record in train:
        name, end = str(record.get("phase", "")), bands[-1].stop if bands else 0
        if not name or record["images"] <= end:
            continue
        if bands and bands[-1].name == name:
            bands[-1] = Band(name, bands[-1].start, record["images"])
        else:
            bands.append(Band(name, end, record["images"]))
    return bands
