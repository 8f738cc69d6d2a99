"""What an encoding is made of, fixed by whoever begins it and compared by all who go on with it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from shoestring.data.manifest import BEGUN, addition_name, read_begun, signed
from shoestring.data.rows import Source
from shoestring.errors import StoreError
from shoestring.storage import aside_of, remove, write_json, writing_to

CALIBRATION_CAPTIONS = 256
CALIBRATION_ROWS = 4096

CALIBRATED = ("text_channels",)  # measured by whoever begins; the others take them over
_NAMES = ("format", "shoestring", "command", "words")  # entries that change no number
_PLACES = ("path", "id", "revision")  # ... and those of any source or encoder: where it was found


def begin(
    store: Path,
    asked: Mapping[str, Any],
    calibrated: Callable[[], Mapping[str, Any]],
    *,
    addition: str = "",
    instead: str = "another --out",
) -> dict[str, Any]:
    """What a store, or an addition to it, was begun with: must be as `asked`, or is `asked` and calibrated.

    Several workers may begin at once: the first to write is the one whose settings all of them use. Raises
    `StoreError` where it was begun with other settings, or cannot be read.
    """
    path = store / (addition_name(addition) if addition else BEGUN)
    if not path.is_file():
        _write_once(path, signed({**asked, **calibrated()}))
    begun = read_begun(store, addition)
    differences = list(_differences(_with_dataset(begun), asked))
    if differences:
        raise StoreError(
            f"{store}: was begun with other settings: {'; '.join(differences[:6])}. "
            f"Use the same settings, or {instead}."
        )
    return begun


def first_captions(captions: Iterable[tuple[str, ...]]) -> list[str]:
    """The unique captions of the first rows, as many as calibration wants and in their order."""
    found: dict[str, None] = {}
    for number, each in enumerate(captions):
        if number >= CALIBRATION_ROWS or len(found) >= CALIBRATION_CAPTIONS:
            break
        found.update(dict.fromkeys(each))
    return list(found)[:CALIBRATION_CAPTIONS]


def captions_of_source(source: Source) -> list[str]:
    """`first_captions` of a source's rows."""
    rows = source.rows(0, CALIBRATION_ROWS)
    return first_captions(row.captions for row in rows)


def _write_once(path: Path, value: Mapping[str, Any]) -> None:
    """Write `path` unless another process did so first: a hard link is refused where there is a file."""
    mine = aside_of(path)
    try:
        write_json(mine, value)
        with writing_to(path):
            try:
                os.link(mine, path)
            except FileExistsError:
                return
            except OSError:  # a file system without hard links: the last to begin wins, and shards of others
                os.replace(mine, path)  # are found to be foreign when the store is sealed
    finally:
        remove(mine)


def _differences(begun: Any, asked: Any, name: str = "") -> Iterator[str]:
    """What two descriptions of a store disagree on, apart from names that change no number."""
    if name in (*_NAMES, *CALIBRATED):
        return
    if isinstance(begun, dict) and isinstance(asked, Mapping):
        for key in sorted(begun.keys() | asked.keys()):
            yield from _differences(begun.get(key), asked.get(key), f"{name}.{key}".lstrip("."))
    elif name.endswith(".commit") and "" in (begun, asked):
        return  # the hub could not be asked
    elif begun != asked and name.rpartition(".")[2] not in _PLACES:
        yield f"{name} {begun} there, {asked} now"


def _with_dataset(begun: Mapping[str, Any]) -> dict[str, Any]:
    """`begun` with the data set of hub sources, which versions up to 0.1 noted in their path alone."""
    whole = dict(begun)
    for key in ("source", "captions"):
        source = begun.get(key)
        if isinstance(source, Mapping) and source.get("kind") == "hub" and "dataset" not in source:
            whole[key] = {**source, "dataset": str(source["path"]).partition("@")[0], "commit": ""}
    return whole
