r"""From a source to a store, in chunks that survive a stop (docs/data.md, "Encoding").

    rows of a chunk --prepare (threads)--> pictures --autoencoder--> latents   \
                    `--unique captions-----text encoder------------> tokens     > shards, then the marker
    every marker there --seal--> manifest.json

Chunk k is rows k * chunk_rows ... of the source; worker r of W takes chunks r mod W. A chunk with its marker
and files is finished and never encoded again. Which worker encodes a chunk changes no byte of it.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import shoestring
from shoestring.data.begun import begin, captions_of_source
from shoestring.data.chunks import ChunkWriter, Markers, Work
from shoestring.data.encoders import PIXELS_AT_ONCE, CaptionEncoder, Encoders, ImageEncoder
from shoestring.data.folder import refuse_url
from shoestring.data.manifest import BEGUN, FORMAT, MANIFEST, first_columns
from shoestring.data.rows import Row, Source
from shoestring.data.seal import check_bad, seal
from shoestring.data.store import Store
from shoestring.data.text_column import FLOAT16
from shoestring.data.transforms import BadImage, Prepared, prepare, quiet_pillow, says_side
from shoestring.errors import SourceError, StoreError
from shoestring.interfaces import Log
from shoestring.models.autoencoders import PIXELS
from shoestring.models.text_encoders import HASHING
from shoestring.storage import read_json, writing_to

ENOUGH_ROWS = 1000  # rows after which the share of bad ones is believed

Progress = Callable[[int, int | None], None]
"""Called with (rows done by this worker, rows it has in all if known)."""


@dataclass(frozen=True)
class EncodeSettings:
    """How a source is encoded. Encoders are names, local folders or hub ids (`id@revision` to fix one)."""

    autoencoder: str = PIXELS
    text_encoder: str = HASHING
    sizes: tuple[int, ...] = (32,)
    pad: str = "none"
    max_tokens: int | None = None
    text_dtype: str = FLOAT16  # or int8: half the bytes (text_column.py)
    log_variance: bool = False  # store the latents' distribution, to be sampled anew in each epoch
    flip: bool = False  # store a mirrored version beside each image whose captions say no side
    upscale: bool = False  # enlarge images that are too small instead of leaving them out
    held_out: int = 0
    chunk_rows: int = 4096
    max_bad: float = 0.05

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", tuple(sorted(set(self.sizes))))
        if not self.sizes or self.sizes[0] < 1:
            raise StoreError(f"sizes {self.sizes}: give one or more sizes in pixels, such as --size 32.")
        if self.chunk_rows < 1 or self.held_out < 0 or not 0 <= self.max_bad <= 1:
            raise StoreError(
                f"chunk_rows {self.chunk_rows}, held_out {self.held_out}, max_bad {self.max_bad}: "
                "give at least 1, at least 0, and a share from 0 to 1."
            )

    def options(self) -> list[str]:
        """The command-line options that differ from their defaults."""
        words: list[str] = []
        for each in fields(self):
            value = getattr(self, each.name)
            if value == each.default or each.name == "sizes":
                continue
            name = f"--{each.name.replace('_', '-')}"
            words += [name] if value is True else [name, str(value)]
        return words + [word for size in self.sizes for word in ("--size", str(size))]

    def load(self, device: torch.device) -> Encoders:
        """The encoders that these settings name."""
        image = ImageEncoder.load(self.autoencoder, device=device, log_variance=self.log_variance)
        text = CaptionEncoder.load(
            self.text_encoder, self.text_dtype, pad=self.pad, max_tokens=self.max_tokens, device=device
        )
        return Encoders(image, text)


def encode(
    source: Source,
    out: Path,
    settings: EncodeSettings,
    *,
    device: torch.device | None = None,
    worker: tuple[int, int] = (0, 1),
    log: Log = print,
    progress: Progress | None = None,
    encoders: Encoders | None = None,
) -> Store | None:
    """Encode this worker's chunks of `source` into the store `out`; the finished store, or None.

    None means that other workers have chunks left to do. Running it again goes on where it stopped. Ready
    `encoders` stand for those that `settings` names. Raises `StoreError` where `out` was begun with other
    settings, `SourceError` where too many rows are bad.
    """
    check_worker(worker)
    out = Path(out)
    _check_place(out)
    device = device or torch.device("cpu")
    job = _Job(source, out, settings, encoders or settings.load(device))
    job.begin()
    if not (out / MANIFEST).is_file() or job.markers() is None:
        job.run(worker, Work(out, worker, device), progress or (lambda done, total: None))
        markers = job.markers()
        if markers is None:
            return None
        seal(out, job.begun, markers, settings.max_bad, log)
    return Store.open(out)


def check_worker(worker: tuple[int, int]) -> None:
    """Raise `StoreError` for a worker that is not one of its count."""
    rank, count = worker
    if not 0 <= rank < count:
        raise StoreError(f"worker {rank}/{count}: give 0/{count} to {count - 1}/{count}.")


@dataclass
class _Chunk:
    """What has been gathered of a chunk so far."""

    source_rows: int = 0
    latents: dict[int, dict[str, list[NDArray[Any]]]] = field(default_factory=dict)
    caption_ids: list[list[int]] = field(default_factory=list)
    captions: dict[str, int] = field(default_factory=dict)  # unique caption -> its number
    size_crop: list[tuple[int, ...]] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)
    splits: list[list[Any]] = field(default_factory=list)  # [name, rows], in order
    skipped: list[dict[str, str]] = field(default_factory=list)
    mirrored: int = 0

    def take(self, row: Row, prepared: Prepared) -> None:
        """Note everything of a good row but its latents."""
        self.caption_ids.append([self.captions.setdefault(text, len(self.captions)) for text in row.captions])
        self.size_crop.append(prepared.size_crop)
        self.records.append({"key": row.key, "captions": list(row.captions), **row.extra})
        if not self.splits or self.splits[-1][0] != row.split:
            self.splits.append([row.split, 0])
        self.splits[-1][1] += 1

    def table(self) -> dict[str, NDArray[Any]]:
        """The arrays of the chunk's shard of rows."""
        size_crop = np.array(self.size_crop, dtype=np.int32).reshape(len(self.records), 6)
        return caption_table(self.caption_ids) | {"size_crop": size_crop}

    def said(self) -> dict[str, Any]:
        """What the marker says of the chunk's rows."""
        return {
            "source_rows": self.source_rows,
            "splits": self.splits,
            "skipped": self.skipped,
            "mirrored": self.mirrored,
        }


