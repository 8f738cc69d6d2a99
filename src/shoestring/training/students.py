"""A student beside its teacher, and beside itself before it learned, as a section of a report."""

from __future__ import annotations

from collections.abc import Sequence

from shoestring.interfaces import MetricRow
from shoestring.training.page import table
from shoestring.training.records import RunFiles
from shoestring.training.scores import find, interval, percent, words

COLUMNS = {"teacher": "teacher_", "before distillation": "cut_", "student": ""}
"""A column's head, and how the names of its metrics begin."""

NETWORK = {
    "parameters": "{:,.0f}",
    "forward_flops": "{:,.0f}",
    "forward_ms": "{:.1f}",
}
"""Figures of the networks themselves; a student has its own from the first moment on."""


def students(run: RunFiles) -> str:
    """Teacher, cut and student: size, cost, error to the teacher, scene accuracy; empty for other runs."""
    rows = run.rows
    if find(rows, "parameters", "network", "teacher") is None:
        return ""
    lines = [_network_line(rows, metric, form) for metric, form in NETWORK.items()]
    splits = dict.fromkeys(row["split"] for row in rows if row["metric"] == "teacher_error")
    for split in splits:
        errors = [find(rows, f"{prefix}teacher_error", split, "all") for prefix in ("cut_", "")]
        shown = ["–" if each is None else f"{each['value']:.4g}" for each in errors]
        lines.append([f"error to the teacher, {words(split)}", "0", *shown])
    for split in splits:
        found = [find(rows, f"{prefix}scene_accuracy", split, "all") for prefix in COLUMNS.values()]
        if any(found):
            cells = [
                "–" if each is None else f"{percent(each['value'])} ({interval(each)})" for each in found
            ]
            lines.append([f"scene accuracy, {words(split)}", *cells])
    note = (
        '<p class="soft">Before distillation is the student with the weights it was cut with. The error is '
        "the mean square between the two networks' outputs on held-out images; of a few-step student, "
        "between where one pass of it and the teacher's guided walk end. One forward pass of one picture; "
        "intervals are 95 %.</p>"
    )
    body = table(["", *COLUMNS], lines, {1, 2, 3})
    return f'<section><h2>Beside its teacher</h2>{note}<div class="card">{body}</div></section>'


def _network_line(rows: Sequence[MetricRow], metric: str, form: str) -> list[str]:
    found = (find(rows, metric, "network", name) for name in ("teacher", "student"))
    teacher, student = ("–" if each is None else form.format(each["value"]) for each in found)
    return [words(metric), teacher, student, student]
