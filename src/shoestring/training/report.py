"""A run as one HTML file: pictures, scores, curves, cost and settings, whatever of them is there.

    metrics.jsonl ledger.json evaluation.json samples/ previews/ recipe.yaml --write_report--> report.html

Any file may be missing or cut short: its section is left out, and the others stay.
"""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path

from PIL import Image

from shoestring.storage import RunFolder, write_text
from shoestring.training.curves import curves
from shoestring.training.page import footer, page, table
from shoestring.training.records import RunFiles, is_number, read_or_empty
from shoestring.training.scores import find, interval, percent, scores, words
from shoestring.training.students import students
from shoestring.training.svg import short
from shoestring.training.tracking import Record, clock, flops_text, threads_text

GALLERY = 24  # pictures shown of each split
PREVIEWS = 12  # previews shown, spread over the run
SIDE = 320  # larger pictures are shown at this side


def write_report(run: RunFolder) -> Path:
    """Write `report.html` of a run, and return its path."""
    read = RunFiles.read(run)
    found = [
        _gallery(read),
        students(read),
        scores(read),
        curves(read),
        _previews(read),
        _cost(read),
        _settings(read),
    ]
    empty = "" if any(found) else '<p class="soft">Nothing has been recorded in this run yet.</p>'
    sections = [_head(read), *found, empty, footer(f"the files of {run.root.name}/")]
    write_text(run.report, page(f"{read.name}: report", sections))
    return run.report


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


def _head(run: RunFiles) -> str:
    """The name, one line on machine and date, and the figures that matter most."""
    ledger = run.ledger
    facts = [_score_fact(run, "unseen_scenes", "head"), _score_fact(run, "unseen_pairs", "")]
    images, seconds, flops = (run.total(name) for name in ("images", "seconds", "flops"))
    if images:
        facts.append(_fact(f"{images:,}", "images trained on"))
    if seconds:
        facts.append(_fact(clock(seconds), "training time"))
    if flops:
        facts.append(_fact(flops_text(flops), "of computation"))
    if ledger.get("parameters"):
        facts.append(_fact(short(ledger["parameters"]), "parameters"))
    machine = escape(str(ledger.get("hardware", "")))
    return (
        f'<header><p class="eyebrow">Shoestring run</p><h1>{escape(run.name)}</h1>'
        f'<p class="soft">{machine}</p><div class="facts">{"".join(facts)}</div></header>'
    )


def _fact(value: str, what: str, style: str = "") -> str:
    return f'<div class="card fact {style}"><b>{value}</b><span>{what}</span></div>'


def _score_fact(run: RunFiles, split: str, style: str) -> str:
    row = find(run.rows, "scene_accuracy", split, "all")
    if row is None or row["value"] is None:
        return ""
    return _fact(percent(row["value"]), f"exact on {escape(words(split))} ({interval(row)})", style)


# --- pictures --------------------------------------------------------------------------------------------


def _gallery(run: RunFiles) -> str:
    """For each split the first pictures, in order, each with its prompt and whether it is right."""
    parts = []
    for index in sorted(run.folder.samples.glob("*/index.json"), key=_split_order):
        entries = [
            entry for entry in read_or_empty(index, list) if isinstance(entry, dict) and "file" in entry
        ]
        shots = [_shot(index.parent, entry) for entry in entries[:GALLERY]]
        if any(shots):
            split = escape(words(index.parent.name))
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


def _previews(run: RunFiles) -> str:
    """The same prompts and noise, or the same pictures given back, at several moments of the training."""
    paths = sorted(run.folder.previews.glob("*.png"))
    if len(paths) > PREVIEWS:
        last = len(paths) - 1
        paths = [paths[round(k * last / (PREVIEWS - 1))] for k in range(PREVIEWS)]
    shots = []
    prompts: list[str] = []
    told, rows = "The same prompts and the same noise", "The prompts, in rows"
    for path in paths:
        info = read_or_empty(path.with_suffix(".json"), dict)
        prompts = info.get("prompts") or prompts
        if info.get("reconstructions"):
            told, rows = "The same held-out pictures, and below each what became of it,", "Their captions"
        images = info.get("images", int(path.stem) if path.stem.isdigit() else 0)
        picture = _picture(path, f"preview after {images:,} images")
        if picture:
            shots.append(f"<figure>{picture}<figcaption>{images:,} images</figcaption></figure>")
    if not shots:
        return ""
    listed = "".join(f"<li>{escape(str(prompt))}</li>" for prompt in prompts)
    captions = f'<details class="soft"><summary>{rows}</summary><ol>{listed}</ol></details>'
    return (
        "<section><h2>While it learned</h2>"
        f'<p class="soft">{told} at several moments of the training.</p>'
        f'<div class="strip">{"".join(shots)}</div>{captions if listed else ""}</section>'
    )


