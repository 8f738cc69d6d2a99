"""Stores at a URL: shards are downloaded whole when first needed, checked, and read from a cache.

    <cache>/<name>-<hash of the URL>/manifest.json      the manifest as last seen there
                                     files/<sha256>     shards, named by what is in them
                                     locks/             so that processes of one machine download a shard once

A name that is a hash can hold one content only: a store that changes at its URL, a second process, or one
that was killed can leave nothing wrong here. Anything fsspec opens will do: s3://, gs://, hf://, https://, file://.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from shoestring.data.download import Damaged, Source, Unreachable
from shoestring.data.folder import Progress
from shoestring.data.integrity import (
    Entry,
    Identity,
    Verification,
    as_written,
    expected_files,
    identity,
    in_words,
    look_at_all,
    unexpected,
)
from shoestring.data.manifest import MANIFEST, parse_manifest
from shoestring.errors import CorruptStoreError, StoreError
from shoestring.storage import atomic_path, fingerprint, remove_leftovers, writing_to

CACHE = "SHOESTRING_CACHE"  # environment variable: folder of the caches of all stores
CACHE_SIZE = "SHOESTRING_CACHE_SIZE"  # ... the size of each up to which shards stay that a window has left
_ORPHANED = 2 * 24 * 3600
"""Seconds without use after which a file goes that the store at the URL has no more (file systems that note
when a file is read may do so once a day)."""
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


class Remote:
    """A store's files at a URL, as copies in a cache folder."""

    def __init__(self, source: Source, folder: Path, manifest: dict[str, Any]) -> None:
        self.place, self.path, self.manifest = source.url, folder, manifest
        self._source, self._limit = source, _cache_size()
        self._states: dict[str, Identity] = {}  # of files that this process downloaded, hence checked
        self._lock = threading.Lock()
        self._left: dict[str, None] = {}  # files that will not be needed for a while, the longest left first
        if self._limit:
            self._left |= dict.fromkeys(
                sorted(found := self._cached(), key=lambda name: found[name].st_mtime_ns)
            )

    @classmethod
    def open(cls, url: str, cache: str | Path | None = None) -> Remote:
        """The store at `url`; raises `StoreError` where there is none or it cannot be reached.

        Out of reach it is taken as it was when last seen: what is in the cache can be read.
        """
        source = Source(url.rstrip("/"))
        name = re.sub(r"[^A-Za-z0-9_.-]", "_", source.url.rsplit("/", 1)[-1])
        folder = _cache_folder(cache) / f"{name}-{fingerprint(source.url)}"
        with writing_to(folder):
            for part in ("files", "locks"):
                (folder / part).mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        manifest = _newest_manifest(source, folder / MANIFEST)
        _remove_orphans(folder / "files", {str(entry["sha256"]) for entry in manifest["files"]})
        return cls(source, folder, manifest)

    def local(self, entry: Entry) -> Path:
        name, hashed = str(entry["path"]), str(entry["sha256"])
        path = self.path / "files" / hashed
        with self._lock:
            self._left.pop(hashed, None)
        if path.is_file():
            return path
        with self._alone(hashed):
            if not path.is_file():
                try:
                    self._source.fetch(name, hashed, path)
                except FileNotFoundError:
                    raise CorruptStoreError(self.cure({name: "is missing"})) from None
                except Damaged as error:
                    raise CorruptStoreError(self.cure({name: f"{error} (downloaded twice)"})) from None
                self._states[name] = identity(path)
        return path

    def state(self, name: str) -> Identity | None:
        return self._states.get(name)

    def fetch_again(self, entry: Entry) -> bool:
        with writing_to(self.path):
            (self.path / "files" / str(entry["sha256"])).unlink(missing_ok=True)
        return True

    def leave(self, entries: Iterable[Entry]) -> None:
        """Note that files will not be needed; while the cache is above its size, the longest left go."""
        with self._lock:
            for entry in entries:
                self._left.pop(str(entry["sha256"]), None)
                self._left[str(entry["sha256"])] = None
            size = sum(each.st_size for each in self._cached().values()) if self._limit else 0
            while self._left and size >= self._limit:
                oldest = self.path / "files" / next(iter(self._left))
                del self._left[oldest.name]
                with suppress(OSError):  # another process was quicker
                    size -= oldest.stat().st_size if self._limit else 0
                    oldest.unlink()

    def cure(self, damaged: Mapping[str, str]) -> str:
        return mend_remote(self.place, damaged)

    def mend_manifest(self) -> str:
        return _MEND_MANIFEST

    def verify(self, progress: Progress | None) -> Verification:
        """Compare every file there with its SHA-256; nothing is kept here."""
        expected = expected_files(self.manifest)

        def look(name: str) -> str | None:
            try:
                found = self._source.patiently(name, lambda: self._source.sha256(name))
            except FileNotFoundError:
                return "is missing"
            return None if found == expected[name] else "does not match its checksum"

        damaged = look_at_all(expected, look, progress)
        if not as_written(
            self._source.patiently(MANIFEST, lambda: self._source.read(MANIFEST)), self.manifest
        ):
            damaged[MANIFEST] = "is not as it was written"
        return Verification(len(expected) + 1, damaged, unexpected(self._source.names(), expected))

    def _cached(self) -> dict[str, os.stat_result]:
        """Files that are here; other processes may remove some meanwhile."""
        return _files_in(self.path / "files")

    @contextmanager
    def _alone(self, hashed: str) -> Iterator[None]:
        """Keep other threads and processes of this machine from downloading the same file."""
        with open(self.path / "locks" / hashed[:2], "w") as lock:
            with suppress(
                ImportError, OSError
            ):  # file systems without locks: the same file twice does no harm
                import fcntl

                fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def mend_remote(url: str, damaged: Mapping[str, str]) -> str:
    """One line on damaged files at a URL."""
    files = "this file" if len(damaged) == 1 else "these files"
    return (
        f"{in_words(url, damaged)}. Upload {files} again from where the store was made "
        "(`shoestring store verify FOLDER` tells whether it is whole there)."
    )


