"""A store: encoded images and captions on disk, read by row number (docs/data.md, "The store").

    manifest.json                           what is in it, how it was made, every file with its hashes
    columns/latents-32/00000.safetensors    mean (rows, C, h, w), log_variance and mean_flipped when asked for
    columns/text/00000.safetensors          tokens (T, C) and offsets (U + 1): U captions, each stored once;
                                            scales (T,) where tokens are int8
    columns/rows/00000.safetensors          caption_ids with caption_offsets (rows + 1); size_crop (rows, 6)
    columns/json/00000.jsonl                {"key", "captions", "scene"?}, one line a row
    chunks/00000.json                       the marker of a finished chunk

Columns added later lie beside these, their markers in chunks/<addition>/ (docs/data.md, "Adding"). Shard k of
every column holds the same rows. Shards are mapped, not read; the CRC of each is checked when it
is first opened.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shoestring.data.folder import Files, Folder, Progress, is_url
from shoestring.data.integrity import Entry, Verification
from shoestring.data.manifest import MANIFEST, check_origins, column_of, shard_name
from shoestring.data.resident import Resident
from shoestring.data.shards import Array
from shoestring.data.splits import Rows, Split
from shoestring.data.statistics import own_scaling, scaling_by
from shoestring.data.texts import MAIN, Texts, lines_of, text_sets
from shoestring.data.transforms import crop_corner
from shoestring.errors import CorruptStoreError, StoreError
from shoestring.models.autoencoders import sample_latents
from shoestring.storage import fingerprint


class Store:
    """An open store. Row arguments are int64 arrays of row numbers, in any order and with repeats."""

    def __init__(self, files: Files, manifest: dict[str, Any]) -> None:
        self.files, self.manifest = files, manifest
        self.sizes = tuple(int(size) for size in manifest["sizes"])
        self.splits = {name: Split(**fields) for name, fields in manifest["splits"].items()}
        self.scaling = own_scaling(manifest)
        self._starts = np.cumsum([0, *manifest["chunks"]])
        self._entries: dict[str, Entry] = {entry["path"]: entry for entry in manifest["files"]}
        self._shards = Resident(files, self._entries)
        self.text_sets = text_sets(manifest)
        self._texts = self._reading(MAIN)

    @classmethod
    def open(cls, path: str | Path, *, cache: str | Path | None = None) -> Store:
        """The finished store in a folder or at a URL that fsspec knows (`s3://bucket/store`, `hf://...`).

        Shards at a URL are downloaded when first needed into a folder below `cache`, by default
        `$SHOESTRING_CACHE` or `~/.cache/shoestring/stores`. Raises `StoreError` where there is no store,
        `CorruptStoreError` where its manifest is damaged or parts of it come from elsewhere.
        """
        if is_url(str(path)):
            from shoestring.data.remote import Remote  # fsspec and its kin are for those who need them

            files: Folder | Remote = Remote.open(str(path), cache)
        else:
            files = Folder.open(Path(path))
        try:
            check_origins(files.place, files.manifest, files.manifest["files"])
            store = cls(files, files.manifest)
            absent = store._absent()
        except (LookupError, ValueError, TypeError, AttributeError) as error:  # format 1 has no checksum
            cure = files.mend_manifest()
            raise CorruptStoreError(f"{files.place}/{MANIFEST}: is damaged ({error!r}). {cure}") from error
        if absent:
            raise CorruptStoreError(files.cure(dict.fromkeys(absent, "is not in the manifest")))
        return store

    def _absent(self) -> list[str]:
        """Shards that the store needs and its manifest does not name."""
        columns = dict.fromkeys(f"latents-{size}" for size in self.sizes)
        for each in self.text_sets.values():
            columns |= dict.fromkeys((each.tokens, each.table, each.words))
        chunks = range(len(self.manifest["chunks"]))
        names = (shard_name(column, chunk) for column in (*columns, "rows", "json") for chunk in chunks)
        return [name for name in names if name not in self._entries]

    @property
    def place(self) -> str:
        """The folder or URL that the store was opened at."""
        return self.files.place

    @property
    def path(self) -> Path:
        """Where its files lie on this machine; for a store at a URL those downloaded so far."""
        return self.files.path

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def text_width(self) -> int:
        """Components of a text token."""
        return int(self.manifest["text_encoder"]["width"])

    @property
    def pad(self) -> str:
        """One of `text_encoders.PADS`."""
        return str(self.manifest["text_encoder"]["pad"])

    @property
    def padded(self) -> bool:
        """Every caption has `max_tokens` tokens, all of which count: no mask is needed."""
        return self.pad != "none"

    @property
    def max_tokens(self) -> int:
        """Tokens that the longest caption may have; longer ones were cut."""
        return int(self.manifest["text_encoder"]["max_tokens"])

    @property
    def null_text(self) -> Tensor:
        """The caption that says nothing: one zero token (1, C)."""
        return torch.zeros(1, self.text_width)

    @property
    def has_flips(self) -> bool:
        """True where a mirrored version of the latents is stored."""
        return bool(self.manifest["preprocessing"]["flip"])

    @property
    def has_log_variance(self) -> bool:
        """True where latents are distributions to be sampled."""
        return bool(self.manifest["log_variance"])

    def latent_shape(self, size: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of one size."""
        self.check(size=size)
        channels, height, width = self.manifest["sizes"][str(size)]
        return channels, height, width

    def latents(
        self, size: int, rows: Rows, *, noise: Tensor | None = None, flipped: NDArray[np.bool_] | None = None
    ) -> Tensor:
        """Scaled latents (B, C, h, w) float32: the mean, or a draw from the distribution given `noise`.

        `flipped` (B,) picks the mirrored version where one is stored.
        """
        column = f"latents-{size}"
        mean = self._gather(column, "mean", rows, flipped)
        if mean.dtype == np.uint8:
            raw = torch.from_numpy(mean).float().div_(127.5).sub_(1.0)
        else:
            raw = torch.from_numpy(mean).float()
        if noise is not None:
            spread = torch.from_numpy(self._gather(column, "log_variance", rows, flipped)).float()
            raw = sample_latents(raw, spread, noise)
        return raw if self.scaling.is_identity else self.scaling.apply(raw)

    def normalised(self, rule: str, size: int | None = None) -> Store:
        """The same store with its latents scaled by one of `statistics.RULES`, measured at `size`.

        Measured at the largest size unless given. Raises `StoreError` for rules that do not fit the store.
        """
        other = copy.copy(self)
        other.scaling = scaling_by(rule, self, size)
        return other

    def drawing(self, captions: Sequence[str]) -> Store:
        """The same store with its captions drawn from the sets of these names (of `text_sets`) alone.

        A store as opened draws from `main`, so that a set added later changes no run. Raises `StoreError`
        for an unknown name, and for sets whose tokens were made in different ways.
        """
        unknown = [name for name in captions if name not in self.text_sets]
        if unknown or not captions:
            raise StoreError(
                f"{self.place}: has no captions {next(iter(unknown), '')!r}; there are: "
                f"{', '.join(self.text_sets)}. `shoestring store add` adds others."
            )
        first = self.text_sets[captions[0]]
        if odd := [name for name in captions if not self.text_sets[name].like(first)]:
            raise StoreError(
                f"{self.place}: captions {odd[0]!r} were encoded otherwise than {first.name!r}, "
                "so the two cannot stand in one batch. Name sets of one text encoder."
            )
        other = copy.copy(self)
        other.manifest = {**self.manifest, "text_encoder": first.encoder, "text_dtype": first.dtype}
        other._texts = other._reading(*dict.fromkeys(captions))
        return other

    def text(self, rows: Rows, choice: Array | None = None) -> list[Tensor]:
        """Tokens of one caption of each row, B x (L_i, C) float32.

        `choice` (B,) in [0, 1) picks among a row's captions; without it the first is taken.
        """
        return self._texts.tokens(rows, choice)

    def padded_text(self, rows: Rows, choice: Array | None = None) -> tuple[Tensor, Tensor]:
        """As `text`, padded with zeros: (B, L, C) float32 and the mask of real tokens (B, L)."""
        return self._texts.padded(rows, choice)

    def pooled(self, rows: Rows, choice: Array | None = None) -> Tensor | None:
        """The caption's single vector (B, C_pooled) float32, where the text encoder gives one."""
        return self._texts.pooled(rows, choice)

    def size_crop(self, rows: Rows, size: int) -> Tensor:
        """(B, 6) int64: original height and width, crop top and left, target height and width at `size`."""
        self.check(size=size)
        heights, widths = self._gather("rows", "size_crop", rows)[:, :2].T.tolist()
        ids = [(h, w, *crop_corner(h, w, size), size, size) for h, w in zip(heights, widths, strict=True)]
        return torch.tensor(ids, dtype=torch.int64)

    def record(self, row: int) -> dict[str, Any]:
        """What the store knows of a row: its key in the source, captions, and scene where there is one."""
        return self.records(np.array([row]))[0]

    def records(self, rows: Rows) -> list[dict[str, Any]]:
        """`record` of several rows."""
        found: list[dict[str, Any]] = [{}] * len(rows)
        for chunk, where, local in self._by_chunk(rows):
            for place, record in zip(
                where.tolist(), lines_of(self._shard("json", chunk), local), strict=True
            ):
                found[place] = record
        return found

    def captions(self, row: int) -> list[str]:
        """All captions of a row that `text` may be of."""
        return self._texts.every(row)

    def chosen_captions(self, rows: Rows, choice: Array | None = None) -> tuple[str, ...]:
        """The caption of each row that `text` gives the tokens of."""
        return self._texts.words(rows, choice)

    def check(
        self,
        *,
        size: int | None = None,
        autoencoder: str | None = None,
        text_encoder: str | None = None,
        pad: str | None = None,
        max_tokens: int | None = None,
    ) -> None:
        """Raise `StoreError` where the store was made with other sizes or encoders than asked for."""
        asked = {
            "autoencoder": (autoencoder, _full_name(self.manifest["autoencoder"])),
            "text encoder": (text_encoder, _full_name(self.manifest["text_encoder"])),
            "pad": (pad, self.pad),
            "max tokens": (max_tokens, self.max_tokens),
        }
        for name, (wanted, here) in asked.items():
            if wanted is not None and not _same(str(wanted), str(here)):
                raise StoreError(
                    f"{self.place}: made with the {name} {here}, the recipe asks for {wanted}. "
                    f"Change the recipe, or make another store with --{name.replace(' ', '-')} {wanted}."
                )
        if size is not None and size not in self.sizes:
            sizes = ", ".join(map(str, self.sizes))
            raise StoreError(
                f"{self.place}: holds images of {sizes} pixels, not {size}. "
                f"Use one of these sizes, or make another store with --size {size}."
            )

    def bytes_by_column(self) -> dict[str, int]:
        """Bytes on disk of each column."""
        total: dict[str, int] = {}
        for path, entry in self._entries.items():
            column = path.split("/")[1]
            total[column] = total.get(column, 0) + int(entry["bytes"])
        return total

    def verify(
        self, progress: Progress | None = None, tell: Callable[[str], None] | None = None
    ) -> Verification:
        """Compare every byte with what the manifest says; raises `CorruptStoreError` with the cure.

        `progress` is called with (files done, files in all), `tell` with a line for each damaged file.
        """
        found = self.files.verify(progress)
        if tell is not None:
            for name, problem in found.damaged.items():
                tell(f"{self.place}/{name} {problem}")
        if found.damaged:
            raise CorruptStoreError(self.files.cure(found.damaged))
        return found

    # --- which shards are at hand ------------------------------------------------------------------------

    def columns(self, size: int, *, captions: bool = False, size_crop: bool = False) -> list[str]:
        """The columns that batches of one size are made of."""
        parts = [f"latents-{size}", *(["rows"] if size_crop else [])]
        for each in self._texts.sets:
            parts += [each.table, each.tokens, *([each.words] if captions else [])]
        return list(dict.fromkeys(parts))

    def identity(self, sizes: Iterable[int]) -> str:
        """A hash of all that training at these sizes reads: the same for a copy at another place."""
        read = {column for size in sizes for column in self.columns(size)}
        files = [
            [entry["path"], entry["sha256"]]
            for entry in self.manifest["files"]
            if column_of(entry["path"]) in read
        ]
        return fingerprint([self.manifest["splits"], sorted(files)])

    def rows_by_chunk(self, split: Split) -> Rows:
        """How many rows of a split each chunk holds (chunks)."""
        return np.diff(split.below(self._starts))

    def hold(self, columns: Sequence[str], chunks: Iterable[int]) -> None:
        """Have shards fetched, checked and opened in the background, and kept until `release`."""
        self._shards.hold(shard_name(column, chunk) for chunk in chunks for column in columns)

    def release(self, columns: Sequence[str], chunks: Iterable[int], *, drop: bool) -> None:
        """Undo one `hold`; with `drop`, shards that nobody holds are closed and their copies removed."""
        self._shards.release((shard_name(column, chunk) for chunk in chunks for column in columns), drop=drop)

    # --- rows to arrays ----------------------------------------------------------------------------------

    def _reading(self, *captions: str) -> Texts:
        return Texts([self.text_sets[name] for name in captions], self._shard, self._by_chunk)

    def _gather(self, column: str, name: str, rows: Rows, flipped: NDArray[np.bool_] | None = None) -> Array:
        """Rows of one array, copied: (B, ...)."""
        out: Array | None = None
        for chunk, where, local in self._by_chunk(rows):
            arrays = self._shard(column, chunk)
            if out is None:
                out = np.empty((len(rows), *arrays[name].shape[1:]), dtype=arrays[name].dtype)
            out[where] = arrays[name][local]
            if flipped is not None and flipped[where].any():
                mirror = flipped[where]
                out[where[mirror]] = arrays[f"{name}_flipped"][local[mirror]]
        if out is None:
            raise IndexError("no rows asked for")
        return out

    def _by_chunk(self, rows: Rows) -> Iterator[tuple[int, Rows, Rows]]:
        """(chunk, places in `rows`, rows within the chunk) for each chunk that `rows` touch."""
        rows = np.asarray(rows, dtype=np.int64)
        if rows.size and (rows.min() < 0 or rows.max() >= len(self)):
            raise IndexError(f"rows of this store go from 0 to {len(self) - 1}")
        chunks = np.searchsorted(self._starts, rows, side="right") - 1
        order = np.argsort(chunks, kind="stable")
        ordered = chunks[order]
        local = (rows - self._starts[chunks])[order]
        edges = [0, *(np.flatnonzero(ordered[1:] != ordered[:-1]) + 1).tolist(), len(rows)]
        for start, stop in pairwise(edges) if rows.size else ():
            yield int(ordered[start]), order[start:stop], local[start:stop]

    def _shard(self, column: str, chunk: int) -> dict[str, Array]:
        """Arrays of a shard, opened and checked when first asked for."""
        return self._shards.get(shard_name(column, chunk))


def split_revision(name: str) -> tuple[str, str | None]:
    """(`owner/name`, revision) of `owner/name@revision`; local paths stay whole."""
    if Path(name).exists() or "@" not in name:
        return name, None
    place, _, revision = name.rpartition("@")
    return place, revision


def _full_name(encoder: Mapping[str, Any]) -> str:
    return f"{encoder['id']}@{encoder['revision']}" if encoder["revision"] else str(encoder["id"])


def _same(wanted: str, here: str) -> bool:
    """True for the same name, two ways to write one local path, or a name without the revision."""
    if wanted in (here, split_revision(here)[0]):
        return True
    return Path(wanted).exists() and Path(here).exists() and Path(wanted).resolve() == Path(here).resolve()
