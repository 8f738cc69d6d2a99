"""Reading files at a URL: whole, checked, and patient with the network."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from fsspec.core import url_to_fs  # type: ignore[import-untyped] # it has no types

from shoestring.errors import StoreError
from shoestring.storage import atomic_path

BLOCK = 1 << 24
WAITS = (1.0, 5.0)  # seconds before another try at what the network failed; then it is an error

T = TypeVar("T")


class Damaged(Exception):
    """A file that arrived is not the one asked for."""


class Unreachable(Exception):
    """The network, or who answers there, failed."""


class Source:
    """Files below a URL, or below a folder."""

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            self._system, self._root = url_to_fs(url)
        except ImportError as error:
            raise StoreError(
                f"{url}: cannot be opened: {error} (with pip). Or copy it to a folder."
            ) from error
        except ValueError as error:
            raise StoreError(
                f"{url}: cannot be opened: {error}. Give a folder, or a URL such as s3://bucket/store, "
                "hf://datasets/owner/name or https://host/store."
            ) from error
        except Exception as error:  # some kinds of store connect at once, and raise what their network does
            raise StoreError(
                f"{url}: cannot be reached ({_brief(error)}). Check the URL, the network and your access."
            ) from error

    def blocks(self, name: str) -> Iterator[bytes]:
        """A file's content in blocks; raises FileNotFoundError or `Unreachable`."""
        try:
            with self._system.open(f"{self._root}/{name}", "rb", block_size=BLOCK) as file:
                while block := file.read(BLOCK):
                    yield block
        except FileNotFoundError:
            raise
        except Exception as error:  # every kind of store raises its own
            raise Unreachable(_brief(error)) from error

    def read(self, name: str) -> bytes:
        """A file's content; raises FileNotFoundError or `Unreachable`."""
        return b"".join(self.blocks(name))

    def sha256(self, name: str) -> str:
        """SHA-256 of a file's content; raises FileNotFoundError or `Unreachable`."""
        digest = hashlib.sha256()
        for block in self.blocks(name):
            digest.update(block)
        return digest.hexdigest()

    def fetch(self, name: str, sha256: str, path: Path) -> None:
        """Copy a file to `path`, whole and with this SHA-256 or not at all; fetched twice before giving up.

        Raises FileNotFoundError, `Damaged`, or `StoreError` where the network keeps failing.
        """

        def attempt() -> None:
            digest, size = hashlib.sha256(), 0
            with atomic_path(path) as aside:
                with open(aside, "wb") as file:
                    for block in self.blocks(name):
                        digest.update(block)
                        size += file.write(block)
                if digest.hexdigest() != sha256:
                    raise Damaged(f"arrives damaged: its {size:,} bytes do not match their checksum")

        try:
            self.patiently(name, attempt)
        except Damaged:
            self.patiently(name, attempt)

    def patiently(self, name: str, work: Callable[[], T]) -> T:
        """The result of `work` on a file, tried again when the network fails; in the end a `StoreError`."""
        for wait in (*WAITS, None):
            try:
                return work()
            except Unreachable as error:
                if wait is None:
                    raise StoreError(
                        f"{self.url}/{name}: cannot be downloaded ({error}). Check the network and your "
                        "access, then run the same command again; what has arrived is kept."
                    ) from error
                time.sleep(wait)
        raise AssertionError

    def take(self, name: str, path: Path) -> bool:
        """Copy a file of which no checksum is known, whole or not at all; False where there is none."""
        try:
            content = self.patiently(name, lambda: self.read(name))
        except FileNotFoundError:
            return False
        with atomic_path(path) as aside:
            aside.write_bytes(content)
        return True

    def names(self) -> list[str]:
        """Names of all files, where the place can list them; else none."""
        try:
            found = self._system.find(self._root)
        except Exception:  # every kind of store raises its own; many do not list
            return []
        return sorted(name.removeprefix(self._root).lstrip("/") for name in found)


def _brief(error: Exception) -> str:
    """An error's kind and the first line of what it says."""
    said = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
