"""A run as one HTML file: pictures, scores, curves, cost and settings, whatever of them is there.

    metrics.jsonl ledger.json evaluation.json samples/ previews/ recipe.yaml --write_report--> report.html

Any file may be missing or cut short: its section is left out, and the others stay.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any, cast

import yaml
from PIL import Image

from shoestring.interfaces import MetricRow
from shoestring.storage import RunFolder, read_json, write_text
from shoestring.training.curves import curves
from shoestring.training.page import page, table
from shoestring.training.svg import bar, short
from shoestring.training.tracking import clock, flops_text

GALLERY = 24  # pictures shown of each split
PREVIEWS = 12  # previews shown, spread over the run
SIDE = 320  # larger pictures are shown at this side
FACETS = ("all", "shape", "colour", "place", "count", "background")
SCORES = ("scene_accuracy", "parser_ceiling", "scene_accuracy_shuffled")

Record = Mapping[str, Any]


@dataclass(frozen=True)
class _Run:
    """What could be read of a run folder."""

    folder: RunFolder
    recipe: str
    name: str
    records: tuple[Record, ...]
    ledger: Record
    rows: tuple[MetricRow, ...]

    def kind(self, kind: str) -> list[Record]:
        """The records of one kind, in order."""
        return [record for record in self.records if record.get("kind") == kind]


def write_report(run: RunFolder) -> Path:
    """Write `report.html` of a run, and return its path."""
    read = _read(run)
    found = [
        _gallery(read),
        _scores(read),
        curves(read.records, read.ledger.get("phases") or []),
        _previews(read),
        _cost(read),
        _settings(read),
    ]
    empty = "" if any(found) else '<p class="soft">Nothing has been recorded in this run yet.</p>'
    written = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    footer = f"<footer>Written by Shoestring, {written}, from the files of {escape(run.root.name)}/.</footer>"
    write_text(run.report, page(f"{read.name}: report", [_head(read), *found, empty, footer]))
    return run.report


# --- reading ---------------------------------------------------------------------------------------------


def _read(run: RunFolder) -> _Run:
    recipe = run.recipe.read_text(encoding="utf-8", errors="replace") if run.recipe.is_file() else ""
    try:
        settings = yaml.safe_load(recipe)
    except yaml.YAMLError:
        settings = None
    name = settings.get("name") if isinstance(settings, dict) else None
    rows = _json(run.evaluation, dict).get("rows", [])
    return _Run(
        folder=run,
        recipe=recipe,
        name=str(name or run.root.name),
        records=tuple(_json_lines(run.metrics)),
        ledger=_json(run.ledger, dict),
        rows=tuple(cast(MetricRow, row) for row in rows if MetricRow.__required_keys__ <= set(row)),
    )


def _json(path: Path, kind: type) -> Any:
    """The value in a JSON file, or an empty `kind` where there is none that can be read."""
    try:
        value = read_json(path)
    except (OSError, ValueError):
        return kind()
    return value if isinstance(value, kind) else kind()


def _json_lines(path: Path) -> Iterator[Record]:
    """Records with a count of images; lines cut short are passed over."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("images"), int):
            yield record


def _picture(path: Path, alt: str) -> str:
    """An image element with its picture inside, or nothing where the file is no picture."""
    try:
        with Image.open(path) as image:
            image.load()
            width, height = image.size
            data, kind = path.read_bytes(), "png"
            if max(width, height) > 2 * SIDE or (max(width, height) > SIDE and len(data) > 2**16):
                small = image.convert("RGBA")
                small.thumbnail((2 * SIDE, 2 * SIDE))
                buffer = io.BytesIO()
                small.save(buffer, "WEBP", quality=85)
                data, kind = buffer.getvalue(), "webp"
    except (OSError, ValueError, SyntaxError):  # PIL raises SyntaxError for some broken PNG files
        return ""
    crisp = ' class="pixels"' if max(width, height) < 128 else ""
    uri = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return f'<img{crisp} src="{uri}" alt="{escape(alt)}" loading="lazy">'


# --- head ------------------------------------------------------------------------------------------------