class _Job:
    """One worker's encoding of one source into one store."""

    def __init__(self, source: Source, out: Path, settings: EncodeSettings, encoders: Encoders) -> None:
        self.source, self.out, self.settings, self.encoders = source, out, settings, encoders
        self.threads = min(8, os.cpu_count() or 1)
        self.batch = batch_of(settings.sizes)

    # --- what the store was begun with -------------------------------------------------------------------

    def begin(self) -> None:
        """Write down what this store is made of, or compare with what is there."""
        text, identity = self.encoders.text, self._identity()
        with writing_to(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
        self.begun = begin(
            self.out,
            identity,
            lambda: text.calibrated(captions_of_source(self.source) if text.needs_calibration else ()),
            instead="another --out, or add to a finished store with `shoestring store add`",
        )
        self.chunks = Markers(self.out, first_columns(self.begun), old=self.begun["format"] == 1)

    def _identity(self) -> dict[str, Any]:
        settings = self.settings
        return {
            "format": FORMAT,
            "shoestring": shoestring.__version__,
            "command": shlex.join(["shoestring", "encode", *self.source.words, *settings.options()]),
            "source": self.source.describe(),
            "autoencoder": self.encoders.image.identity(),
            **self.encoders.text.identity(),
            "latent_dtype": self.encoders.image.dtype,
            "null_caption": "one zero token",
            "sizes": self.encoders.image.shapes(settings.sizes),
            "preprocessing": {
                "crop": "centre square",
                "resize": "bicubic with antialias (Pillow)",
                "upscale": settings.upscale,
                "flip": settings.flip,
            },
            "log_variance": settings.log_variance,
            "held_out": settings.held_out,
            "chunk_rows": settings.chunk_rows,
        }

    # --- chunks ------------------------------------------------------------------------------------------

    def run(self, worker: tuple[int, int], work: Work, progress: Progress) -> None:
        """Encode this worker's unfinished chunks."""
        (chunk, count), step, total = worker, self.settings.chunk_rows, self.total_rows()
        todo = None
        if total is not None:
            starts = range(chunk * step, total, count * step)
            todo = sum(min(step, total - start) for start in starts if self.chunks.of(start // step) is None)
        done, bad = 0, Counter[str]()
        with ThreadPoolExecutor(self.threads) as pool, quiet_pillow():
            while total is None or chunk * step < total:
                if self.chunks.of(chunk) is None:
                    begun = time.perf_counter()
                    found = self._read_chunk(chunk, pool, partial(_tell, progress, done, todo))
                    if not found.source_rows:
                        break
                    finish = self._write_chunk(chunk, found)
                    work.add(found.source_rows, time.perf_counter() - begun)
                    finish()
                    done += found.source_rows
                    bad.update(each["reason"] for each in found.skipped)
                    if done >= ENOUGH_ROWS:
                        check_bad(bad, done, self.settings.max_bad)
                chunk += count

    def total_rows(self) -> int | None:
        """Rows of the source: as it says, as the manifest says, or where a chunk ended early."""
        if self.source.num_rows is not None:
            return self.source.num_rows
        with contextlib.suppress(OSError, ValueError, KeyError):
            return int(read_json(self.out / MANIFEST)["source_rows"])
        for chunk in self.chunks.numbers():
            marker = self.chunks.of(chunk)
            if marker is not None and marker["source_rows"] < self.settings.chunk_rows:
                return chunk * self.settings.chunk_rows + int(marker["source_rows"])
        return None

    def markers(self) -> list[dict[str, Any]] | None:
        """The markers of all chunks, or None while one is missing."""
        total = self.total_rows()
        return None if total is None else self.chunks.all(-(-total // self.settings.chunk_rows))

    def _read_chunk(self, chunk: int, pool: ThreadPoolExecutor, progress: Callable[[int], None]) -> _Chunk:
        start = chunk * self.settings.chunk_rows
        rows = self.source.rows(start, start + self.settings.chunk_rows)
        found = _Chunk()
        while batch := list(islice(rows, self.batch)):
            found.source_rows += len(batch)
            decoded = any(isinstance(row.image, bytes) for row in batch)
            results = (pool.map if decoded else map)(self._prepare, batch)
            good = []
            for row, result in zip(batch, results, strict=True):
                if isinstance(result, str):
                    found.skipped.append({"key": row.key, "reason": result})
                else:
                    found.take(row, result)
                    good.append((row, result))
            if good:
                self._encode_pictures(good, found)
            progress(found.source_rows)
        own = {name for name, _ in found.splits}
        if self.settings.held_out and own - {"train"}:
            raise SourceError(
                f"held_out {self.settings.held_out}: the source has splits of its own "
                f"({', '.join(sorted(own))}). Leave out --held-out."
            )
        return found

    def _prepare(self, row: Row) -> Prepared | str:
        """A row's pictures, or the reason why it is left out."""
        if row.problem:
            return row.problem
        if not row.captions:
            return "no caption"
        try:
            return prepare(row.image, self.settings.sizes, self.settings.upscale)
        except BadImage as reason:
            return str(reason)

    def _encode_pictures(self, good: list[tuple[Row, Prepared]], found: _Chunk) -> None:
        """Latents of a batch at every size, added to the chunk."""
        mirror = np.array([self.settings.flip and not says_side(row.captions) for row, _ in good])
        found.mirrored += int(mirror.sum())
        for size in self.settings.sizes:
            pictures = np.stack([prepared.pictures[size] for _, prepared in good])
            column = found.latents.setdefault(size, {})
            arrays = self.encoders.image.columns(pictures, mirror if self.settings.flip else None)
            for name, array in arrays.items():
                column.setdefault(name, []).append(array)

    def _write_chunk(self, chunk: int, found: _Chunk) -> Callable[[], None]:
        """Write the shards; what is returned writes the marker."""
        writer = ChunkWriter(self.out, self.begun, chunk, len(found.records))
        for size, shape in self.begun["sizes"].items():
            parts = found.latents.get(int(size), {})
            latents = {name: np.concatenate(arrays) for name, arrays in parts.items()}
            writer.arrays(f"latents-{size}", latents or self.encoders.image.none(shape))
        arrays, said = self.encoders.text.columns(list(found.captions), self.begun.get("text_channels"))
        writer.arrays("text", arrays)
        writer.arrays("rows", found.table())
        writer.lines("json", found.records)
        return lambda: writer.finish(found.said() | said)


def batch_of(sizes: tuple[int, ...]) -> int:
    """Pictures of these sizes that are encoded at once."""
    return max(1, min(256, PIXELS_AT_ONCE // max(sizes) ** 2))


def caption_table(caption_ids: list[list[int]]) -> dict[str, NDArray[np.int64]]:
    """Which captions each row has, as the arrays of a shard."""
    return {
        "caption_offsets": np.cumsum([0, *map(len, caption_ids)]).astype(np.int64),
        "caption_ids": np.array([each for ids in caption_ids for each in ids], dtype=np.int64),
    }


def _tell(progress: Progress, before: int, todo: int | None, rows: int) -> None:
    progress(before + rows, todo)


def _check_place(out: Path) -> None:
    """A new or empty folder, or a store: anything else is left alone."""
    refuse_url(out, "Encode into a folder of this machine, and copy that there.")
    with writing_to(out):
        if out.exists() and not out.is_dir():
            raise StoreError(f"{out}: is a file. Give a folder for the store.")
        is_store = (out / BEGUN).is_file() or (out / "chunks").is_dir()
        there = list(out.iterdir()) if out.is_dir() else []
        if any(path.suffix != ".partial" for path in there) and not is_store:  # those: killed as it began
            raise StoreError(f"{out}: holds other files and is not a store. Give a new or an empty folder.")
