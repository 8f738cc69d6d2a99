"""Where a store's files are: what every such place can do, and a folder on this machine."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from shoestring.data.integrity import Entry, Identity, Verification, cure, in_words, remembered, verify_folder
from shoestring.data.manifest import MANIFEST, mend_manifest, parse_manifest, why_not
from shoestring.errors import StoreError

Progress = Callable[[int, int], None]
"""Called with (files done, files in all)."""


class Files(Protocol):
    """A store's files: a folder, or copies of those at a URL."""

    @property
    def place(self) -> str:
        """What messages call it: the folder or URL."""

    @property
    def path(self) -> Path:
        """The folder on this machine that the files are in, as far as they are there."""

    @property
    def manifest(self) -> dict[str, Any]:
        """The store's manifest, checked."""

    def local(self, entry: Entry) -> Path:
        """A file on this machine, downloaded where need be; raises `StoreError` where it cannot be had."""

    def state(self, name: str) -> Identity | None:
        """How a file was when it was found whole, if that is remembered."""

    def fetch_again(self, entry: Entry) -> bool:
        """Do away with a damaged copy, so that `local` fetches another; False where there is no other."""

    def leave(self, entries: Iterable[Entry]) -> None:
        """Told which files will not be needed for a while."""

    def cure(self, damaged: Mapping[str, str]) -> str:
        """One line on damaged files (name -> what is wrong): which they are and what repairs them."""

    def mend_manifest(self) -> str:
        """One sentence on what repairs a damaged manifest."""

    def verify(self, progress: Progress | None) -> Verification:
        """Compare every file with its SHA-256."""


class Folder:
    """The files of a store on this machine."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path, self.place, self.manifest = path, str(path), manifest
        self._states = remembered(path, manifest)

    @classmethod
    def open(cls, path: Path) -> Folder:
        """The folder of a finished store; raises `StoreError` where it is none."""
        try:
            text = (path / MANIFEST).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise StoreError(why_not(path)) from None
        except OSError as error:
            raise StoreError(
                f"{path / MANIFEST}: cannot be read ({error.strerror}). Make it readable and run this again."
            ) from error
        return cls(path, parse_manifest(text, str(path), mend_manifest(path)))

    def local(self, entry: Entry) -> Path:
        return self.path / entry["path"]

    def state(self, name: str) -> Identity | None:
        return self._states.get(name)

    def fetch_again(self, entry: Entry) -> bool:
        return False

    def leave(self, entries: Iterable[Entry]) -> None:
        pass

    def cure(self, damaged: Mapping[str, str]) -> str:
        return f"{in_words(self.place, damaged)}. {cure(self.path, self.manifest, damaged)}"

    def mend_manifest(self) -> str:
        return mend_manifest(self.path)

    def verify(self, progress: Progress | None) -> Verification:
        return verify_folder(self.path, self.manifest, progress)


def is_url(place: str) -> bool:
    """Whether a place is a URL for fsspec, such as `s3://bucket/store`, and no folder."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", place) is not None


def refuse_url(place: str | Path, instead: str) -> None:
    """Raise `StoreError` for a URL where a folder of this machine is needed; `instead` says what to do."""
    if is_url(re.sub(r"^([^/]+:)/+", r"\1//", str(place))):  # a Path leaves one slash of two
        raise StoreError(f"{place}: is a URL. {instead}")
