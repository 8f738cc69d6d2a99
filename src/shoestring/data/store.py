"""A store: encoded images and captions on disk, read by row number (docs/data.md, "The store").

    manifest.json                           what is in it, how it was made, every file with its hashes
    columns/latents-32/00000.safetensors    mean (rows, C, h, w), log_variance and mean_flipped when asked for
    columns/text/00000.safetensors          tokens (T, C) and offsets (U + 1): U captions, each stored once
    columns/rows/00000.safetensors          caption_ids with caption_offsets (rows + 1); size_crop (rows, 6)
    columns/json/00000.jsonl                {"key", "captions", "scene"?}, one line a row
    chunks/00000.json                       the marker of a finished chunk

Shard k of every column holds the same rows. Shards are mapped, not read; the CRC of each is checked when it
is first opened.
"""

from __future__ import annotations

import json
import shlex
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shoestring.data.order import permute
from shoestring.data.shards import Array, read_lines, read_shard
from shoestring.errors import CorruptStoreError, StoreError
from shoestring.models.autoencoders import LatentScaling, sample_latents
from shoestring.storage import crc32, read_json, sha256

FORMAT = 1
MANIFEST = "manifest.json"
BEGUN = "begun.json"
OPEN_SHARDS = 256  # mapped at once; each holds a file descriptor

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """A named part of the rows: positions start .. stop-1 of all `total` rows, after a permutation or not."""

    start: int
    stop: int
    shuffled: bool
    key: int
    total: int

    def __len__(self) -> int:
        return self.stop - self.start

    def rows(self, positions: Rows) -> Rows:
        """Positions in the split (0 .. len-1) -> row numbers of the store."""
        places = np.asarray(positions, dtype=np.int64)
        if places.size and (places.min() < 0 or places.max() >= len(self)):
            raise IndexError(f"positions of a split of {len(self)} rows go from 0 to {len(self) - 1}")
        places = places + self.start
        return permute(self.key, 0, self.total, places) if self.shuffled else places