def _head(run: _Run) -> str:
    """The name, one line on machine and date, and the figures that matter most."""
    total, ledger = run.ledger.get("total", {}), run.ledger
    facts = [_score_fact(run, "unseen_scenes", "head"), _score_fact(run, "unseen_pairs", "")]
    train = run.kind("train")
    images = total.get("images") or (train[-1]["images"] if train else 0)
    seconds = total.get("seconds") or (train[-1].get("seconds", 0) if train else 0)
    if images:
        facts.append(_fact(f"{images:,}", "images trained on"))
    if seconds:
        facts.append(_fact(clock(seconds), "training time"))
    if total.get("flops"):
        facts.append(_fact(flops_text(total["flops"]), "of computation"))
    if ledger.get("parameters"):
        facts.append(_fact(short(ledger["parameters"]), "parameters"))
    machine = escape(str(ledger.get("hardware", "")))
    return (
        f'<header><p class="eyebrow">Shoestring run</p><h1>{escape(run.name)}</h1>'
        f'<p class="soft">{machine}</p><div class="facts">{"".join(facts)}</div></header>'
    )


def _fact(value: str, what: str, style: str = "") -> str:
    return f'<div class="card fact {style}"><b>{value}</b><span>{what}</span></div>'


def _score_fact(run: _Run, split: str, style: str) -> str:
    row = _find(run.rows, "scene_accuracy", split, "all")
    if row is None or row["value"] is None:
        return ""
    return _fact(_percent(row["value"]), f"exact on {escape(_words(split))} ({_interval(row)})", style)


def _find(rows: Sequence[MetricRow], metric: str, split: str, facet: str) -> MetricRow | None:
    wanted = (metric, split, facet)
    return next(
        (row for row in rows if (row.get("metric"), row.get("split"), row.get("facet")) == wanted), None
    )


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _interval(row: MetricRow) -> str:
    if row["low"] is None or row["high"] is None:
        return "–"
    return f"{100 * row['low']:.1f} – {100 * row['high']:.1f}"


def _words(name: str) -> str:
    return name.replace("_", " ")


# --- pictures --------------------------------------------------------------------------------------------


def _gallery(run: _Run) -> str:
    """For each split the first pictures, in order, each with its prompt and whether it is right."""
    parts = []
    for index in sorted(run.folder.samples.glob("*/index.json"), key=_split_order):
        entries = [entry for entry in _json(index, list) if isinstance(entry, dict) and "file" in entry]
        shots = [_shot(index.parent, entry) for entry in entries[:GALLERY]]
        if any(shots):
            split = escape(_words(index.parent.name))
            count = f"the first {len(shots)} of {len(entries):,}, not chosen"
            parts.append(f'<h3>{split} <span class="soft">· {count}</span></h3>')
            parts.append(f'<div class="gallery">{"".join(shots)}</div>')
    if not parts:
        return ""
    return f"<section><h2>Prompts and pictures</h2>{''.join(parts)}</section>"


def _split_order(index: Path) -> tuple[int, str]:
    order = ("unseen_scenes", "unseen_pairs")
    name = index.parent.name
    return (order.index(name) if name in order else len(order), name)


def _shot(folder: Path, entry: Record) -> str:
    prompt = str(entry.get("prompt", ""))
    picture = _picture(folder / Path(str(entry["file"])).name, prompt)
    if not picture:
        return ""
    facets = entry.get("facets")
    style = verdict = ""
    if isinstance(facets, dict):
        judged = ("count", "background") if facets.get("count") is False else tuple(facets)
        wrong = ", ".join(name for name in judged if not facets.get(name) and name != "all")
        style, told = ("right", "✓ right") if facets.get("all") else ("wrong", f"✗ wrong {wrong}")
        verdict = f'<span class="verdict">{escape(told)}</span>'
    caption = f"<figcaption>{verdict}{escape(prompt)}</figcaption>"
    return f'<figure class="shot {style}">{picture}{caption}</figure>'


def _previews(run: _Run) -> str:
    """The same prompts and noise at several moments of the training."""
    paths = sorted(run.folder.previews.glob("*.png"))
    if len(paths) > PREVIEWS:
        last = len(paths) - 1
        paths = [paths[round(k * last / (PREVIEWS - 1))] for k in range(PREVIEWS)]
    shots = []
    prompts: list[str] = []
    for path in paths:
        info = _json(path.with_suffix(".json"), dict)
        prompts = info.get("prompts") or prompts
        images = info.get("images", int(path.stem) if path.stem.isdigit() else 0)
        picture = _picture(path, f"preview after {images:,} images")
        if picture:
            shots.append(f"<figure>{picture}<figcaption>{images:,} images</figcaption></figure>")
    if not shots:
        return ""
    listed = "".join(f"<li>{escape(str(prompt))}</li>" for prompt in prompts)
    told = f'<details class="soft"><summary>The prompts, in rows</summary><ol>{listed}</ol></details>'
    return (
        "<section><h2>While it learned</h2>"
        '<p class="soft">The same prompts and the same noise at several moments of the training.</p>'
        f'<div class="strip">{"".join(shots)}</div>{told if listed else ""}</section>'
    )


