r"""Adding to a finished store: a size, captions, or another text encoder (docs/data.md, "Adding").

    the same source's rows --keys compared--> pictures --autoencoder--> columns/latents-512/
                                        `---> other captions \
    the store's own captions ------------------------------- text encoder --> columns/text-name/, json-name/

Rows keep their numbers and nothing that is there is written again. An addition is made in chunks with markers
of its own, so that it goes on after a stop and workers can share it, like a first encoding. Until its last
chunk is finished the store is as it was; then a new manifest names the new columns.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import islice, pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

import shoestring
from shoestring.data.begun import begin, first_captions
from shoestring.data.chunks import ChunkWriter, Markers, Work
from shoestring.data.encode import Progress, batch_of, caption_table, check_worker
from shoestring.data.encoders import CaptionEncoder, ImageEncoder
from shoestring.data.folder import is_url
from shoestring.data.manifest import FORMAT, SKIPPED, addition_name, made_by
from shoestring.data.rows import Row, Source
from shoestring.data.seal import merged, sum_of, tell_cut, write_manifest
from shoestring.data.sources import open_source
from shoestring.data.store import Store
from shoestring.data.texts import MAIN, TextSet, text_sets
from shoestring.data.transforms import BadImage, original_size, prepare, quiet_pillow, says_side
from shoestring.errors import SourceError, StoreError
from shoestring.interfaces import Log
from shoestring.storage import fingerprint, remove_leftovers

MAX_BAD = 0.05  # share of rows that may lack the added caption
ALIKE = 0.1  # relative difference up to which two encodings are of the same picture, on any machine


class Addition(Protocol):
    """Something to add. `words` are what follows `shoestring store add STORE` to go on with it."""

    name: str
    columns: list[str]
    words: list[str]

    def identity(self) -> dict[str, Any]:
        """JSON: what the columns are made of, and what the manifest gains."""

    def calibrated(self) -> dict[str, Any]:
        """What is measured once, before the first chunk."""

    def write(self, writer: ChunkWriter, chunk: int) -> dict[str, Any]:
        """Write a chunk's shards; what its marker says."""

    def check(self, markers: Sequence[Mapping[str, Any]], log: Log) -> None:
        """Raise `SourceError` where the whole of it cannot be used."""


def add(
    store: Store,
    addition: Addition,
    *,
    device: torch.device | None = None,
    worker: tuple[int, int] = (0, 1),
    log: Log = print,
    progress: Progress | None = None,
) -> Store | None:
    """Make this worker's chunks of an addition; the store with it, or None while others have chunks to do.

    Raises `StoreError` where it was begun with other settings, or the source's rows are not the store's.
    """
    check_worker(worker)
    if is_url(store.place):
        raise StoreError(
            f"{store.place}: is not on this machine. Add to a copy of it (`shoestring store copy`)."
        )
    out, counts = store.path, store.manifest["chunks"]
    asked = {
        "format": FORMAT,
        "shoestring": shoestring.__version__,
        "words": shlex.join(addition.words),
        "columns": addition.columns,
        "rows": fingerprint([e["sha256"] for e in store.manifest["files"] if "/json/" in e["path"]]),
        **addition.identity(),
    }
    begun = begin(
        out, asked, addition.calibrated, addition=addition.name, instead=_instead(store, addition.name)
    )
    manifest = merged(store.manifest, addition.name, begun)
    markers = Markers(out, addition.columns, addition.name)
    todo = [chunk for chunk in range(worker[0], len(counts), worker[1]) if markers.of(chunk) is None]
    work, done = Work(out, worker, device or torch.device("cpu"), addition.name), 0
    for chunk in todo:
        start = time.perf_counter()
        writer = ChunkWriter(out, manifest, chunk, counts[chunk], addition.name)
        said = addition.write(writer, chunk)
        work.add(counts[chunk], time.perf_counter() - start)
        writer.finish(said)
        done += counts[chunk]
        if progress is not None:
            progress(done, sum(counts[each] for each in todo))
    finished = markers.all(len(counts))
    if finished is None:
        return None
    addition.check(finished, log)
    remove_leftovers(out)
    write_manifest(out, Store.open(out).manifest)
    return Store.open(out)


def _instead(store: Store, addition: str) -> str:
    if addition in store.manifest.get("added", {}):
        return "add it with another --name"
    unfinished = [store.path / addition_name(addition), store.path / "chunks" / addition]
    return f"begin it anew after: rm -r {shlex.join(map(str, unfinished))}"


