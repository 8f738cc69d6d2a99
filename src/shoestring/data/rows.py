"""What every source of captioned images shares: rows, stretches of rows, captions and their columns."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from shoestring.errors import SourceError

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"))
CAPTION_COLUMNS = ("caption", "captions", "text", "texts", "prompt", "prompts", "description")
IMAGE_COLUMNS = ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp")


@dataclass(frozen=True, slots=True)
class Row:
    """One captioned image. `problem` says why the source itself could not give all of it."""

    key: str
    image: bytes | NDArray[np.uint8]  # an encoded file, or (H, W, 3)
    captions: tuple[str, ...]
    split: str = "train"
    extra: Mapping[str, Any] = field(default_factory=dict)  # JSON, kept in the store beside the captions
    problem: str | None = None


class Source(Protocol):
    """Rows 0 .. num_rows-1 in a fixed order.

    `words` are what follows `shoestring encode` on a command line to open these rows again.
    """

    words: list[str]

    @property
    def num_rows(self) -> int | None:
        """How many rows there are; None until the end of a stream has been seen."""

    def describe(self) -> dict[str, Any]:
        """JSON: kind and path, and what tells these very rows from others."""

    def rows(self, start: int, stop: int) -> Iterator[Row]:
        """Rows start .. stop-1, fewer where the source ends."""


class SequentialSource:
    """Reads on from where the last stretch ended, or from the nearest place before the one asked for.

    Subclasses find records cheaply (`_records`) and read them only when they are wanted (`_load`).
    """

    def __init__(self, spec: str) -> None:
        self.spec, self.words = spec, [spec]
        self._at = 0
        self._iterator: Iterator[Any] | None = None
        self._end: int | None = None

    @property
    def num_rows(self) -> int | None:
        return self._end

    def rows(self, start: int, stop: int) -> Iterator[Row]:
        base = self._base(start)
        if self._iterator is None or not base <= self._at <= start:
            self._iterator, self._at = self._records(base), base
        while self._at < stop:
            try:
                record = next(self._iterator)
            except StopIteration:
                seen = self._at > base  # else it may have begun beyond the end: count from the first row
                self._end = self._at if seen else sum(1 for _ in self._records(0))
                self._iterator = None
                return
            self._at += 1
            if self._at > start:
                yield self._load(self._at - 1, record)

    def _base(self, start: int) -> int:
        """The last row at or before `start` that reading can begin from."""
        raise NotImplementedError

    def _records(self, base: int) -> Iterator[Any]:
        """Records from row `base` (a value of `_base`) to the end."""
        raise NotImplementedError

    def _load(self, number: int, record: Any) -> Row:
        raise NotImplementedError


def pick_caption_columns(columns: Sequence[str], asked: Sequence[str], where: str) -> tuple[str, ...]:
    """The caption columns asked for, or the first with a usual name; raises `SourceError` without one."""
    missing = [name for name in asked if name not in columns]
    if missing:
        raise SourceError(f"{where}: no text column {missing[0]!r}; there are: {', '.join(columns)}.")
    chosen = tuple(asked) or tuple(name for name in CAPTION_COLUMNS if name in columns)[:1]
    if not chosen:
        raise SourceError(
            f"{where}: no caption column (one of {', '.join(CAPTION_COLUMNS)}); text columns are: "
            f"{', '.join(columns) or 'none'}. Say which with --caption-column NAME."
        )
    return chosen


def pick_image_column(columns: Mapping[str, str], asked: str | None, where: str) -> str:
    """The image column asked for, or the first with a usual name or a binary type."""
    if asked is not None:
        if asked not in columns:
            raise SourceError(f"{where}: no column {asked!r}; there are: {', '.join(columns)}.")
        return asked
    named = [name for name in IMAGE_COLUMNS if name in columns]
    binary = [name for name, kind in columns.items() if re.search("binary|Image", kind)]
    chosen = [name for name in named if name in binary] or binary or named
    if not chosen:
        raise SourceError(
            f"{where}: no image column (bytes, or a struct of bytes and path); columns are: "
            f"{', '.join(columns)}. Say which with --image-column NAME."
        )
    return chosen[0]


def captions_of(record: Mapping[str, Any], columns: Sequence[str]) -> tuple[str, ...]:
    """Every caption in the columns of one record; a column holds a string or a list of them."""
    values: list[Any] = []
    for name in columns:
        value = record.get(name)
        values.extend(value if isinstance(value, (list, tuple)) else [value])
    return clean_captions(value for value in values if isinstance(value, str))


def clean_captions(captions: Iterable[str]) -> tuple[str, ...]:
    """Captions stripped, without empty ones and repeats."""
    return tuple(dict.fromkeys(text for each in captions if (text := each.strip())))


def files_fingerprint(root: Path | None, files: Iterable[Path]) -> str:
    """A hash of names and sizes: equal for a moved copy, different when files come, go or grow."""
    digest = hashlib.sha256()
    for name, path in sorted((f.relative_to(root).as_posix() if root else f.name, f) for f in files):
        digest.update(f"{name}\0{path.stat().st_size}\n".encode())
    return digest.hexdigest()[:16]
