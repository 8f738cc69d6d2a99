"""WebDataset tars as a source, read in place."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoestring.data.rows import (
    CAPTION_COLUMNS,
    IMAGE_SUFFIXES,
    Row,
    SequentialSource,
    captions_of,
    clean_captions,
    files_fingerprint,
)
from shoestring.errors import SourceError
from shoestring.storage import parse_json


@dataclass(frozen=True, slots=True)
class _Sample:
    """Files of one key in a tar: extension -> (offset, size)."""

    tar: Path
    key: str
    parts: dict[str, tuple[int, int]]
    problem: str | None = None


class TarSource(SequentialSource):
    """WebDataset tars: consecutive files that share a name up to its first dot are one sample.

    Captions come from `.txt` (one a line), or from the caption columns of `.json`. Tars are scanned one at a
    time, headers only, when their rows are reached.
    """

    def __init__(self, tars: Sequence[Path], caption_columns: Sequence[str], spec: str) -> None:
        super().__init__(spec)
        self.tars, self.caption_columns = list(tars), tuple(caption_columns)
        self._starts = [0]  # first row of tar 0, 1, ... as far as known
        first = next(self._scan(self.tars[0]), None) if self.tars else None
        if first is not None and first.problem is None and not {"txt", "json"} & set(first.parts):
            raise SourceError(
                f"{spec}: the first sample ({first.key}) has {', '.join(first.parts)} and no caption. "
                "Captions of a tar are NAME.txt, or NAME.json with a caption."
            )

    def describe(self) -> dict[str, Any]:
        columns = {"columns": list(self.caption_columns)} if self.caption_columns else {}
        return {"kind": "tars", "path": self.spec, "files": files_fingerprint(None, self.tars), **columns}

    def _base(self, start: int) -> int:
        return max(first for first in self._starts if first <= start)

    def _records(self, base: int) -> Iterator[_Sample]:
        number = base
        for index in range(self._starts.index(base), len(self.tars)):
            for sample in self._scan(self.tars[index]):
                yield sample
                number += 1
            if len(self._starts) == index + 1:
                self._starts.append(number)

    def _load(self, number: int, record: _Sample) -> Row:
        key = f"{record.tar.name}/{record.key}"
        if record.problem:
            return Row(key, b"", (), problem=record.problem)
        image = next((ext for ext in record.parts if f".{ext.lower()}" in IMAGE_SUFFIXES), None)
        with open(record.tar, "rb") as file:

            def read(ext: str) -> bytes:
                offset, size = record.parts[ext]
                file.seek(offset)
                return file.read(size)

            captions = self._captions(record, read)
            if image is None:
                return Row(key, b"", captions, problem="no image")
            return Row(key, read(image), captions)

    def _captions(self, sample: _Sample, read: Any) -> tuple[str, ...]:
        if "txt" in sample.parts and not self.caption_columns:
            return clean_captions(read("txt").decode("utf-8-sig", errors="replace").splitlines())
        if "json" not in sample.parts:
            return ()
        try:
            record = parse_json(read("json"))
        except ValueError:
            return ()
        names = self.caption_columns or [name for name in CAPTION_COLUMNS if name in record][:1]
        return captions_of(record, names) if isinstance(record, dict) else ()

    def _scan(self, path: Path) -> Iterator[_Sample]:
        """Samples of a tar; a damaged one ends with a sample that says so."""
        key = ""
        parts: dict[str, tuple[int, int]] = {}
        problem: str | None = None
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    if not member.isfile():
                        continue
                    folder, _, name = member.name.rpartition("/")
                    stem, _, extension = name.partition(".")
                    here = f"{folder}/{stem}".lstrip("/")
                    if here != key and parts:
                        yield _Sample(path, key, parts)
                        parts = {}
                    key = here
                    parts[extension] = (member.offset_data, member.size)
                if _goes_on(path, tar.offset):
                    problem = "damaged tar"
        except (tarfile.TarError, OSError, EOFError):
            problem = "damaged tar"
        if parts:
            yield _Sample(path, key, parts)
        if problem:
            yield _Sample(path, "", {}, problem)


def _goes_on(path: Path, offset: int) -> bool:
    """True where a tar does not end at `offset`: tarfile stops silently at a damaged header."""
    with open(path, "rb") as file:
        file.seek(offset)
        return bool(file.read(512).strip(b"\0"))
