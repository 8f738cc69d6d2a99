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
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
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
from shoestring.data.rows import Row, Source
from shoestring.data.seal import check_bad, seal
from shoestring.data.shards import FileEntry, write_lines, write_shard
from shoestring.data.store import BEGUN, FORMAT, MANIFEST, Store, marker_name, shard_name, split_revision
from shoestring.data.transforms import BadImage, Prepared, mirrored, prepare, says_side
from shoestring.errors import ShoestringError, SourceError, StoreError
from shoestring.interfaces import Log
from shoestring.models.autoencoders import (
    PIXELS,
    PixelAutoencoder,
    as_scaling,
    encode_images,
    latent_channels,
    load_autoencoder,
    spatial_factor,
    weights_fingerprint,
)
from shoestring.models.text_encoders import HASHING, TextEncoder, load_text_encoder
from shoestring.storage import read_json, write_json, writing_to

PIXELS_AT_ONCE = 2**22  # of a batch of images for the autoencoder
CAPTIONS_AT_ONCE = 1024
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


def encode(
    source: Source,
    out: Path,
    settings: EncodeSettings,
    *,
    device: torch.device | None = None,
    worker: tuple[int, int] = (0, 1),
    log: Log = print,
    progress: Progress | None = None,
) -> Store | None:
    """Encode this worker's chunks of `source` into the store `out`; the finished store, or None.

    None means that other workers have chunks left to do. Running it again goes on where it stopped. Raises
    `StoreError` where `out` was begun with other settings, `SourceError` where too many rows are bad.
    """
    rank, count = worker
    if not 0 <= rank < count:
        raise StoreError(f"worker {rank}/{count}: give 0/{count} to {count - 1}/{count}.")
    out = Path(out)
    _check_place(out)
    job = _Job(source, out, settings, _Models.load(settings, device or torch.device("cpu")))
    job.begin()
    if not (out / MANIFEST).is_file() or job.markers() is None:
        job.run(rank, count, progress or (lambda done, total: None))
        markers = job.markers()
        if markers is None:
            return None
        seal(out, job.begun, markers, settings.max_bad, log)
    return Store.open(out)