_MEND_MANIFEST = "Upload it again from where the store was made."


def remote_manifest(source: Source) -> tuple[bytes, dict[str, Any]]:
    """The manifest at a URL as bytes and checked; a damaged arrival is fetched once more."""
    try:
        for _ in range(2):
            data = source.patiently(MANIFEST, lambda: source.read(MANIFEST))
            with suppress(CorruptStoreError):
                return data, parse_manifest(data, source.url, _MEND_MANIFEST)
    except FileNotFoundError:
        raise StoreError(
            f"{source.url}: no store there (no {MANIFEST}). Give the URL of a whole copy of the folder that "
            "`shoestring encode SOURCE --out STORE` made."
        ) from None
    return data, parse_manifest(data, source.url, _MEND_MANIFEST)


def _newest_manifest(source: Source, seen: Path) -> dict[str, Any]:
    """The manifest at a URL, else the one that was there when last looked at."""
    before = seen.read_bytes() if seen.is_file() else b""
    try:
        data, manifest = remote_manifest(source)
    except StoreError as error:
        if isinstance(error.__cause__, Unreachable):
            with suppress(StoreError):
                return parse_manifest(before, source.url, _MEND_MANIFEST)
        raise
    if data != before:
        with atomic_path(seen) as aside:
            aside.write_bytes(data)
    return manifest


def _remove_orphans(folder: Path, named: set[str]) -> None:
    """Remove files that no manifest names any more, once a process that began with the old one is done."""
    for name, state in _files_in(folder).items():
        if name not in named and time.time() - max(state.st_mtime, state.st_atime) > _ORPHANED:
            with suppress(OSError):  # another process was quicker
                (folder / name).unlink()


def _files_in(folder: Path) -> dict[str, os.stat_result]:
    found = {}
    for file in os.scandir(folder):
        with suppress(FileNotFoundError):
            found[file.name] = file.stat()
    return found


def _cache_folder(cache: str | Path | None) -> Path:
    return Path(cache or os.environ.get(CACHE) or "~/.cache/shoestring/stores").expanduser()


def _cache_size() -> int:
    said = os.environ.get(CACHE_SIZE, "0").strip()
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", said, re.IGNORECASE)
    if match is None:
        raise StoreError(f"{CACHE_SIZE}={said}: is no size. Give one such as 500GB.")
    return int(float(match[1]) * _UNITS[match[2].upper()])
