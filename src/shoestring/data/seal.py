"""Sealing a store: splits, what was left out, and the manifest, written once every chunk is finished."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shoestring.data.shards import write_lines
from shoestring.data.store import MANIFEST
from shoestring.errors import SourceError
from shoestring.interfaces import Log
from shoestring.runtime import keyed_seed
from shoestring.storage import remove_leftovers, write_json

SKIPPED = "skipped.jsonl"


def seal(out: Path, begun: dict[str, Any], markers: list[dict[str, Any]], max_bad: float, log: Log) -> None:
    """Write `skipped.jsonl` and the manifest; raises `SourceError` where more than `max_bad` are bad.

    A function of the markers alone, so it does not matter which worker does it, or that two do.
    """
    skipped = [each for marker in markers for each in marker["skipped"]]
    reasons = Counter(each["reason"] for each in skipped)
    write_lines(out, SKIPPED, skipped)
    remove_leftovers(out)
    source_rows = sum(marker["source_rows"] for marker in markers)
    check_bad(reasons, source_rows, max_bad)
    cut = Counter[str]()
    for marker in markers:
        cut.update(marker["cut"])
    manifest = begun | {
        "source_rows": source_rows,
        "rows": sum(marker["rows"] for marker in markers),
        "chunks": [marker["rows"] for marker in markers],
        "splits": _splits(markers, begun["held_out"]),
        "skipped": dict(sorted(reasons.items())),
        "cut": dict(cut),
        "mirrored": sum(marker["mirrored"] for marker in markers),
        "files": [entry for marker in markers for entry in marker["files"]],
    }
    write_json(out / MANIFEST, manifest)
    if reasons:
        log(f"left out {counted(reasons)} (listed in {out / SKIPPED})")
    if cut["captions"]:
        log(
            f"warning: {cut['captions']} captions are longer than the text encoder's "
            f"{begun['text_encoder']['max_tokens']} tokens; {cut['tokens']} tokens were cut"
        )


def check_bad(reasons: Mapping[str, int], rows: int, max_bad: float) -> None:
    """Raise `SourceError` where too many of the rows read are bad, or none is good."""
    bad = sum(reasons.values())
    if not rows:
        raise SourceError("the source has no rows. Give one with captioned images.")
    if bad == rows:
        raise SourceError(f"no usable row among {rows}: {counted(reasons)}. {_advice(reasons)}")
    if bad > max_bad * rows:
        enough = min(1.0, math.ceil(100 * bad / rows) / 100)
        raise SourceError(
            f"{bad} of {rows} rows are bad, more than the {max_bad:.0%} allowed: {counted(reasons)}. "
            f"{_advice(reasons)} To go on without them: --max-bad {enough:.2f} (finished chunks are kept)."
        )


def counted(reasons: Mapping[str, int]) -> str:
    """`3 too small, 1 no caption`."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items(), key=lambda i: -i[1]))


def _splits(markers: list[dict[str, Any]], held_out: int) -> dict[str, dict[str, Any]]:
    """The source's own splits, which must be contiguous, or a random part held out of `train`."""
    runs: list[list[Any]] = []
    for name, rows in (run for marker in markers for run in marker["splits"]):
        if runs and runs[-1][0] == name:
            runs[-1][1] += rows
        else:
            runs.append([name, rows])
    if len({name for name, _ in runs}) < len(runs):
        raise SourceError("the source mixes its splits. Rows of one split must follow each other.")
    total = sum(rows for _, rows in runs)
    if held_out >= total:
        raise SourceError(f"held_out {held_out}: there are {total} usable rows. Hold out fewer.")
    if held_out:
        runs = [["held_out", held_out], ["train", total - held_out]]
    key = keyed_seed(0, "held_out") if held_out else 0
    start, splits = 0, {}
    for name, rows in runs:
        place = {"start": start, "stop": start + rows}
        splits[name] = {**place, "shuffled": bool(held_out), "key": key, "total": total}
        start += rows
    return splits


def _advice(reasons: Mapping[str, int]) -> str:
    most = max(reasons, key=lambda reason: reasons[reason])
    return {
        "too small": "Take a smaller --size, or enlarge them with --upscale.",
        "no caption": "Give each image a caption, or name the column with --caption-column.",
    }.get(most, f"Look at {SKIPPED} in the store.")