# --- scores ----------------------------------------------------------------------------------------------


def _scores(run: _Run) -> str:
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
        row = _find(rows, "scene_accuracy", split, facet)
        if row is None:
            continue
        n = row["n"]
        drawn = "" if row["value"] is None else bar(row["value"], row["low"], row["high"])
        beside = (_find(rows, metric, split, facet) for metric in SCORES[1:])
        ceiling, chance = (_percent(each["value"]) if each else "–" for each in beside)
        lines.append([facet, drawn, _percent(row["value"]), _interval(row), ceiling, chance])
    heads = ["", "", "right", "interval", "ceiling", "chance"]
    title = f'<h3>{escape(_words(split))} <span class="soft">· {n:,} pictures</span></h3>'
    return f'<div class="card">{title}{table(heads, lines, {2, 3, 4, 5}, 0)}</div>'


def _other_scores(rows: Sequence[MetricRow]) -> str:
    lines = []
    for row in rows:
        value, low, high = (
            "–" if each is None else f"{each:.4g}" for each in (row["value"], row["low"], row["high"])
        )
        names = [escape(_words(str(row[key]))) for key in ("metric", "split", "facet")]
        interval = "–" if row["low"] is None else f"{low} – {high}"
        lines.append([*names, value, interval, f"{row['n']:,}", escape(row["status"])])
    heads = ["metric", "split", "facet", "value", "interval", "images", "status"]
    return f'<div class="card" style="margin-top:14px">{table(heads, lines, {3, 4, 5})}</div>'


# --- cost and settings -----------------------------------------------------------------------------------


def _cost(run: _Run) -> str:
    """The ledger: machine, then a row a phase and their sum."""
    ledger = run.ledger
    phases = [phase for phase in ledger.get("phases", []) if isinstance(phase, dict)]
    if not phases:
        return ""
    rows = [_cost_row(phase) for phase in phases]
    rows.append(_cost_row({"name": "total", **ledger.get("total", {})}))
    heads = [
        "phase",
        "size",
        "masked",
        "images",
        "steps",
        "time",
        "images/s",
        "computation",
        "FLOP/s",
        "memory",
    ]
    machine = [
        ledger.get("hardware"),
        f"device {ledger.get('device', '?')}",
        f"{ledger.get('threads', '?')} threads",
        ledger.get("dtype"),
        f"{ledger['parameters']:,} parameters" if ledger.get("parameters") else None,
    ]
    told = " · ".join(escape(str(each)) for each in machine if each)
    extra = [
        f"{escape(_words(name.removesuffix('_seconds')))} {clock(seconds)}"
        for name, seconds in (ledger.get("extra") or {}).items()
        if isinstance(seconds, (int, float))
    ]
    besides = f'<p class="soft" style="margin:12px 0 0">Besides: {", ".join(extra)}.</p>' if extra else ""
    return (
        f'<section><h2>Cost</h2><p class="soft">{told}</p><div class="card">'
        f"{table(heads, rows, set(range(1, 10)), len(rows) - 1)}{besides}</div></section>"
    )


def _cost_row(phase: Record) -> list[str]:
    seconds, images = phase.get("seconds") or 0, phase.get("images") or 0
    flops, memory = phase.get("flops") or 0, phase.get("peak_memory_bytes") or 0
    size, mask = phase.get("size"), phase.get("mask")
    return [
        escape(str(phase.get("name", ""))),
        f"{size} px" if size else "",
        "" if mask is None else f"{100 * mask:.0f} %",
        f"{images:,}",
        f"{phase.get('steps') or 0:,}",
        clock(seconds),
        f"{images / seconds:,.0f}" if seconds else "–",
        flops_text(flops) if flops else "–",
        flops_text(flops / seconds).replace("FLOP", "FLOP/s") if flops and seconds else "–",
        f"{memory / 2**30:.2f} GiB" if memory else "–",
    ]


def _settings(run: _Run) -> str:
    if not run.recipe.strip():
        return ""
    return (
        '<section><h2>Settings</h2><div class="card"><details style="margin:0">'
        "<summary>recipe.yaml, resolved: this file repeats the run</summary>"
        f"<pre>{escape(run.recipe)}</pre></details></div></section>"
    )
