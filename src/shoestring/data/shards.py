"""Files of a store: safetensors shards written whole and read in place, and JSON lines.

A safetensors file is 8 bytes of header length, a JSON header {name: {dtype, shape, data_offsets}}, then the
tensors' bytes. Writing it by hand hashes it on the way and turns a full disk into a plain OSError; reading it
by hand gives arrays that stay on disk (np.memmap) until their rows are wanted.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from shoestring.storage import atomic_path

Array = NDArray[Any]
_DTYPES = {"U8": np.uint8, "F16": np.float16, "F32": np.float32, "I32": np.int32, "I64": np.int64}
_NAMES = {np.dtype(kind): name for name, kind in _DTYPES.items()}


@dataclass(frozen=True)
class FileEntry:
    """What the manifest says of one file; `path` is relative to the store."""

    path: str
    rows: int
    bytes: int
    crc32: int
    sha256: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class _Hashing:
    """Writes to a file and hashes what it writes."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.size, self.crc, self.sha = file, 0, 0, hashlib.sha256()

    def write(self, data: bytes | memoryview) -> None:
        self.file.write(data)
        self.size += len(data)
        self.crc = zlib.crc32(data, self.crc)
        self.sha.update(data)


def write_shard(store: Path, name: str, arrays: Mapping[str, Array], rows: int) -> FileEntry:
    """Write `store/name` as safetensors, whole or not at all."""
    # Widest types first, so that every array starts at a multiple of its own width.
    ordered = sorted(arrays.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header, offset = {}, 0
    for key, array in ordered:
        span = [offset, offset + array.nbytes]
        header[key] = {"dtype": _NAMES[array.dtype], "shape": list(array.shape), "data_offsets": span}
        offset = span[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_path(store / name) as aside, open(aside, "wb") as file:
        out = _Hashing(file)
        out.write(struct.pack("<Q", len(text)) + text)
        for _, array in ordered:
            if array.nbytes:
                out.write(np.ascontiguousarray(array).data.cast("B"))
    return FileEntry(name, rows, out.size, out.crc, out.sha.hexdigest())


def write_lines(store: Path, name: str, records: Iterable[Any]) -> FileEntry:
    """Write `store/name` with one JSON value a line, whole or not at all."""
    lines = [json.dumps(record, ensure_ascii=False, separators=(",", ":")) + "\n" for record in records]
    with atomic_path(store / name) as aside, open(aside, "wb") as file:
        out = _Hashing(file)
        out.write("".join(lines).encode())
    return FileEntry(name, len(lines), out.size, out.crc, out.sha.hexdigest())


def read_shard(path: Path) -> dict[str, Array]:
    """Arrays of a safetensors file, mapped from disk. Raises OSError or ValueError for a damaged one."""
    data = np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)
    (length,) = struct.unpack("<Q", data[:8].tobytes())
    header = json.loads(data[8 : 8 + length].tobytes())
    header.pop("__metadata__", None)
    body = data[8 + length :]
    arrays = {}
    for key, entry in header.items():
        start, stop = entry["data_offsets"]
        arrays[key] = body[start:stop].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return arrays


def read_lines(path: Path) -> dict[str, Array]:
    """A file of lines as its bytes and the offset of each line's start (and of the end)."""
    if path.stat().st_size == 0:
        return {"bytes": np.empty(0, np.uint8), "offsets": np.zeros(1, np.int64)}
    data = np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)
    ends = np.flatnonzero(data == ord("\n")) + 1
    return {"bytes": data, "offsets": np.concatenate([[0], ends]).astype(np.int64)}