@dataclass
class _Models:
    """Both encoders on their device."""

    autoencoder: torch.nn.Module
    text: TextEncoder
    device: torch.device
    names: tuple[tuple[str, str | None], tuple[str, str | None]]

    @classmethod
    def load(cls, settings: EncodeSettings, device: torch.device) -> _Models:
        image, text = split_revision(settings.autoencoder), split_revision(settings.text_encoder)
        autoencoder = load_autoencoder(image[0], revision=image[1])
        encoder = load_text_encoder(
            text[0], max_tokens=settings.max_tokens, pad=settings.pad, revision=text[1]
        )
        factor = spatial_factor(autoencoder)
        if odd := [size for size in settings.sizes if size % factor]:
            raise StoreError(
                f"size {odd[0]}: this autoencoder needs multiples of {factor}; "
                f"nearest: {max(1, odd[0] // factor) * factor} or {(odd[0] // factor + 1) * factor}."
            )
        if settings.log_variance and type(autoencoder).__name__ != "AutoencoderKL":
            raise StoreError(
                f"log_variance: {settings.autoencoder} gives no distribution. Leave out --log-variance."
            )
        encoder.model.to(device)
        return cls(autoencoder.to(device), encoder, device, (image, text))

    @property
    def is_pixels(self) -> bool:
        return isinstance(self.autoencoder, PixelAutoencoder)

    def identity(self, sizes: tuple[int, ...]) -> dict[str, Any]:
        """The manifest's entries on encoders and latents."""
        scaling, factor = as_scaling(self.autoencoder), spatial_factor(self.autoencoder)
        channels = latent_channels(self.autoencoder)
        probe = self.text.encode(["a probe"])
        return {
            "autoencoder": {
                "id": self.names[0][0],
                "revision": self.names[0][1],
                "class": type(self.autoencoder).__name__,
                "channels": channels,
                "spatial_factor": factor,
                "scaling": {"shift": list(scaling.shift), "factor": list(scaling.factor)},
                "weights": weights_fingerprint(self.autoencoder),
            },
            "text_encoder": self.text.identity()
            | {"pooled": None if probe.pooled is None else probe.pooled.shape[1]},
            "latent_dtype": "uint8 (x = value / 127.5 - 1)" if self.is_pixels else "float16, raw (unscaled)",
            "text_dtype": "float16",
            "null_caption": "one zero token",
            "sizes": {str(size): [channels, size // factor, size // factor] for size in sizes},
        }

    def encode(self, pictures: NDArray[np.uint8]) -> tuple[NDArray[Any], NDArray[Any] | None]:
        """Pictures (B, H, W, 3) -> mean and log-variance as stored."""
        if self.is_pixels:
            return np.ascontiguousarray(pictures.transpose(0, 3, 1, 2)), None
        images = torch.from_numpy(pictures).to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        mean, log_variance = encode_images(self.autoencoder, images)
        latents = mean.half().cpu().numpy()
        if not np.isfinite(latents).all():
            raise ShoestringError(f"autoencoder {self.names[0][0]}: gave latents beyond float16's range.")
        return latents, None if log_variance is None else log_variance.half().cpu().numpy()


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


class _Job:
    """One worker's encoding of one source into one store."""

    def __init__(self, source: Source, out: Path, settings: EncodeSettings, models: _Models) -> None:
        self.source, self.out, self.settings, self.models = source, out, settings, models
        self.threads = min(8, os.cpu_count() or 1)
        self.batch = max(1, min(256, PIXELS_AT_ONCE // max(settings.sizes) ** 2))

    # --- what the store was begun with -------------------------------------------------------------------

    def begin(self) -> None:
        """Write down what this store is made of, or compare with what is there."""
        path = self.out / BEGUN
        asked = self._identity()
        if not path.is_file():
            write_json(path, asked)
        begun = read_json(path)
        differences = list(_differences(begun, asked))
        if differences:
            raise StoreError(
                f"{self.out}: was begun with other settings: {'; '.join(differences[:6])}. "
                "Use the same settings, or another --out."
            )
        self.begun = begun

    def _identity(self) -> dict[str, Any]:
        settings = self.settings
        return {
            "format": FORMAT,
            "shoestring": shoestring.__version__,
            "command": shlex.join(["shoestring", "encode", *self.source.words, *settings.options()]),
            "source": self.source.describe(),
            **self.models.identity(settings.sizes),
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

    def run(self, rank: int, count: int, progress: Progress) -> None:
        """Encode this worker's unfinished chunks."""
        step, total = self.settings.chunk_rows, self.total_rows()
        todo = None
        if total is not None:
            starts = range(rank * step, total, count * step)
            todo = sum(min(step, total - start) for start in starts if self.marker(start // step) is None)
        done, bad = 0, Counter[str]()
        chunk = rank
        with ThreadPoolExecutor(self.threads) as pool:
            while total is None or chunk * step < total:
                if self.marker(chunk) is None:
                    found = self._read_chunk(chunk, pool, partial(_tell, progress, done, todo))
                    if not found.source_rows:
                        break
                    self._write_chunk(chunk, found)
                    done += found.source_rows
                    bad.update(each["reason"] for each in found.skipped)
                    if done >= ENOUGH_ROWS:
                        check_bad(bad, done, self.settings.max_bad)
                chunk += count

    def marker(self, chunk: int) -> dict[str, Any] | None:
        """What a finished chunk's marker says; None where it or one of its files is missing."""
        try:
            marker: dict[str, Any] = read_json(self.out / marker_name(chunk))
            whole = all((self.out / e["path"]).stat().st_size == e["bytes"] for e in marker["files"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return marker if whole else None

    def total_rows(self) -> int | None:
        """Rows of the source: as it says, as the manifest says, or where a chunk ended early."""
        if self.source.num_rows is not None:
            return self.source.num_rows
        with contextlib.suppress(OSError, ValueError, KeyError):
            return int(read_json(self.out / MANIFEST)["source_rows"])
        for path in sorted((self.out / "chunks").glob("*.json"), reverse=True):
            marker = self.marker(int(path.stem))
            if marker is not None and marker["source_rows"] < self.settings.chunk_rows:
                return int(marker["chunk"]) * self.settings.chunk_rows + int(marker["source_rows"])
        return None

    def markers(self) -> list[dict[str, Any]] | None:
        """The markers of all chunks, or None while one is missing."""
        total = self.total_rows()
        if total is None:
            return None
        markers = []
        for chunk in range(-(-total // self.settings.chunk_rows)):
            marker = self.marker(chunk)
            if marker is None:
                return None
            markers.append(marker)
        return markers

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
            mean, spread = self.models.encode(pictures)
            arrays = {"mean": mean}
            if self.settings.log_variance and spread is not None:
                arrays["log_variance"] = spread
            if self.settings.flip:
                for name, array in list(arrays.items()):
                    arrays[f"{name}_flipped"] = array.copy()
                if mirror.any():
                    turned = np.stack([mirrored(each) for each in pictures[mirror]])
                    for name, values in zip(
                        ("mean", "log_variance"), self.models.encode(turned), strict=True
                    ):
                        if name in arrays and values is not None:
                            arrays[f"{name}_flipped"][mirror] = values
            column = found.latents.setdefault(size, {})
            for name, array in arrays.items():
                column.setdefault(name, []).append(array)

    def _write_chunk(self, chunk: int, found: _Chunk) -> None:
        """Shards first, the marker last."""
        rows, files = len(found.records), []

        def shard(column: str, arrays: Mapping[str, NDArray[Any]]) -> None:
            files.append(write_shard(self.out, shard_name(column, chunk), arrays, rows))

        for size, shape in self.begun["sizes"].items():
            names = found.latents.get(int(size), {})
            kind = np.uint8 if self.models.is_pixels else np.float16
            empty: dict[str, NDArray[Any]] = {} if names else {"mean": np.empty((0, *shape), kind)}
            shard(f"latents-{size}", empty | {name: np.concatenate(parts) for name, parts in names.items()})
        text, cut = self._encode_text(list(found.captions))
        shard("text", text)
        lengths = [len(ids) for ids in found.caption_ids]
        shard(
            "rows",
            {
                "caption_offsets": np.cumsum([0, *lengths]).astype(np.int64),
                "caption_ids": np.array([i for ids in found.caption_ids for i in ids], dtype=np.int64),
                "size_crop": np.array(found.size_crop, dtype=np.int32).reshape(rows, 6),
            },
        )
        files.append(write_lines(self.out, shard_name("json", chunk), found.records))
        write_json(self.out / marker_name(chunk), _marker_of(chunk, found, files, cut))

    def _encode_text(self, captions: list[str]) -> tuple[dict[str, NDArray[Any]], list[int]]:
        """The text shard of a chunk's unique captions, and how many tokens of each were cut."""
        width = self.models.text.width
        lengths, cut = [0], list[int]()
        parts, pooled = [torch.zeros(0, width).half()], list[torch.Tensor]()
        for start in range(0, len(captions), CAPTIONS_AT_ONCE):
            encoded = self.models.text.encode(captions[start : start + CAPTIONS_AT_ONCE])
            lengths += [len(each) for each in encoded.tokens]
            parts.append(torch.cat(encoded.tokens).half())
            pooled += [] if encoded.pooled is None else [encoded.pooled.half()]
            cut += encoded.cut
        tokens = torch.cat(parts)
        if not torch.isfinite(tokens).all():
            raise ShoestringError(
                f"text encoder {self.settings.text_encoder}: gave tokens beyond float16's range."
            )
        arrays: dict[str, NDArray[Any]] = {
            "tokens": tokens.numpy(),
            "offsets": np.cumsum(lengths).astype(np.int64),
        }
        if pooled:
            arrays["pooled"] = torch.cat(pooled).numpy()
        return arrays, cut


def _tell(progress: Progress, before: int, todo: int | None, rows: int) -> None:
    progress(before + rows, todo)


def _marker_of(chunk: int, found: _Chunk, files: list[FileEntry], cut: list[int]) -> dict[str, Any]:
    return {
        "chunk": chunk,
        "source_rows": found.source_rows,
        "rows": len(found.records),
        "splits": found.splits,
        "skipped": found.skipped,
        "cut": {"captions": sum(each > 0 for each in cut), "tokens": sum(cut)},
        "mirrored": found.mirrored,
        "files": [entry.to_json() for entry in files],
    }


def _check_place(out: Path) -> None:
    """A new or empty folder, or a store: anything else is left alone."""
    with writing_to(out):
        if out.exists() and not out.is_dir():
            raise StoreError(f"{out}: is a file. Give a folder for the store.")
        if out.is_dir() and any(out.iterdir()) and not (out / BEGUN).is_file():
            raise StoreError(f"{out}: holds other files and is not a store. Give a new or an empty folder.")
        out.mkdir(parents=True, exist_ok=True)


def _differences(begun: Any, asked: Any, name: str = "") -> Iterator[str]:
    """What two descriptions of a store disagree on, apart from names that change no number."""
    if name in ("shoestring", "command", "source.path", "autoencoder.id", "text_encoder.id") or (
        name.endswith(".revision")
    ):
        return
    if isinstance(begun, dict) and isinstance(asked, dict):
        for key in sorted(begun.keys() | asked.keys()):
            yield from _differences(begun.get(key), asked.get(key), f"{name}.{key}".lstrip("."))
    elif begun != asked:
        yield f"{name} {begun} there, {asked} now"
