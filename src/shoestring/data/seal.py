"""Sealing a store: splits, what was left out, and the manifest, written once every chunk is finished.

Additions to the store (add.py) whose chunks are all finished go into the manifest as well.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shoestring.data.begun import CALIBRATED
from shoestring.data.chunks import Markers, work_of
from shoestring.data.manifest import (
    FORMAT,
    MANIFEST,
    SKIPPED,
    addition_name,
    check_origins,
    marker_name,
    read_begun,
    records_of,
    signed,
)
from shoestring.data.shards import write_lines
from shoestring.data.text_column import combined
from shoestring.errors import SourceError
from shoestring.interfaces import Log
from shoestring.runtime import keyed_seed
from shoestring.storage import read_json, remove_leftovers, sha256, write_json


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
    cut = sum_of(markers, "cut")
    entries = [entry for marker in markers for entry in marker["files"]]
    check_origins(out, begun, entries)
    manifest = begun | {
        "format": FORMAT,
        "source_rows": source_rows,
        "rows": sum(marker["rows"] for marker in markers),
        "chunks": [marker["rows"] for marker in markers],
        "splits": _splits(markers, begun["held_out"]),
        "skipped": dict(sorted(reasons.items())),
        "cut": cut,
        "mirrored": sum(marker["mirrored"] for marker in markers),
        **measured(markers),
        "work": max(work_of(out), _work_before(out), key=_rows_of),
        "files": entries,
        "records": records_of(out, len(markers)),
    }
    write_manifest(out, manifest)
    if reasons:
        log(f"left out {counted(reasons)} (listed in {out / SKIPPED})")
    tell_cut(cut, begun["text_encoder"]["max_tokens"], log)


def _work_before(out: Path) -> list[dict[str, Any]]:
    """What the manifest says of work so far: a copy of a store has no work/, or only that of mending it."""
    try:
        return list(read_json(out / MANIFEST)["work"])
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _rows_of(work: list[dict[str, Any]]) -> int:
    return sum(int(each["rows"]) for each in work)


def sum_of(markers: Sequence[Mapping[str, Any]], name: str) -> dict[str, int]:
    """The sum of what markers count under a name."""
    total = Counter[str]()
    for marker in markers:
        total.update(marker[name])
    return dict(total)


def tell_cut(cut: Mapping[str, int], max_tokens: int, log: Log) -> None:
    """Warn of captions that were cut."""
    if cut.get("captions"):
        log(
            f"warning: {cut['captions']} captions are longer than the text encoder's {max_tokens} tokens; "
            f"{cut['tokens']} tokens were cut"
        )


def write_manifest(out: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest with every finished addition; anew where one was finished meanwhile."""
    written = None
    while (whole := _with_additions(out, manifest)) != written:
        write_json(out / MANIFEST, signed(whole))
        written = whole


def merged(manifest: dict[str, Any], addition: str, begun: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest with an addition's sizes and captions."""
    sizes = {**manifest["sizes"], **begun.get("sizes", {})}
    calibrated = {name: begun[name] for name in CALIBRATED if name in begun}
    texts = {name: {**said, **calibrated} for name, said in begun.get("texts", {}).items()}
    added = {**manifest.get("added", {}), addition: {"words": begun["words"], "columns": begun["columns"]}}
    return manifest | {
        "sizes": dict(sorted(sizes.items(), key=lambda item: int(item[0]))),
        "texts": dict(sorted({**manifest.get("texts", {}), **texts}.items())),
        "added": dict(sorted(added.items())),
    }


def measured(markers: list[dict[str, Any]]) -> dict[str, Any]:
    """`text_measured`: captions and tokens stored, and how far these are from what was encoded."""
    parts = [marker["text"] for marker in markers if "text" in marker]
    if not parts or len(parts) < len(markers):  # some were encoded by a version that did not measure
        return {}
    counts = {name: sum(part[name] for part in parts) for name in ("captions", "tokens")}
    return {"text_measured": {**counts, "error": combined(part["error"] for part in parts)}}


def _with_additions(out: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    files = {entry["path"]: entry for entry in manifest["files"]}
    records = dict(manifest.get("records", {}))
    for path in sorted((out / addition_name("")).parent.glob("*.json")):
        name, begun = path.stem, read_begun(out, path.stem)
        markers = Markers(out, begun["columns"], name).all(len(manifest["chunks"]))
        if markers is None:
            continue
        before = manifest.get("added", {}).get(name, {}).get("work", [])  # a copy of a store has no work/
        manifest = merged(manifest, name, begun)
        manifest["added"][name] |= {**measured(markers), "work": work_of(out, name) or before}
        files |= {entry["path"]: entry for marker in markers for entry in marker["files"]}
        names = [addition_name(name), *(marker_name(chunk, name) for chunk in range(len(markers)))]
        records |= {each: sha256(out / each) for each in names}
    return manifest | {"format": FORMAT, "files": list(files.values()), "records": records}


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
