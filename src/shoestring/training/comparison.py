"""Runs side by side, as rows of text: what differs in their recipes, how far they are, loss, scores, cost."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shoestring.interfaces import MetricRow
from shoestring.training.records import Point, RunFiles, is_number, phase_ends, series
from shoestring.training.scores import SCORES, find, interval, percent, words
from shoestring.training.svg import short, smoothed, value_at
from shoestring.training.tracking import clock, flops_text, threads_text

NONE = "–"
LONGEST = 44  # characters of a setting's value
PHASE_KEYS = ("size", "images", "batch", "mask", "lr")


@dataclass(frozen=True)
class Block:
    """Rows of one kind: a label and a cell for each run."""

    title: str
    rows: list[tuple[str, list[str]]]


def comparison(runs: Sequence[RunFiles]) -> list[Block]:
    """All that runs can be compared by, in blocks that are not empty; a run without a figure has a dash."""
    blocks = [
        Block("Recipe, where it differs", _settings_rows([run.settings for run in runs])),
        Block("Training", _rows(runs, TRAINING)),
        Block("Loss", _loss_rows(runs)),
        Block("Scores", _score_rows(runs)),
        Block("Cost", _cost_rows(runs)),
    ]
    return [block for block in blocks if block.rows]


def cautions(runs: Sequence[RunFiles]) -> list[str]:
    """What keeps the runs' figures from being compared as they stand, a sentence each."""
    changed = {key for key, _ in _settings_rows([run.settings for run in runs])}
    told = []
    if any(key.startswith("objective") or ".objective" in key for key in changed):
        told.append("Their objectives differ, so their losses measure different things.")
    if any(key.startswith("data.") for key in changed):
        told.append("They were not trained on the same data, so neither loss nor scores are quite alike.")
    if "evaluation.loss_levels" in changed or "evaluation.loss_images" in changed:
        told.append("Held-out losses were taken at other noise levels or on other numbers of images.")
    measured = [run.measured for run in runs if run.measured]
    if any(each != measured[0] for each in measured):
        told.append("Their scores were measured with different settings (the rows of Scores say which).")
    machines = {(run.ledger.get("hardware"), run.ledger.get("device")) for run in runs if run.ledger}
    if len(machines) > 1:
        told.append("They ran on different machines, so their times are not alike.")
    return told


def cut(text: str, longest: int) -> str:
    """A text of at most so many characters."""
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


# --- recipes ---------------------------------------------------------------------------------------------