class Store:
    """An open store. Row arguments are int64 arrays of row numbers, in any order and with repeats."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path, self.manifest = path, manifest
        self.sizes = tuple(int(size) for size in manifest["sizes"])
        self.splits = {name: Split(**fields) for name, fields in manifest["splits"].items()}
        scaling = manifest["autoencoder"]["scaling"]
        self.scaling = LatentScaling(tuple(scaling["shift"]), tuple(scaling["factor"]))
        self._starts = np.cumsum([0, *manifest["chunks"]])
        self._entries = {entry["path"]: entry for entry in manifest["files"]}
        self._opened: dict[str, dict[str, Array]] = {}
        self._checked: set[str] = set()
        self._opening = threading.RLock()  # a loader's thread and another may read at once

    @classmethod
    def open(cls, path: str | Path) -> Store:
        """The finished store at `path`; raises `StoreError` where there is none."""
        path = Path(path)
        try:
            manifest = read_json(path / MANIFEST)
            version = int(manifest["format"])
        except FileNotFoundError:
            raise StoreError(_why_not(path)) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"{path / MANIFEST}: cannot be read ({error}). Delete it and run the same "
                "`shoestring encode` again: it checks what is there and writes the manifest anew."
            ) from error
        if version > FORMAT:
            raise StoreError(
                f"{path}: store format {version}, made by Shoestring {manifest.get('shoestring')}; "
                f"this version reads up to {FORMAT}. Upgrade with `pip install --upgrade shoestring`."
            )
        return cls(path, manifest)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def text_width(self) -> int:
        """Components of a text token."""
        return int(self.manifest["text_encoder"]["width"])

    @property
    def pad(self) -> str:
        """`none` (real tokens only) or `encoder` (every caption as long as the encoder makes it)."""
        return str(self.manifest["text_encoder"]["pad"])

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

    def text(self, rows: Rows, choice: Array | None = None) -> list[Tensor]:
        """Tokens of one caption of each row, B x (L_i, C) float32.

        `choice` (B,) in [0, 1) picks among a row's captions; without it the first is taken.
        """
        return [torch.from_numpy(np.array(each)).float() for each in self._tokens(rows, choice)]

    def padded_text(self, rows: Rows, choice: Array | None = None) -> tuple[Tensor, Tensor]:
        """As `text`, padded with zeros: (B, L, C) float32 and the mask of real tokens (B, L)."""
        tokens = self._tokens(rows, choice)
        lengths = np.array([len(each) for each in tokens], dtype=np.int64)
        text = np.zeros((len(tokens), int(lengths.max(initial=0)), self.text_width), dtype=np.float16)
        for place, each in enumerate(tokens):
            text[place, : len(each)] = each
        mask = np.arange(text.shape[1]) < lengths[:, None]
        return torch.from_numpy(text).float(), torch.from_numpy(mask)

    def pooled(self, rows: Rows, choice: Array | None = None) -> Tensor | None:
        """The caption's single vector (B, C_pooled) float32, where the text encoder gives one."""
        if not self.manifest["text_encoder"].get("pooled"):
            return None
        found = self._picked(rows, choice, lambda text, ids: list(text["pooled"][ids]))
        return torch.from_numpy(np.stack(found)).float()

    def size_crop(self, rows: Rows, size: int) -> Tensor:
        """(B, 6) int64: original height and width, crop top and left, target height and width at `size`."""
        ids = self._gather("rows", "size_crop", rows).astype(np.int64)
        ids[:, 2:] = np.rint(ids[:, 2:] * (size / max(self.sizes)))
        return torch.from_numpy(ids)

    def record(self, row: int) -> dict[str, Any]:
        """What the store knows of a row: its key in the source, captions, and scene where there is one."""
        return self.records(np.array([row]))[0]

    def records(self, rows: Rows) -> list[dict[str, Any]]:
        """`record` of several rows."""
        found: list[dict[str, Any]] = [{}] * len(rows)
        for chunk, where, local in self._by_chunk(rows):
            lines = self._shard("json", chunk)
            data, offsets = lines["bytes"], lines["offsets"]
            starts, stops = offsets[local].tolist(), offsets[local + 1].tolist()
            for place, start, stop in zip(where.tolist(), starts, stops, strict=True):
                found[place] = json.loads(data[start:stop].tobytes())
        return found

    def captions(self, row: int) -> list[str]:
        """All captions of a row."""
        return list(self.record(row)["captions"])

    def chosen_captions(self, rows: Rows, choice: Array | None = None) -> tuple[str, ...]:
        """The caption of each row that `text` gives the tokens of."""
        draws = np.zeros(len(rows)) if choice is None else np.asarray(choice)
        every = [record["captions"] for record in self.records(rows)]
        return tuple(each[int(draw * len(each))] for each, draw in zip(every, draws, strict=True))

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
                    f"{self.path}: made with the {name} {here}, the recipe asks for {wanted}. "
                    f"Change the recipe, or make another store with --{name.replace(' ', '-')} {wanted}."
                )
        if size is not None and size not in self.sizes:
            sizes = ", ".join(map(str, self.sizes))
            raise StoreError(
                f"{self.path}: holds images of {sizes} pixels, not {size}. "
                f"Use one of these sizes, or make another store with --size {size}."
            )

    def bytes_by_column(self) -> dict[str, int]:
        """Bytes on disk of each column."""
        total: dict[str, int] = {}
        for path, entry in self._entries.items():
            column = path.split("/")[1]
            total[column] = total.get(column, 0) + int(entry["bytes"])
        return total

    def verify(self, progress: Callable[[int, int], None] | None = None) -> int:
        """Compare every file with its SHA-256 and return how many there are; raises `CorruptStoreError`."""
        wrong = []
        for number, (name, entry) in enumerate(self._entries.items(), start=1):
            path = self.path / name
            if not path.is_file() or sha256(path) != entry["sha256"]:
                wrong.append(name)
            if progress is not None:
                progress(number, len(self._entries))
        if wrong:
            raise CorruptStoreError(self._cure(wrong))
        return len(self._entries)

    # --- rows to arrays ----------------------------------------------------------------------------------

    def _tokens(self, rows: Rows, choice: Array | None) -> list[Array]:
        """Views of the tokens of one caption a row, B x (L_i, C) float16, still on disk."""

        def pick(text: Mapping[str, Array], ids: Array) -> list[Array]:
            spans = zip(text["offsets"][ids].tolist(), text["offsets"][ids + 1].tolist(), strict=True)
            return [text["tokens"][start:stop] for start, stop in spans]

        return self._picked(rows, choice, pick)

    def _picked(
        self,
        rows: Rows,
        choice: Array | None,
        pick: Callable[[Mapping[str, Array], Array], list[Array]],
    ) -> list[Array]:
        """`pick(text shard, caption ids)` for the chosen captions of rows, in the order of `rows`."""
        draws = np.zeros(len(rows)) if choice is None else np.asarray(choice, dtype=np.float64)
        found: list[Array] = [np.empty(0)] * len(rows)
        for chunk, where, local in self._by_chunk(rows):
            table = self._shard("rows", chunk)
            first = table["caption_offsets"][local]
            count = table["caption_offsets"][local + 1] - first
            ids = table["caption_ids"][first + (draws[where] * count).astype(np.int64)]
            for place, each in zip(where, pick(self._shard("text", chunk), ids), strict=True):
                found[place] = each
        return found

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
        name = shard_name(column, chunk)
        with self._opening:
            return self._opened.get(name) or self._open_shard(column, name)

    def _open_shard(self, column: str, name: str) -> dict[str, Array]:
        path, entry = self.path / name, self._entries[name]
        try:
            if name not in self._checked and crc32(path) != entry["crc32"]:
                raise ValueError("its checksum differs from the manifest's")
            arrays = (read_lines if column == "json" else read_shard)(path)
        except (OSError, ValueError) as error:
            raise CorruptStoreError(self._cure([name])) from error
        self._checked.add(name)
        while len(self._opened) >= OPEN_SHARDS:
            self._opened.pop(next(iter(self._opened)), None)
        self._opened[name] = arrays
        return arrays

    def _cure(self, names: Sequence[str]) -> str:
        """Names the damaged files and what encodes their chunks again."""
        chunks = sorted({int(Path(name).name.split(".")[0]) for name in names})
        markers = " ".join(shlex.quote(str(self.path / marker_name(chunk))) for chunk in chunks)
        listed = ", ".join(str(self.path / name) for name in names[:5])
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        what = "is missing or does not match its checksum" if len(names) == 1 else "are missing or damaged"
        command = f"{self.manifest['command']} --out {shlex.quote(str(self.path))}"
        again = "this chunk" if len(chunks) == 1 else "these chunks"
        return f"{listed}{more} {what}. Encode {again} again with: rm {markers} && {command}"


def shard_name(column: str, chunk: int) -> str:
    """A shard's file, relative to the store."""
    return f"columns/{column}/{chunk:05d}.{'jsonl' if column == 'json' else 'safetensors'}"


def marker_name(chunk: int) -> str:
    """The file that says a chunk is finished, relative to the store."""
    return f"chunks/{chunk:05d}.json"


def _why_not(path: Path) -> str:
    """Why a folder without a manifest is no store."""
    if not path.exists():
        return f"{path}: no such store. Make one with `shoestring encode SOURCE --out {path}`."
    if (path / BEGUN).is_file():
        done = len(list((path / "chunks").glob("*.json")))
        command = read_json(path / BEGUN).get("command", "shoestring encode SOURCE")
        return (
            f"{path}: this store is unfinished ({done} chunks done). "
            f"Go on with: {command} --out {shlex.quote(str(path))}"
        )
    return (
        f"{path}: not a store (no {MANIFEST} in it). "
        "Give the folder that `shoestring encode SOURCE --out STORE` made."
    )


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
