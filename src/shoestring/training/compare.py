"""Several runs as one HTML file: their curves in the same axes and one table; and the table as text.

RUN RUN ... --read_runs--> files of each --write_comparison--> compare.html
                                         --text_table-->       the terminal
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from shoestring.errors import OutputError, RecipeError
from shoestring.storage import RunFolder, write_text
from shoestring.training.comparison import Block, cautions, comparison, cut
from shoestring.training.curves import in_units, noise_levels, scaled, time_unit, wide
from shoestring.training.page import footer, page, table
from shoestring.training.records import Point, RunFiles, X, images_of, phase_ends, series
from shoestring.training.svg import Line, chart, smoothed, thinned, value_at
from shoestring.training.tracking import clock, flops_text, flops_unit

LETTERS = "ABCDEFGH"
PLACES = 150  # points of a curve
WIDEST = 24  # characters of a cell of the text table
UNEQUAL = 20  # runs so many times as long as others are drawn on a logarithmic axis of images


def read_runs(paths: Sequence[Path]) -> list[RunFiles]:
    """What the runs to compare hold; raises `RecipeError` unless they are two to eight different ones.

    Raises `CheckpointError` for a folder that is no run.
    """
    if not 2 <= len(paths) <= len(LETTERS):
        raise RecipeError(
            f"{len(paths)} run{'s' if len(paths) != 1 else ''} to compare: give two to {len(LETTERS)}, "
            "such as `shoestring compare runs/demo runs/other`."
        )
    places: dict[Path, Path] = {}
    for path in paths:
        if (place := path.resolve()) in places:
            raise RecipeError(f"{path}: the same run as {places[place]}. Give each run once.")
        places[place] = path
    return [RunFiles.read(RunFolder.open(path)) for path in paths]


def write_comparison(runs: Sequence[RunFiles], out: Path) -> Path:
    """Write the page to `out` and return its path; raises `OutputError` where `out` is a folder."""
    if out.is_dir():
        raise OutputError(f"{out}: is a folder. Give --out a file, such as {out / 'compare.html'}.")
    names = run_names(runs)
    told = "".join(f'<p class="soft note">{escape(each)}</p>' for each in cautions(runs))
    sections = [
        _head(runs, names),
        told and f'<section style="margin-top:24px">{told}</section>',
        _curves(runs, names),
        _in_numbers(comparison(runs), names),
        _noise_levels(runs, names),
        footer(", ".join(f"{run.folder.root}/" for run in runs)),
    ]
    write_text(out, page(" · ".join(names), sections))
    return out


def text_table(runs: Sequence[RunFiles]) -> str:
    """The table and what keeps figures from being compared, for a terminal."""
    blocks = comparison(runs)
    heads = [f"{letter} {name}" for letter, name in zip(LETTERS, run_names(runs), strict=False)]
    rows = [("", heads), *(row for block in blocks for row in block.rows)]
    label_width = max(len(label) for label, _ in rows) + 4
    widths = [min(WIDEST, max(len(cells[k]) for _, cells in rows)) + 2 for k in range(len(runs))]

    def line(label: str, cells: Sequence[str]) -> str:
        aligned = "".join(f"{cut(cell, WIDEST):<{width}}" for cell, width in zip(cells, widths, strict=True))
        return f"{label:<{label_width}}{aligned}".rstrip()

    lines = [line("", heads)]
    for block in blocks:
        lines += ["", block.title, *(line(f"  {label}", cells) for label, cells in block.rows)]
    if told := cautions(runs):
        lines += ["", *(f"Caution: {each}" for each in told)]
    return "\n".join(lines)


def run_names(runs: Sequence[RunFiles]) -> list[str]:
    """The runs' names; the path given for those that share one."""
    names = [run.name for run in runs]
    return [
        name if names.count(name) == 1 else str(run.folder.root)
        for name, run in zip(names, runs, strict=True)
    ]


# --- page ------------------------------------------------------------------------------------------------


def _head(runs: Sequence[RunFiles], names: Sequence[str]) -> str:
    cards = []
    for number, (run, name) in enumerate(zip(runs, names, strict=True)):
        images, seconds, flops = (run.total(each) for each in ("images", "seconds", "flops"))
        facts = [
            f"{images:,} images" if images else "",
            clock(seconds) if seconds else "",
            flops_text(flops) if flops else "",
        ]
        told = " · ".join(fact.replace(" ", "&nbsp;") for fact in facts if fact) or "nothing recorded yet"
        cards.append(
            f'<div class="card">{_chip(number)}<b>{escape(name)}</b><p class="soft">{told}<br>'
            f"{escape(str(run.folder.root))}/</p></div>"
        )
    return (
        '<header><p class="eyebrow">Shoestring</p><h1>Runs compared</h1>'
        f'<div class="runs">{"".join(cards)}</div></header>'
    )