# --- a source's rows, matched with the store's -----------------------------------------------------------


class Matched(NamedTuple):
    """A row of the store and of the source at once."""

    number: int  # in the store
    row: Row
    record: dict[str, Any]  # what the store knows of it
    height: int  # of the picture, when it was first encoded
    width: int


class MatchedRows:
    """The rows of a store as a source gives them again: the same keys in the same order, or `StoreError`."""

    def __init__(self, store: Store, source: Source) -> None:
        self.store, self.source = store, source

    def of(self, chunk: int) -> Iterator[Matched]:
        """The rows of a chunk; those that were left out of the store are passed over."""
        step = int(self.store.manifest["chunk_rows"])
        wanted = self._wanted(chunk)
        expected = next(wanted, None)
        for row in self.source.rows(chunk * step, (chunk + 1) * step):
            if expected is not None and row.key == expected.record["key"]:
                self._compare(row, expected.record)
                yield expected._replace(row=row)
                expected = next(wanted, None)
            elif row.key not in self._left_out:
                known = repr(expected.record["key"]) if expected else "no more rows"
                raise StoreError(
                    f"{self.store.path}: was made of other rows: the source has {row.key!r} where the store "
                    f"has {known}. {self.advice}"
                )
        if expected is not None:
            raise StoreError(
                f"{self.store.path}: the source has no row {expected.record['key']!r} any more, which the "
                f"store has. {self.advice}"
            )

    def compare_size(self, matched: Matched, height: int, width: int) -> None:
        """Raise `StoreError` where a picture is not as large as it was when first encoded."""
        if (height, width) != (matched.height, matched.width) and not matched.row.extra:
            raise StoreError(
                f"{self.store.path}: row {matched.row.key!r} was a picture of {matched.width} x "
                f"{matched.height} pixels and is one of {width} x {height} now. {self.advice}"
            )

    @property
    def advice(self) -> str:
        """What to do about another source."""
        return f"Add from what the store was made of: {made_by(self.store.manifest)}"

    def _wanted(self, chunk: int) -> Iterator[Matched]:
        numbers = rows_of(self.store, chunk)
        if len(numbers):
            sizes = self.store.size_crop(numbers, self.store.sizes[0])[:, :2].tolist()
            for number, record, size in zip(
                numbers.tolist(), self.store.records(numbers), sizes, strict=True
            ):
                yield Matched(number, _NO_ROW, record, *size)

    def _compare(self, row: Row, record: Mapping[str, Any]) -> None:
        if row.problem:
            raise SourceError(
                f"row {row.key!r}: {row.problem}, though the store has it. Bring it back, or make another "
                "store."
            )
        for name, value in json.loads(json.dumps(dict(row.extra))).items():
            if record.get(name) != value:
                raise StoreError(
                    f"{self.store.path}: row {row.key!r} of the source is another {name} than the store's. "
                    f"{self.advice}"
                )

    @cached_property
    def _left_out(self) -> set[str]:
        try:
            lines = (self.store.path / SKIPPED).read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return set()
        return {json.loads(line)["key"] for line in lines}


_NO_ROW = Row("", b"", ())


def rows_of(store: Store, chunk: int) -> NDArray[np.int64]:
    """The numbers of a chunk's rows."""
    counts = store.manifest["chunks"]
    return np.arange(counts[chunk]) + sum(counts[:chunk])


# --- a size ----------------------------------------------------------------------------------------------


