"""Whether a store's files are what its manifest says, what is wrong with those that are not, and the cure.

A shard is compared with its CRC-32 when it is first used, which reads it whole. That is remembered while the
file's size and times stay as they are: within a process for every file it used, beyond it for files that a
`shoestring store verify` or `copy` found whole, which leaves a list (verified.json) beside the manifest.
"""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoestring.data.manifest import (
    BEGUN,
    MANIFEST,
    SKIPPED,
    VERIFIED,
    addition_of,
    chunk_of,
    command_of,
    encode_again,
    listed,
    marker_name,
    signed,
)
from shoestring.data.shards import says_of_itself
from shoestring.errors import OutputError
from shoestring.storage import crc32, sha256, write_json

SETTLED = 2_000_000_000  # ns: a file changed more recently could change again and show the same time

Entry = Mapping[str, Any]
"""What the manifest says of a file: path, rows, bytes, crc32, sha256 and, since format 2, origin."""

Identity = tuple[int, int, int]

_whole: dict[str, tuple[Identity, int]] = {}  # path -> its state when its CRC was taken, and that


def identity(path: Path) -> Identity:
    """Size, time of the last change of content, and of anything (which no program can set)."""
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def matches(path: Path, entry: Entry, verified: Identity | None = None) -> bool:
    """Whether a file is what its entry says: by its CRC-32, or as remembered. Raises OSError without it."""
    now = identity(path)
    known = _whole.get(str(path))
    if now == verified or known == (now, entry["crc32"]):
        return True
    if now[0] != entry["bytes"] or crc32(path) != entry["crc32"]:
        return False
    if _settled(now):
        _whole[str(path)] = (now, int(entry["crc32"]))
    return True


def what_is_wrong(path: Path, entry: Entry, entries: Iterable[Entry]) -> str:
    """In words, why a file is not what its entry says; `entries` are those of the whole store."""
    if not path.is_file():
        return "is missing"
    claim = says_of_itself(path)
    with suppress(OSError):
        crc = crc32(path)
        if other := next((each for each in entries if each["crc32"] == crc), None):
            return f"holds {other['path']} instead"
    if claim and entry.get("origin") and claim.get("origin") != entry["origin"]:
        return "belongs to another store: other encoders or another source made it"
    if claim and claim.get("shard") != entry["path"]:
        return f"holds {claim.get('shard')} of another store instead"
    size = path.stat().st_size
    if size != entry["bytes"]:
        return f"does not match its checksum: {size:,} bytes instead of {entry['bytes']:,}"
    return "does not match its checksum"


def cure(store: Path, manifest: Mapping[str, Any], names: Iterable[str]) -> str:
    """The one command that repairs damaged files of a folder: encode their chunks, write records anew."""
    names = list(names)
    records = [name for name in names if not name.startswith(("columns/", "chunks/"))]
    shards = [name for name in names if name not in records]
    if not records:
        return encode_again(store, manifest, shards)
    markers = [marker_name(chunk_of(name), addition_of(manifest, name)) for name in shards]
    remove = dict.fromkeys([*sorted(markers), *(name for name in records if name != SKIPPED), MANIFEST])
    additions = dict.fromkeys(["", *sorted(addition_of(manifest, name) for name in names)])
    words = " ".join(shlex.quote(str(store / name)) for name in remove)
    commands = " && ".join(command_of(store, manifest, addition) for addition in additions)
    return f"Have {'them' if len(names) > 1 else 'it'} written again with: rm -f {words} && {commands}"


def in_words(place: str, damaged: Mapping[str, str]) -> str:
    """Damaged files below a place and what is wrong with them, as the beginning of a sentence."""
    if len(damaged) == 1:
        return f"{place}/{' '.join(next(iter(damaged.items())))}"
    return f"{listed([f'{place}/{name}' for name in damaged])} found missing or damaged"


@dataclass(frozen=True)
class Verification:
    """What a look at every file of a store found."""

    files: int
    damaged: dict[str, str]  # name -> what is wrong
    unexpected: tuple[str, ...]  # files among the shards and markers that are no part of the store


def expected_files(manifest: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 of every shard and record by name."""
    shards = {str(entry["path"]): str(entry["sha256"]) for entry in manifest["files"]}
    return {**shards, **manifest.get("records", {})}


def look_at_all(
    expected: Mapping[str, str],
    look: Callable[[str], str | None],
    progress: Callable[[int, int], None] | None,
) -> dict[str, str]:
    """What `look` finds wrong with files, by name; several are looked at at a time."""
    damaged = {}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for number, (name, problem) in enumerate(
            zip(expected, pool.map(look, expected), strict=True), start=1
        ):
            if problem:
                damaged[name] = problem
            if progress is not None:
                progress(number, len(expected))
    return damaged


def verify_folder(
    store: Path, manifest: Mapping[str, Any], progress: Callable[[int, int], None] | None = None
) -> Verification:
    """Compare every file of a folder with its SHA-256; where all is well, remember that."""
    entries = {str(entry["path"]): entry for entry in manifest["files"]}
    expected, seen = expected_files(manifest), dict[str, Identity]()

    def look(name: str) -> str | None:
        path = store / name
        try:
            before = identity(path)
            if sha256(path) == expected[name]:
                seen[name] = before
                return None
        except FileNotFoundError:
            return "is missing"
        except OSError as error:
            return f"cannot be read ({error.strerror})"
        entry = entries.get(name)
        return what_is_wrong(path, entry, entries.values()) if entry else "does not match its checksum"

    damaged = look_at_all(expected, look, progress)
    if not as_written((store / MANIFEST).read_bytes(), manifest):
        damaged[MANIFEST] = "is not as it was written"
    if not damaged:
        remember(store, manifest, {name: seen[name] for name in entries})
    names = [path.relative_to(store).as_posix() for path in sorted(store.rglob("*")) if path.is_file()]
    return Verification(len(expected) + 1, damaged, unexpected(names, expected))


def unexpected(names: Iterable[str], expected: Mapping[str, str]) -> tuple[str, ...]:
    """Files among shards (and markers, which format 1 does not list) that are no part of the store."""
    folders = ("columns/", "chunks/") if BEGUN in expected else ("columns/",)
    return tuple(name for name in names if name.startswith(folders) and name not in expected)


def as_written(text: bytes, manifest: Mapping[str, Any]) -> bool:
    """Whether a manifest's file is what `write_json` makes of it, to the byte."""
    return text == (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode()


def remember(store: Path, manifest: Mapping[str, Any], seen: Mapping[str, Identity]) -> None:
    """Leave a list of files found whole in the folder, where it may be written."""
    settled = {name: state for name, state in seen.items() if _settled(state)}
    with suppress(OutputError):
        write_json(store / VERIFIED, {"manifest": _checksum(manifest), "files": settled})


def remembered(store: Path, manifest: Mapping[str, Any]) -> dict[str, Identity]:
    """The files that were found whole, and how they were then; empty without a list for this manifest."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        said = json.loads((store / VERIFIED).read_text(encoding="utf-8"))
        if said["manifest"] == _checksum(manifest):
            return {name: (int(a), int(b), int(c)) for name, (a, b, c) in said["files"].items()}
    return {}


def _checksum(manifest: Mapping[str, Any]) -> str:
    """The checksum that a manifest carries, or in format 1 would."""
    return str(manifest.get("sha256") or signed(manifest)["sha256"])


def _settled(state: Identity) -> bool:
    return time.time_ns() - max(state[1:]) > SETTLED