def _chip(number: int) -> str:
    return f'<span class="chip r{number}">{LETTERS[number]}</span>'


def _in_numbers(blocks: Sequence[Block], names: Sequence[str]) -> str:
    rows: list[list[str]] = []
    groups = {}
    for block in blocks:
        groups[len(rows)] = escape(block.title)
        for label, cells in block.rows:
            rows.append([escape(label).replace("  ", "&emsp;"), *map(escape, cells)])
    heads = ["", *(f"{_chip(number)}{escape(name)}" for number, name in enumerate(names))]
    return (
        "<section><h2>In numbers</h2>"
        '<p class="soft">Training losses are running means. Intervals are 95 %.</p>'
        f'<div class="card">{table(heads, rows, set(), groups=groups)}</div></section>'
    )


def _curves(runs: Sequence[RunFiles], names: Sequence[str]) -> str:
    second, time = time_unit(max(run.total("seconds") for run in runs))
    flop, flops = flops_unit(max(run.total("flops") for run in runs))

    def over(title: str, kind: str, key: str, factor: float = 1.0, **how: Any) -> str:
        x = how.get("x", images_of)
        curves = [scaled(series(run.kind(kind), key, x=x), factor) for run in runs]
        return _chart(title, runs, curves, names, **how)

    figures = [
        over("Loss", "train", "loss"),
        over("Loss by training time", "train", "loss", x=in_units("seconds", second), x_label=time),
        over("Loss by computation", "train", "loss", x=in_units("flops", flop), x_label=flops),
        over("Held-out loss", "held_out", "loss", smooth=False),
        over("Gradient norm", "train", "grad_norm"),
        over("Learning rate", "train", "lr", smooth=False, from_zero=True),
        over("Images a second", "train", "images_per_second", from_zero=True),
        over("Waiting for data, % of the time", "train", "data_wait", 100, from_zero=True),
    ]
    if not any(figures):
        return ""
    return (
        '<section><h2>Curves</h2><p class="soft">Lines are running means. The letter at its end tells the '
        f'run, a ring that a phase ends.</p><div class="grid">{"".join(figures)}</div></section>'
    )


def _noise_levels(runs: Sequence[RunFiles], names: Sequence[str]) -> str:
    """A chart for each noise level that at least two runs have."""
    parts = []
    for kind, title in (("held_out", "Held-out loss by noise level"), ("train", "Loss by noise level")):
        records = [run.kind(kind) for run in runs]
        found = [noise_levels(each) for each in records]
        met = sorted({float(level) for levels in found for level in levels})
        figures = []
        for sigma in met:
            curves = [
                next((series(each, "by_noise", level) for level in levels if float(level) == sigma), [])
                for each, levels in zip(records, found, strict=True)
            ]
            if sum(map(bool, curves)) >= 2:
                head = f"log σ {sigma:g}"
                figures.append(_chart(head, runs, curves, names, smooth=kind == "train"))
        if any(figures):
            parts.append(f'<section><h2>{title}</h2><div class="grid">{"".join(figures)}</div></section>')
    return "".join(parts)


def _chart(
    title: str,
    runs: Sequence[RunFiles],
    curves: Sequence[Sequence[Point]],
    names: Sequence[str],
    *,
    x: X = images_of,
    x_label: str = "images",
    smooth: bool = True,
    from_zero: bool = False,
) -> str:
    """A line a run, with a ring where a phase ends."""
    lines = []
    for number, (run, curve, name) in enumerate(zip(runs, curves, names, strict=True)):
        ends = phase_ends(run.kind("train"), x)
        points = smoothed(curve, places=PLACES, breaks=ends) if smooth else thinned(curve)
        rings = [(end, value_at(points, end)) for end in ends] if points else []
        lines.append(Line(points, f"r{number}", name, LETTERS[number], rings))
    drawn = [point for line in lines for point in line.points]
    lengths = [line.points[-1][0] for line in lines if line.points]
    unequal = bool(lengths) and max(lengths) > UNEQUAL * min(lengths) > 0
    log = not from_zero and wide(drawn)
    return chart(title, lines, x_label=x_label, log=log, log_x=unequal, from_zero=from_zero)