class SizeAddition:
    """Latents at one more size, by the autoencoder that made the others.

    `words` are what the command line gave besides `--size`.
    """

    def __init__(
        self,
        store: Store,
        source: Source,
        size: int,
        image: ImageEncoder,
        *,
        upscale: bool = False,
        words: Sequence[str] = (),
    ) -> None:
        self.name, self.columns = f"latents-{size}", [f"latents-{size}"]
        if size in store.sizes and self.name not in store.manifest.get("added", {}):
            raise StoreError(f"{store.path}: holds {size} pixels already. Add another --size.")
        if _unnamed(image.identity()) != _unnamed(store.manifest["autoencoder"]):
            raise StoreError(
                f"{store.path}: its latents were made by {store.manifest['autoencoder']['id']} with other "
                f"weights than {image.name} has. Name the place of the old ones with --autoencoder."
            )
        was = store.manifest["preprocessing"]
        self.store, self.source, self.size, self.image = store, source, size, image
        self.upscale, self.flip = upscale or was["upscale"], was["flip"]
        self.matched = MatchedRows(store, source)
        self.known = first_sizes(store)[0]
        self.words = [*words, "--size", str(size)]

    def identity(self) -> dict[str, Any]:
        sizes = self.image.shapes([self.size])
        return {"source": self.source.describe(), "sizes": sizes, "upscale": self.upscale}

    def calibrated(self) -> dict[str, Any]:
        return {}

    def check(self, markers: Sequence[Mapping[str, Any]], log: Log) -> None:
        """Every row was checked when it was read."""

    def write(self, writer: ChunkWriter, chunk: int) -> dict[str, Any]:
        parts: dict[str, list[NDArray[Any]]] = {}
        rows, mirrored = self.matched.of(chunk), 0
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, quiet_pillow():
            while batch := list(islice(rows, batch_of((self.size,)))):
                pictures = np.stack(list(pool.map(self._picture, batch)))
                if not parts:
                    self._compare_content(batch[0])
                mirror = np.array([self.flip and not says_side(each.record["captions"]) for each in batch])
                mirrored += int(mirror.sum())
                for name, array in self.image.columns(pictures, mirror if self.flip else None).items():
                    parts.setdefault(name, []).append(array)
        latents = {name: np.concatenate(arrays) for name, arrays in parts.items()}
        shape = self.image.shapes([self.size])[str(self.size)]
        writer.arrays(self.columns[0], latents or self.image.none(shape))
        return {"mirrored": mirrored}

    def _picture(self, matched: Matched) -> NDArray[np.uint8]:
        try:
            prepared = prepare(matched.row.image, (self.size,), self.upscale)
        except BadImage as reason:
            mend = "Enlarge such pictures with --upscale, or take a smaller --size"
            raise SourceError(
                f"row {matched.row.key!r}: {reason} for {self.size} pixels, and every row of a store has "
                f"all its sizes. {mend if str(reason) == 'too small' else 'Bring the old picture back'}, or "
                "make another store."
            ) from None
        self.matched.compare_size(matched, *prepared.size_crop[:2])
        return prepared.pictures[self.size]

    def _compare_content(self, matched: Matched) -> None:
        """One picture a chunk, encoded at a size that the store has, must give the latents it has.

        A source that says what it drew was compared by that, and draws anew at each size.
        """
        if matched.row.extra:
            return
        picture = prepare(matched.row.image, (self.known,), upscale=True).pictures[self.known]
        mean = torch.from_numpy(self.image.columns(np.stack([picture]))["mean"]).float()
        ours = self.store.scaling.apply(mean / 127.5 - 1 if self.image.is_pixels else mean)
        theirs = self.store.latents(self.known, np.array([matched.number]))
        if (ours - theirs).norm() > ALIKE * theirs.norm().clamp(min=1e-3):
            raise StoreError(
                f"{self.store.path}: row {matched.row.key!r} of the source is another picture than the "
                f"store's. {self.matched.advice}"
            )


# --- captions --------------------------------------------------------------------------------------------


