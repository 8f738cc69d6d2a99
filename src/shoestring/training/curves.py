"""A run's curves: loss, held-out loss by noise level, learning rate, gradient norm, speed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from shoestring.training.svg import Band, Line, Mark, chart, smoothed, thinned

Record = Mapping[str, Any]


def curves(records: Sequence[Record], phases: Sequence[Record]) -> str:
    """The section made of metrics.jsonl's records and the ledger's phases; empty without records."""
    train = _of_kind(records, "train")
    bands = _bands(train, phases)
    events = _of_kind(records, "event")
    marks = [Mark(event["images"], str(event.get("text", ""))) for event in events]
    loss = _series(train, "loss")
    figures = [
        _loss_chart("Loss", loss, bands, marks),
        _held_out_chart(_of_kind(records, "held_out"), bands),
        chart("Learning rate", [Line(_series(train, "lr"))], bands=bands, from_zero=True),
        _loss_chart("Gradient norm", _series(train, "grad_norm"), bands, marks),
        chart(
            "Images a second",
            [Line(thinned(_series(train, "images_per_second")), "raw"), *_smooth(train, "images_per_second")],
            bands=bands,
            from_zero=True,
        ),
        _by_time(train),
    ]
    if not any(figures):
        return ""
    note = "Bands are the phases. " + ("Triangles are events: point at them. " if marks else "")
    return (
        f'<section><h2>Curves</h2><p class="soft">{note}Faint lines are single readings, strong lines their '
        f'running mean.</p><div class="grid">{"".join(figures)}</div></section>'
    )


def _of_kind(records: Sequence[Record], kind: str) -> list[Record]:
    return [record for record in records if record.get("kind") == kind]


def _series(
    records: Sequence[Record], name: str, x: Callable[[Record], float] = lambda record: record["images"]
) -> list[tuple[float, float]]:
    """(x, value) of the records that have a finite number under `name`."""
    pairs = ((x(record), record.get(name)) for record in records)
    return [(at, value) for at, value in pairs if isinstance(value, (int, float)) and math.isfinite(value)]


def _smooth(records: Sequence[Record], name: str) -> list[Line]:
    return [Line(smoothed(_series(records, name)))]


def _loss_chart(
    title: str,
    points: list[tuple[float, float]],
    bands: Sequence[Band],
    marks: Sequence[Mark],
    x_label: str = "images",
) -> str:
    lines = [Line(thinned(points), "raw"), Line(smoothed(points))]
    return chart(title, lines, bands=bands, marks=marks, x_label=x_label, log=_wide(points))


def _wide(points: Sequence[tuple[float, float]]) -> bool:
    """Whether values span so much that a logarithmic axis shows them better."""
    values = [value for _, value in points]
    return bool(values) and min(values) > 0 and max(values) > 4 * min(values)


def _by_time(train: Sequence[Record]) -> str:
    timed = [record for record in train if isinstance(record.get("seconds"), (int, float))]
    points = _series(timed, "loss", lambda record: record["seconds"] / 60)
    return _loss_chart("Loss by training time", points, [], [], x_label="minutes")


def _held_out_chart(records: Sequence[Record], bands: Sequence[Band]) -> str:
    """Loss on held-out images, a line a noise level from cool (little noise) to warm, and their mean."""
    levels = sorted({level for record in records for level in record.get("by_noise") or {}}, key=float)
    lines = []
    for k, level in enumerate(levels):
        points = [
            (record["images"], record["by_noise"][level])
            for record in records
            if level in (record.get("by_noise") or {})
        ]
        tone = round(7 * k / max(1, len(levels) - 1))
        lines.append(Line(points, f"n{tone}", f"log σ {float(level):g}"))
    if len(levels) != 1:
        lines.append(Line(_series(records, "loss"), "mean", "mean" if levels else ""))
    spread = [point for line in lines for point in line.points]
    return chart("Held-out loss by noise level", lines, bands=bands, log=_wide(spread))


def _bands(train: Sequence[Record], phases: Sequence[Record]) -> list[Band]:
    """The phases on the axis of images: from the ledger, else from the records."""
    bands: list[Band] = []
    end = 0
    for phase in phases:
        start, end = end, end + int(phase.get("images", 0))
        bands.append(Band(str(phase.get("name", "")), start, end))
    if bands:
        return bands
    for record in train:
        name = str(record.get("phase", ""))
        if bands and bands[-1].name == name:
            bands[-1] = Band(name, bands[-1].start, record["images"])
        elif name:
            bands.append(Band(name, bands[-1].stop if bands else 0, record["images"]))
    return bands