# --- cost and settings -----------------------------------------------------------------------------------


def _cost(run: RunFiles) -> str:
    """The ledger: machine, then a row a phase and their sum, then the time outside of the steps."""
    ledger = run.ledger
    if not run.phases:
        return ""
    rows = [_cost_row(phase) for phase in run.phases]
    rows.append(_cost_row({"name": "total", **(ledger.get("total") or {})}))
    numbers = ["size", "masked", "images", "steps", "time", "waiting", "images/s", "computation", "FLOP/s"]
    processes = ledger.get("processes") or 1
    machine = [
        ledger.get("hardware"),
        f"device {ledger.get('device', '?')}",
        f"{processes} processes" if processes > 1 else None,
        threads_text(ledger.get("threads")),
        ledger.get("dtype"),
        f"{ledger['parameters']:,} parameters" if ledger.get("parameters") else None,
    ]
    told = " · ".join(escape(str(each)) for each in machine if each)
    cells = table(["phase", *numbers, "memory"], rows, set(range(1, 11)), len(rows) - 1)
    return (
        f'<section><h2>Cost</h2><p class="soft">{told}</p><div class="card">{cells}{_time_spent(run)}</div>'
        "</section>"
    )


def _cost_row(phase: Record) -> list[str]:
    seconds, images = phase.get("seconds") or 0, phase.get("images") or 0
    flops, memory = phase.get("flops") or 0, phase.get("peak_memory_bytes") or 0
    waited, size = phase.get("data_wait_seconds"), phase.get("size")
    return [
        escape(str(phase.get("name", ""))),
        f"{size} px" if size else "",
        _masked(phase.get("mask"), phase.get("mask_end")),
        f"{images:,}",
        f"{phase.get('steps') or 0:,}",
        clock(seconds),
        percent(waited / seconds) if seconds and is_number(waited) else "–",
        f"{images / seconds:,.0f}" if seconds else "–",
        flops_text(flops) if flops else "–",
        flops_text(flops / seconds).replace("FLOP", "FLOP/s") if flops and seconds else "–",
        f"{memory / 2**30:.2f} GiB" if memory else "–",
    ]


def _masked(first: float | None, last: float | None) -> str:
    """The share of patches left out, with where it ends if that is elsewhere."""
    return " → ".join(f"{100 * each:.0f} %" for each in (first, last) if each is not None)


def _time_spent(run: RunFiles) -> str:
    """Where the time went besides the steps, and what "waiting" means; in a line or two."""
    steps = (run.ledger.get("total") or {}).get("seconds") or 0
    extra = {
        words(name.removesuffix("_seconds")): seconds
        for name, seconds in (run.ledger.get("extra") or {}).items()
        if is_number(seconds)
    }
    whole = steps + sum(extra.values())
    parts = [
        f"{escape(name)} {clock(spent)} ({percent(spent / whole)})" for name, spent in extra.items() if whole
    ]
    besides = f"Besides the steps: {', '.join(parts)}; {clock(whole)} in all. " if parts else ""
    behind = run.total("images") - ((run.ledger.get("total") or {}).get("images") or 0)
    later = f"The {behind:,} images since the last checkpoint are not in it yet. " if behind > 0 else ""
    return (
        f'<p class="soft" style="margin:12px 0 0">{besides}{later}Waiting: the share of the time in which a '
        "step had no data yet.</p>"
    )


def _settings(run: RunFiles) -> str:
    if not run.recipe.strip():
        return ""
    return (
        '<section><h2>Settings</h2><div class="card"><details style="margin:0">'
        "<summary>recipe.yaml, resolved: this file repeats the run</summary>"
        f"<pre>{escape(run.recipe)}</pre></details></div></section>"
    )
