"""What evaluation measured, as a section of a report: scene accuracy by facet, then every other figure."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from shoestring.interfaces import MetricRow
from shoestring.training.page import table
from shoestring.training.records import RunFiles
from shoestring.training.svg import bar

FACETS = ("all", "shape", "colour", "place", "count", "background")
SCORES = ("scene_accuracy", "parser_ceiling", "scene_accuracy_shuffled")


def scores(run: RunFiles) -> str:
    """Scene accuracy by facet, a card a split, beside its ceiling and chance; then every other figure."""
    splits = list(dict.fromkeys(row["split"] for row in run.rows if row["metric"] == "scene_accuracy"))
    cards = [_score_card(run.rows, split) for split in splits]
    others = [row for row in run.rows if row["metric"] not in SCORES]
    if not cards and not others:
        return ""
    parts = ["<section><h2>Scores</h2>"]
    if cards:
        parts.append(
            '<p class="soft">Each picture is read back by an exact parser and compared with its prompt. '
            "<b>All</b> asks for every object's shape, colour and place, their number and the background. "
            "Ceiling: the same parser on true pictures. Chance: the pictures against each other's prompts. "
            "Intervals are 95 %.</p>"
        )
        parts.append(f'<div class="scores">{"".join(cards)}</div>')
    if others:
        parts.append(_other_scores(others))
    return "".join(parts) + "</section>"


def _score_card(rows: Sequence[MetricRow], split: str) -> str:
    lines = []
    n = 0
    for facet in FACETS:
        row = find(rows, "scene_accuracy", split, facet)
        if row is None:
            continue
        n = row["n"]
        drawn = "" if row["value"] is None else bar(row["value"], row["low"], row["high"])
        beside = (find(rows, metric, split, facet) for metric in SCORES[1:])
        ceiling, chance = (percent(each["value"]) if each else "–" for each in beside)
        lines.append([facet, drawn, percent(row["value"]), interval(row), ceiling, chance])
    heads = ["", "", "right", "interval", "ceiling", "chance"]
    title = f'<h3>{escape(words(split))} <span class="soft">· {n:,} pictures</span></h3>'
    return f'<div class="card">{title}{table(heads, lines, {2, 3, 4, 5}, 0)}</div>'


def _other_scores(rows: Sequence[MetricRow]) -> str:
    lines = []
    for row in rows:
        value, low, high = (
            "–" if each is None else f"{each:.4g}" for each in (row["value"], row["low"], row["high"])
        )
        names = [escape(words(str(row[key]))) for key in ("metric", "split", "facet")]
        interval = "–" if row["low"] is None else f"{low} – {high}"
        lines.append([*names, value, interval, f"{row['n']:,}", escape(row["status"])])
    heads = ["metric", "split", "facet", "value", "interval", "images", "status"]
    return f'<div class="card" style="margin-top:14px">{table(heads, lines, {3, 4, 5})}</div>'


def find(rows: Sequence[MetricRow], metric: str, split: str, facet: str) -> MetricRow | None:
    """The row of these names, if there is one."""
    wanted = (metric, split, facet)
    return next(
        (row for row in rows if (row.get("metric"), row.get("split"), row.get("facet")) == wanted), None
    )


def percent(value: float | None) -> str:
    """A share as 97.8 %."""
    return "–" if value is None else f"{100 * value:.1f} %"


def interval(row: MetricRow) -> str:
    """A share's 95 % interval as 96.5 – 98.7."""
    if row["low"] is None or row["high"] is None:
        return "–"
    return f"{100 * row['low']:.1f} – {100 * row['high']:.1f}"


def words(name: str) -> str:
    """unseen_scenes as unseen scenes."""
    return name.replace("_", " ")