def _settings_rows(recipes: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Each key of the recipes whose value is not the same in all, phases by their names."""
    shared = set.intersection(*(set(_phases(recipe)) for recipe in recipes)) if recipes else set()
    flat = [_flat(recipe, shared) for recipe in recipes]
    keys = dict.fromkeys(key for each in flat for key in each if key != "name")
    rows = [(key, [each.get(key, NONE) for each in flat]) for key in keys]
    return [(key, cells) for key, cells in rows if len(set(cells)) > 1]


def _phases(recipe: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    phases = recipe.get("phases")
    found = [phase for phase in phases if isinstance(phase, dict)] if isinstance(phases, list) else []
    return {str(phase.get("name", number)): phase for number, phase in enumerate(found)}


def _flat(recipe: Mapping[str, Any], shared: Iterable[str]) -> dict[str, str]:
    """Dotted key -> value as text; a phase that is not `shared` by all recipes is one value."""
    flat: dict[str, str] = {}
    for name, phase in _phases(recipe).items():
        if name in shared:
            flat |= _leaves(phase, f"phases.{name}")
        else:
            told = [f"{key} {_shown(phase[key])}" for key in PHASE_KEYS if key in phase]
            flat[f"phases.{name}"] = ", ".join(told)
    return {**_leaves({key: value for key, value in recipe.items() if key != "phases"}, ""), **flat}


def _leaves(value: Any, key: str) -> dict[str, str]:
    if not isinstance(value, dict) or not value:
        return {key: _shown(value)}
    leaves: dict[str, str] = {}
    for name, inner in value.items():
        leaves |= _leaves(inner, f"{key}.{name}" if key else str(name))
    return leaves


def _shown(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return cut(
        value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str), LONGEST
    )


# --- training and cost -----------------------------------------------------------------------------------


def _rows(
    runs: Sequence[RunFiles], facts: Mapping[str, Callable[[RunFiles], str]]
) -> list[tuple[str, list[str]]]:
    """A row a fact that at least one run knows."""
    rows = [(label, [fact(run) or NONE for run in runs]) for label, fact in facts.items()]
    return [(label, cells) for label, cells in rows if set(cells) != {NONE}]


def _progress(run: RunFiles) -> str:
    counts = [phase.get("images") for phase in _phases(run.settings).values()]
    planned = sum(count for count in counts if is_number(count))
    if not planned:
        return ""
    share = run.total("images") / planned
    return "finished" if share >= 1 else f"{100 * share:.0f} % of {planned:,.0f}"


def _seconds(run: RunFiles) -> str:
    return clock(run.total("seconds")) if run.total("seconds") else ""


def _spent(what: str) -> Callable[[RunFiles], str]:
    """The time outside of the steps that the ledger has under a name such as checkpoint_seconds."""

    def spent(run: RunFiles) -> str:
        seconds = (run.ledger.get("extra") or {}).get(what)
        return clock(seconds) if is_number(seconds) else ""

    return spent


def _speed(run: RunFiles) -> str:
    seconds = run.total("seconds")
    return f"{run.total('images') / seconds:,.0f}" if seconds else ""


def _flops(run: RunFiles) -> str:
    return flops_text(run.total("flops")) if run.total("flops") else ""


def _flops_rate(run: RunFiles) -> str:
    flops, seconds = run.total("flops"), run.total("seconds")
    return flops_text(flops / seconds).replace("FLOP", "FLOP/s") if flops and seconds else ""


def _memory(run: RunFiles) -> str:
    peaks = [value for _, value in series(run.kind("train"), "memory_bytes")]
    peak = max([run.total("peak_memory_bytes"), *peaks])
    return f"{peak / 2**30:.2f} GiB" if peak else ""


def _waiting(run: RunFiles) -> str:
    total = run.ledger.get("total") or {}
    waited, seconds = total.get("data_wait_seconds"), total.get("seconds")
    if is_number(waited) and seconds:
        return percent(waited / seconds)
    shares = [share for _, share in series(run.kind("train"), "data_wait")]
    return percent(sum(shares) / len(shares)) if shares else ""


def _machine(run: RunFiles) -> str:
    return str(run.ledger.get("hardware") or "")


def _how(run: RunFiles) -> str:
    ledger = run.ledger
    processes = ledger.get("processes") or 1
    parts = [
        ledger.get("device"),
        ledger.get("dtype"),
        f"{processes} processes" if processes > 1 else None,
        threads_text(ledger.get("threads")),
    ]
    return ", ".join(str(part) for part in parts if part)


TRAINING: Mapping[str, Callable[[RunFiles], str]] = {
    "progress": _progress,
    "images": lambda run: f"{run.total('images'):,}" if run.total("images") else "",
    "steps": lambda run: f"{run.total('steps'):,}" if run.total("steps") else "",
    "parameters": lambda run: short(run.ledger["parameters"]) if run.ledger.get("parameters") else "",
}

COST: Mapping[str, Callable[[RunFiles], str]] = {
    "images/s": _speed,
    "computation": _flops,
    "FLOP/s": _flops_rate,
    "waiting for data": _waiting,
    "peak memory": _memory,
    "machine": _machine,
    "how": _how,
}


def _cost_rows(runs: Sequence[RunFiles]) -> list[tuple[str, list[str]]]:
    """Time in steps and besides, then what else a run costs, and on what."""
    extra = dict.fromkeys(name for run in runs for name in run.ledger.get("extra") or {})
    besides = {f"  {words(name.removesuffix('_seconds'))}": _spent(name) for name in extra}
    return _rows(runs, {"time in steps": _seconds, **besides, **COST})


# --- loss and scores -------------------------------------------------------------------------------------


def _loss_rows(runs: Sequence[RunFiles]) -> list[tuple[str, list[str]]]:
    """The running mean at the end, and where runs are of different lengths, where the shortest ends."""
    curves = [_smooth_loss(run) for run in runs]
    rows = [("training loss at the end", [_number(curve[-1][1]) if curve else NONE for curve in curves])]
    ends = [curve[-1][0] for curve in curves if curve]
    if len(set(ends)) > 1:
        cells = [_number(value_at(curve, min(ends))) if curve else NONE for curve in curves]
        rows.append((f"training loss at {min(ends):,.0f} images", cells))
    last = [series(run.kind("held_out"), "loss")[-1:] for run in runs]
    rows.append(("held-out loss, the last", [_number(each[0][1]) if each else NONE for each in last]))
    if len({each[0][0] for each in last if each}) > 1:
        rows.append(("  after images", [f"{each[0][0]:,}" if each else NONE for each in last]))
    return [(label, cells) for label, cells in rows if set(cells) != {NONE}]


def _smooth_loss(run: RunFiles) -> list[Point]:
    train = run.kind("train")
    return smoothed(series(train, "loss"), breaks=phase_ends(train))


def _score_rows(runs: Sequence[RunFiles]) -> list[tuple[str, list[str]]]:
    """Each score's figure over everything, with its 95 % interval, and the settings that differ."""
    names = dict.fromkeys(
        (row["metric"], row["split"])
        for run in runs
        for row in run.rows
        if row["facet"] == "all" and row["metric"] not in SCORES[1:]
    )
    rows = []
    for metric, split in names:
        cells = [_score(find(run.rows, metric, split, "all")) for run in runs]
        rows.append((f"{words(metric)}, {words(split)}", cells))
    for key in dict.fromkeys(key for run in runs for key in run.measured):
        cells = [_shown(run.measured[key]) if key in run.measured else NONE for run in runs]
        if len(set(cells) - {NONE}) > 1:
            rows.append((f"measured with {key}", cells))
    return rows


def _score(row: MetricRow | None) -> str:
    if row is None:
        return NONE
    if row["value"] is None:
        return row["status"]
    if row["metric"] in SCORES:
        return f"{percent(row['value'])} ({interval(row)})"
    if row["low"] is None or row["high"] is None:
        return _number(row["value"])
    return f"{_number(row['value'])} ({_number(row['low'])} – {_number(row['high'])})"


def _number(value: float) -> str:
    return f"{value:.4g}"
