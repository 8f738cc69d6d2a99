"""Chunks of a store: their shards, the marker that says one is finished, and the work that they took.

A chunk's shards are written first and its marker last, each whole or not at all. A marker that is damaged or
of another chunk, or one of whose files is missing, counts as none, so the chunk is encoded again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from shoestring.data.manifest import marker_name, origin_of, shard_name, signature_holds, signed
from shoestring.data.shards import Array, write_lines, write_shard
from shoestring.errors import StoreError
from shoestring.runtime import cpu_name
from shoestring.storage import crc32, read_json, write_json

WORK = "work"


class Markers:
    """The markers of a store's chunks, or of those of one addition to it, each a shard of every column."""

    def __init__(self, store: Path, columns: Iterable[str], addition: str = "", *, old: bool = False) -> None:
        self.store, self.columns, self.addition = store, list(columns), addition
        self.old = old  # begun by a version whose markers carry no checksum

    def of(self, chunk: int) -> dict[str, Any] | None:
        """What a finished chunk's marker says; None where it or a file is missing, damaged or another's."""
        needed = sorted(shard_name(column, chunk) for column in self.columns)
        try:
            marker: dict[str, Any] = read_json(self.store / marker_name(chunk, self.addition))
            own = marker["chunk"] == chunk and sorted(e["path"] for e in marker["files"]) == needed
            whole = all((self.store / e["path"]).stat().st_size == e["bytes"] for e in marker["files"])
            trusted = signature_holds(marker, needed=not self.old)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return marker if own and whole and trusted else None

    def all(self, count: int) -> list[dict[str, Any]] | None:
        """The markers of chunks 0 .. count-1, or None while one is missing."""
        markers = []
        for chunk in range(count):
            marker = self.of(chunk)
            if marker is None:
                return None
            markers.append(marker)
        return markers

    def numbers(self) -> list[int]:
        """Chunks that have a marker, the last first."""
        folder = (self.store / marker_name(0, self.addition)).parent
        return sorted((int(path.stem) for path in folder.glob("[0-9]*.json")), reverse=True)


class ChunkWriter:
    """Writes the shards of one chunk, then its marker. `begun` says what the columns are made from."""

    def __init__(
        self, store: Path, begun: Mapping[str, Any], chunk: int, rows: int, addition: str = ""
    ) -> None:
        self.store, self.begun, self.chunk, self.rows, self.addition = store, begun, chunk, rows, addition
        self._files: list[dict[str, Any]] = []

    def arrays(self, column: str, arrays: Mapping[str, Array]) -> None:
        """Write a shard of arrays."""
        origin = origin_of(self.begun, column)
        entry = write_shard(self.store, shard_name(column, self.chunk), arrays, self.rows, origin)
        self._files.append(entry.to_json())

    def lines(self, column: str, records: Iterable[Any]) -> None:
        """Write a shard of JSON lines."""
        origin = origin_of(self.begun, column)
        entry = write_lines(self.store, shard_name(column, self.chunk), records, origin)
        self._files.append(entry.to_json())

    def finish(self, said: Mapping[str, Any]) -> None:
        """Write the marker: the chunk is finished. Raises `StoreError` where a shard is not what was written.

        Two processes at one chunk write the same files, and encoders need not give the same bits twice.
        """
        for entry in self._files:
            path = self.store / entry["path"]
            if not path.is_file() or crc32(path) != entry["crc32"]:
                raise StoreError(
                    f"{path}: another process wrote this shard meanwhile. Have one process for each --worker "
                    "number, and run the same command again, which keeps finished chunks."
                )
        marker = {"chunk": self.chunk, "rows": self.rows, **said, "files": self._files}
        write_json(self.store / marker_name(self.chunk, self.addition), signed(marker))


class Work:
    """Seconds that a worker spent on chunks that it finished, by device, over all its starts.

    Kept beside the store's own files, so that those depend on the source and settings alone.
    """

    def __init__(
        self, store: Path, worker: tuple[int, int], device: torch.device, addition: str = ""
    ) -> None:
        self.path = store / WORK / f"{addition or 'store'}-{worker[0]}-of-{worker[1]}.json"
        self.device = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
        try:
            self.said: dict[str, dict[str, float]] = dict(read_json(self.path))
        except (OSError, ValueError, TypeError):
            self.said = {}

    def add(self, rows: int, seconds: float) -> None:
        """Count a chunk of `rows` source rows that took `seconds`."""
        here = self.said.get(self.device, {"rows": 0, "seconds": 0.0})
        self.said[self.device] = {
            "rows": here["rows"] + rows,
            "seconds": round(here["seconds"] + seconds, 3),
        }
        write_json(self.path, self.said)


def work_of(store: Path, addition: str = "") -> list[dict[str, Any]]:
    """What every worker did: {"worker", "device", "rows", "seconds"} each; nothing that cannot be read."""
    return list(_work_of(store, addition or "store"))


def _work_of(store: Path, of: str) -> Iterator[dict[str, Any]]:
    for path in sorted((store / WORK).glob(f"{of}-*-of-*.json")):
        rank, _, count = path.stem.removeprefix(f"{of}-").partition("-of-")
        if not (rank.isdigit() and count.isdigit()):  # of an addition whose name begins alike
            continue
        try:
            for device, done in sorted(read_json(path).items()):
                rows, seconds = int(done["rows"]), float(done["seconds"])
                yield {"worker": f"{rank}/{count}", "device": device, "rows": rows, "seconds": seconds}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
