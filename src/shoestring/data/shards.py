"""Files of a store: safetensors shards written whole and read in place, and JSON lines.

A safetensors file is 8 bytes of header length, a JSON header {name: {dtype, shape, data_offsets}}, then the
tensors' bytes. Writing it by hand hashes it on the way and turns a full disk into a plain OSError; reading it
by hand gives arrays that stay on disk (mapped) until their rows are wanted.
"""

from __future__ import annotations

import hashlib
import json
import mmap
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
_DTYPES = {
    "U8": np.uint8,
    "I8": np.int8,
    "F16": np.float16,
    "F32": np.float32,
    "I32": np.int32,
    "I64": np.int64,
}
_NAMES = {np.dtype(kind): name for name, kind in _DTYPES.items()}


@dataclass(frozen=True)
class FileEntry:
    """What the manifest says of one file; `path` is relative to the store, `origin` as in manifest.py."""

    path: str
    rows: int
    bytes: int
    crc32: int
    sha256: str
    origin: str = ""

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


def write_shard(
    store: Path, name: str, arrays: Mapping[str, Array], rows: int, origin: str = ""
) -> FileEntry:
    """Write `store/name` as safetensors, whole or not at all; it carries its name and origin itself."""
    # Widest types first, so that every array starts at a multiple of its own width.
    ordered = sorted(arrays.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, Any] = {"__metadata__": {"shard": name, "origin": origin}}
    offset = 0
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
    return FileEntry(name, rows, out.size, out.crc, out.sha.hexdigest(), origin)


def write_lines(store: Path, name: str, records: Iterable[Any], origin: str = "") -> FileEntry:
    """Write `store/name` with one JSON value a line, whole or not at all."""
    lines = [json.dumps(record, ensure_ascii=False, separators=(",", ":")) + "\n" for record in records]
    with atomic_path(store / name) as aside, open(aside, "wb") as file:
        out = _Hashing(file)
        out.write("".join(lines).encode())
    return FileEntry(name, len(lines), out.size, out.crc, out.sha.hexdigest(), origin)


def read_shard(path: Path) -> dict[str, Array]:
    """Arrays of a safetensors file, mapped from disk. Raises OSError or ValueError for a damaged one."""
    data = _mapped(path)
    header, body = _parts(data)
    arrays = {}
    try:
        header.pop("__metadata__", None)
        for key, entry in header.items():
            start, stop = entry["data_offsets"]
            arrays[key] = body[start:stop].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"has a header that this version cannot read ({error!r})") from error
    return arrays


def read_lines(path: Path) -> dict[str, Array]:
    """A file of lines as its bytes and the offset of each line's start (and of the end)."""
    if path.stat().st_size == 0:
        return {"bytes": np.empty(0, np.uint8), "offsets": np.zeros(1, np.int64)}
    data = _mapped(path)
    ends = np.flatnonzero(data == ord("\n")) + 1
    return {"bytes": data, "offsets": np.concatenate([[0], ends]).astype(np.int64)}


def says_of_itself(path: Path) -> dict[str, str]:
    """The name and origin that a shard carries; empty where it has none or cannot be read."""
    try:
        metadata = _parts(_mapped(path))[0].get("__metadata__", {})
    except (OSError, ValueError, AttributeError):
        return {}
    return metadata if isinstance(metadata, dict) else {}


def _mapped(path: Path) -> NDArray[np.uint8]:
    """A file's bytes, mapped. Five times as quick to open as np.memmap, which resolves the path first."""
    with open(path, "rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def _parts(data: NDArray[np.uint8]) -> tuple[dict[str, Any], NDArray[np.uint8]]:
    """Header and body of a safetensors file; raises ValueError where there is none."""
    if len(data) < 8:
        raise ValueError("is too short for a shard")
    (length,) = struct.unpack("<Q", data[:8].tobytes())
    return json.loads(data[8 : 8 + length].tobytes()), data[8 + length :]