class CaptionAddition:
    """One more set of captions: other captions of the source, another text encoder, or both.

    Without `source` the captions are those of the store's first set. A row for which the source has none
    keeps those. `words` are what the command line gave besides `--name`.
    """

    def __init__(
        self,
        store: Store,
        source: Source | None,
        text: CaptionEncoder,
        *,
        name: str,
        words: Sequence[str] = (),
        max_bad: float = MAX_BAD,
    ) -> None:
        if not re.fullmatch(r"[\w-][\w.-]*", name) or name == MAIN:
            raise StoreError(
                f"captions named {name!r}: give a name of letters, digits, `-`, `_` and `.`, other than "
                f"{MAIN!r}, with --name."
            )
        self.name, self.columns = f"text-{name}", [f"text-{name}", f"json-{name}"]
        self.store, self.text, self.set_name, self.max_bad = store, text, name, max_bad
        self.source, self.matched = source, MatchedRows(store, source) if source else None
        made = text.identity()
        sets = [each for each in store.text_sets.values() if each.name != name]
        self.like = next((each for each in sets if _same_text(each, made)), None)
        if self.like is not None and source is None:
            raise StoreError(
                f"{store.path}: has its captions under this text encoder already ({self.like.name!r}). Name "
                "another --text-encoder, or other captions with --caption-column."
            )
        self._made = made if self.like is None else self.like.described()
        self.words = [*words, "--name", name]

    def identity(self) -> dict[str, Any]:
        captions = self.source.describe() if self.source else "those of the store"
        return {"captions": captions, "texts": {self.set_name: {"text_channels": None, **self._made}}}

    def calibrated(self) -> dict[str, Any]:
        """Channels of a new encoder; captions under one that the store knows take over its channels."""
        if self.like is not None or not self.text.needs_calibration:
            return {}
        own = (tuple(self.store.captions(row)) for row in range(len(self.store)))
        return self.text.calibrated(first_captions(own))

    def write(self, writer: ChunkWriter, chunk: int) -> dict[str, Any]:
        unique: dict[str, int] = {}
        ids, records, borrowed = list[list[int]](), list[dict[str, Any]](), 0
        with quiet_pillow():
            for key, own, others in self._captions(chunk):
                captions = others or own
                borrowed += not others
                ids.append([unique.setdefault(caption, len(unique)) for caption in captions])
                records.append({"key": key, "captions": captions})
        channels = text_sets(writer.begun)[self.set_name].channels
        arrays, said = self.text.columns(list(unique), channels)
        writer.arrays(self.columns[0], arrays | caption_table(ids))
        writer.lines(self.columns[1], records)
        return {**said, "borrowed": borrowed}

    def check(self, markers: Sequence[Mapping[str, Any]], log: Log) -> None:
        borrowed, rows = sum(marker["borrowed"] for marker in markers), len(self.store)
        if borrowed > self.max_bad * rows:
            enough = min(1.0, math.ceil(100 * borrowed / rows) / 100)
            raise SourceError(
                f"{borrowed} of {rows} rows have no caption to add, more than the {self.max_bad:.0%} "
                f"allowed. To let them keep their own: --max-bad {enough:.2f} (finished chunks are kept)."
            )
        if borrowed:
            log(f"{borrowed} of {rows} rows have no caption to add and keep their own")
        tell_cut(sum_of(markers, "cut"), self.text.encoder.max_tokens, log)

    def _captions(self, chunk: int) -> Iterator[tuple[str, list[str], list[str]]]:
        """(key, the store's captions, those to add) of a chunk's rows."""
        if self.matched is None:
            numbers = rows_of(self.store, chunk)
            for record in self.store.records(numbers) if len(numbers) else ():
                yield record["key"], record["captions"], record["captions"]
            return
        for each in self.matched.of(chunk):
            try:
                self.matched.compare_size(each, *original_size(each.row.image))
            except BadImage as reason:
                raise SourceError(
                    f"row {each.row.key!r}: {reason}, though the store has it. Bring the old picture back."
                ) from None
            yield each.row.key, each.record["captions"], list(each.row.captions)


# --- what the store was made of --------------------------------------------------------------------------


def source_again(
    store: Store,
    spec: str | None = None,
    *,
    size: int = 0,
    image_column: str | None = None,
    caption_columns: Sequence[str] = (),
    split: str | None = None,
) -> Source:
    """The source that a store was made of, opened as then but for what is given: a new place, other columns.

    A source that draws its pictures does so at the largest of the first sizes and `size`.
    """
    words = shlex.split(store.manifest["command"])[2:]
    told: dict[str, list[str]] = {}
    for option, value in pairwise(words):
        told.setdefault(option, []).append(value)
    if (spec or words[0]) == "scenes":
        if caption_columns:
            raise SourceError(
                "scenes have no other captions. Make another store to draw more of them a scene."
            )
        made = store.manifest["source"]
        drawn = {name: made[name] for name in _DRAWN if name in made}
        return open_source("scenes", scenes=drawn | {"size": max(size, *first_sizes(store))})
    return open_source(
        spec or words[0],
        image_column=image_column or next(iter(told.get("--image-column", [])), None),
        caption_columns=caption_columns or told.get("--caption-column", []),
        split=split or next(iter(told.get("--split", [])), None),
    )


def first_sizes(store: Store) -> list[int]:
    """The sizes that a store was first made with."""
    added = store.manifest.get("added", {})
    return [size for size in store.sizes if f"latents-{size}" not in added]


_DRAWN = ("level", "images", "seed", "held_out", "captions_per_image", "objects")


def _unnamed(described: Mapping[str, Any]) -> dict[str, Any]:
    """What counts of an encoder's entry: not its name, nor the weights of a decoder beside it."""
    passed = ("id", "revision", *(["weights"] if "encoder_weights" in described else []))
    return {key: each for key, each in described.items() if key not in passed}


def _same_text(one: TextSet, made: Mapping[str, Any]) -> bool:
    return one.dtype == made["text_dtype"] and _unnamed(one.encoder) == _unnamed(made["text_encoder"])
