"""Copying a store to a folder of this machine, from a folder or a URL, every file checked on the way.

    SOURCE --every shard and record, each whole or not at all--> OUT --the manifest, last--> a store

What stopped goes on: files that are there already and match their SHA-256 are not copied again.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shoestring.data.download import Damaged, Source
from shoestring.data.folder import Folder, Progress, is_url, refuse_url
from shoestring.data.integrity import Identity, expected_files, identity, look_at_all, remember
from shoestring.data.manifest import BEGUN, MANIFEST, SKIPPED, VERIFIED, column_of, marker_name, origin_of
from shoestring.data.remote import mend_remote, remote_manifest
from shoestring.data.store import Store
from shoestring.errors import CorruptStoreError, OutputError, StoreError
from shoestring.storage import atomic_path, remove_leftovers, sha256, writing_to

_PARTS = {"columns", "chunks", "added", "work", BEGUN, SKIPPED, MANIFEST, VERIFIED}


def copy_store(source: str, out: str | Path, progress: Progress | None = None) -> Store:
    """Copy the store at a folder or URL into the folder `out` and open it there; run again, it goes on.

    A copy made before the store grew gains what was added since.

    Raises `StoreError` where there is no store or `out` holds something else, `CorruptStoreError` where the
    source is damaged, `OutputError` where the disk is too small.
    """
    refuse_url(out, "Copy to a folder of this machine, and upload that with the tools of the place.")
    out = Path(out)
    files = Source(source.rstrip("/") if is_url(source) else str(Path(source).absolute()))
    if is_url(source):
        data, manifest = remote_manifest(files)
    else:
        folder = Folder.open(Path(source))
        data, manifest = (folder.path / MANIFEST).read_bytes(), folder.manifest
    expected = expected_files(manifest)
    _check_place(out, manifest, set(expected), source)
    remove_leftovers(out)
    _check_space(out, sum(int(e["bytes"]) for e in manifest["files"] if not (out / e["path"]).is_file()))
    seen: dict[str, Identity] = {}

    def bring(name: str) -> str | None:
        path = out / name
        if not (path.is_file() and sha256(path) == expected[name]):
            try:
                files.fetch(name, expected[name], path)
            except FileNotFoundError:
                return "is missing"
            except Damaged:
                return "does not match its checksum"
        seen[name] = identity(path)
        return None

    damaged = look_at_all(expected, bring, progress)
    if damaged:
        cure = mend_remote(source, damaged) if is_url(source) else folder.cure(damaged)
        raise CorruptStoreError(f"{cure} Then copy again; what is whole has been copied.")
    for name in _unhashed(manifest):
        files.take(name, out / name)
    with atomic_path(out / MANIFEST) as aside:
        aside.write_bytes(data)
    remember(out, manifest, {str(e["path"]): seen[str(e["path"])] for e in manifest["files"]})
    return Store.open(out)


def _unhashed(manifest: Mapping[str, Any]) -> list[str]:
    """Records that a store of format 1 may have, of which its manifest says nothing; cures need them."""
    if BEGUN in manifest.get("records", {}):
        return []
    return [BEGUN, SKIPPED, *map(marker_name, range(len(manifest["chunks"])))]


def _check_place(out: Path, manifest: Mapping[str, Any], expected: set[str], source: str) -> None:
    """A new or empty folder, or an earlier copy of the same store, finished or not."""
    with writing_to(out):
        if out.exists() and not out.is_dir():
            raise StoreError(f"{out}: is a file. Give a folder for the copy.")
        out.mkdir(parents=True, exist_ok=True)
        there = {path.name for path in out.iterdir() if not path.name.endswith(".partial")}
    known = _PARTS | {name.split("/")[0] for name in expected}
    if there - known or ((out / MANIFEST).is_file() and not _grew_from(out, manifest)):
        raise StoreError(
            f"{out}: holds something other than a copy of {source}. Give a new or an empty folder."
        )


def _grew_from(out: Path, manifest: Mapping[str, Any]) -> bool:
    """Whether `manifest` is of the store in `out`, with what is there and perhaps more columns.

    The rows, the source and the encoders of every column there are the same. What was added to the copy
    alone is not in `manifest`, and would be lost.
    """
    try:
        here = Folder.open(out).manifest
        columns = {column_of(entry["path"]) for entry in here["files"]}
        return (
            all(here[name] == manifest[name] for name in ("chunks", "splits"))
            and {entry["path"] for entry in here["files"]} <= {entry["path"] for entry in manifest["files"]}
            and all(origin_of(here, column) == origin_of(manifest, column) for column in columns)
        )
    except (StoreError, LookupError, TypeError, AttributeError):
        return False


def _check_space(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out).free
    if needed > free:
        raise OutputError(
            f"{out}: the copy needs {needed / 1e9:,.1f} GB more, and {free / 1e9:,.1f} GB are free. "
            "Choose another disk, or train from the URL with a window (data.window), which needs far less."
        )
