"""Reading a store's captions: which one of a row is drawn, its words and its tokens.

A store has the set of captions it was made with, `main`, and others that were added later: more captions of
the same text encoder, or the same captions under another. Of each set there are

    its tokens   columns/text/      tokens (T, C), offsets (U + 1); scales (T,) of int8; pooled (U, P)
    its table    columns/rows/      caption_offsets (rows + 1), caption_ids: which of the U captions a row has
    its words    columns/json/      {"captions": [...], ...}, one line a row

and of an added set `name` tokens and table are in columns/text-name/, words in columns/json-name/.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shoestring.data.shards import Array
from shoestring.data.text_column import unpack

MAIN = "main"

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class TextSet:
    """One set of captions: where its parts are, and how its tokens were made."""

    name: str
    tokens: str  # columns
    table: str
    words: str
    encoder: Mapping[str, Any]  # as in the manifest
    dtype: str
    channels: tuple[float, ...] | None  # C of them where tokens are int8

    def described(self) -> dict[str, Any]:
        """As in the manifest."""
        channels = None if self.channels is None else list(self.channels)
        return {"text_encoder": dict(self.encoder), "text_dtype": self.dtype, "text_channels": channels}

    def like(self, other: TextSet) -> bool:
        """True where captions of both may stand in one batch."""
        return (self.encoder, self.dtype, self.channels) == (other.encoder, other.dtype, other.channels)


def text_sets(manifest: Mapping[str, Any]) -> dict[str, TextSet]:
    """Every set of captions in a manifest, `main` first; what an added set does not say is as in `main`."""
    sets = {}
    for name, said in {MAIN: {}, **manifest.get("texts", {})}.items():
        of = {**manifest, **said}
        channels = of.get("text_channels")
        ending = "" if name == MAIN else f"-{name}"
        sets[name] = TextSet(
            name=name,
            tokens=f"text{ending}",
            table=f"text{ending}" if ending else "rows",
            words=f"json{ending}",
            encoder=of["text_encoder"],
            dtype=of.get("text_dtype", "float16"),
            channels=None if channels is None else tuple(channels),
        )
    return sets


class _Drawn(NamedTuple):
    """Captions drawn from one set in one chunk: places in the batch, rows in the chunk, which captions."""

    of: TextSet
    chunk: int
    where: Rows
    local: Rows
    nth: Rows  # among the row's captions in this set
    ids: Rows  # in the chunk's text shard


class Texts:
    """Captions of rows, drawn from some sets of one text encoder.

    `shard(column, chunk)` gives arrays, `by_chunk(rows)` gives (chunk, places in `rows`, rows in the chunk).
    A draw in [0, 1) picks among all captions that a row has in these sets, in their order; without draws
    the first is taken.
    """

    def __init__(
        self,
        sets: Sequence[TextSet],
        shard: Callable[[str, int], Mapping[str, Array]],
        by_chunk: Callable[[Rows], Iterator[tuple[int, Rows, Rows]]],
    ) -> None:
        self.sets, self._shard, self._by_chunk = tuple(sets), shard, by_chunk
        self.width = int(sets[0].encoder["width"])
        channels = sets[0].channels
        self.channels = None if channels is None else torch.tensor(channels, dtype=torch.float32)

    def tokens(self, rows: Rows, choice: Array | None = None) -> list[Tensor]:
        """Tokens of one caption of each row, B x (L_i, C) float32."""
        spans = self._spans(rows, choice)
        return [
            unpack(
                np.array(arrays["tokens"][start:stop]),
                np.array(arrays["scales"][start:stop]) if "scales" in arrays else None,
                self.channels,
            )
            for arrays, start, stop in spans
        ]

    def padded(self, rows: Rows, choice: Array | None = None) -> tuple[Tensor, Tensor]:
        """As `tokens`, padded with zeros: (B, L, C) float32 and the mask of real tokens (B, L)."""
        spans = self._spans(rows, choice)
        lengths = np.array([stop - start for _, start, stop in spans], dtype=np.int64)
        shape = len(spans), int(lengths.max(initial=0))
        text = np.zeros((*shape, self.width), dtype=np.float16 if self.channels is None else np.int8)
        scales = None if self.channels is None else np.zeros(shape, dtype=np.float32)
        for place, (arrays, start, stop) in enumerate(spans):
            text[place, : stop - start] = arrays["tokens"][start:stop]
            if scales is not None:
                scales[place, : stop - start] = arrays["scales"][start:stop]
        mask = np.arange(shape[1]) < lengths[:, None]
        return unpack(text, scales, self.channels), torch.from_numpy(mask)

    def pooled(self, rows: Rows, choice: Array | None = None) -> Tensor | None:
        """The caption's single vector (B, P) float32, where the text encoder gives one."""
        size = self.sets[0].encoder.get("pooled")
        if not size:
            return None
        out = np.empty((len(rows), size), dtype=np.float16)
        for drawn in self._drawn(rows, choice):
            out[drawn.where] = self._shard(drawn.of.tokens, drawn.chunk)["pooled"][drawn.ids]
        return torch.from_numpy(out).float()

    def words(self, rows: Rows, choice: Array | None = None) -> tuple[str, ...]:
        """The caption of each row that `tokens` gives the tokens of."""
        found = [""] * len(rows)
        for drawn in self._drawn(rows, choice):
            records = lines_of(self._shard(drawn.of.words, drawn.chunk), drawn.local)
            for place, nth, record in zip(drawn.where.tolist(), drawn.nth.tolist(), records, strict=True):
                found[place] = record["captions"][nth]
        return tuple(found)

    def every(self, row: int) -> list[str]:
        """All captions of a row in these sets."""
        chunk, _, local = next(self._by_chunk(np.array([row])))
        records = [next(lines_of(self._shard(each.words, chunk), local)) for each in self.sets]
        return [caption for record in records for caption in record["captions"]]

    def _drawn(self, rows: Rows, choice: Array | None) -> Iterator[_Drawn]:
        draws = np.zeros(len(rows)) if choice is None else np.asarray(choice, dtype=np.float64)
        for chunk, where, local in self._by_chunk(rows):
            tables = [self._shard(each.table, chunk) for each in self.sets]
            firsts = [table["caption_offsets"][local] for table in tables]
            counts = [
                table["caption_offsets"][local + 1] - first
                for table, first in zip(tables, firsts, strict=True)
            ]
            nth = (draws[where] * sum(counts)).astype(np.int64)
            for each, table, first, count in zip(self.sets, tables, firsts, counts, strict=True):
                here = (nth >= 0) & (nth < count)
                if here.any():
                    ids = table["caption_ids"][first[here] + nth[here]]
                    yield _Drawn(each, chunk, where[here], local[here], nth[here], ids)
                nth = nth - count

    def _spans(self, rows: Rows, choice: Array | None) -> list[tuple[Mapping[str, Array], int, int]]:
        """(text shard, first token, end) of one caption a row."""
        found: list[Any] = [None] * len(rows)
        for drawn in self._drawn(rows, choice):
            arrays = self._shard(drawn.of.tokens, drawn.chunk)
            starts, stops = arrays["offsets"][drawn.ids].tolist(), arrays["offsets"][drawn.ids + 1].tolist()
            for place, start, stop in zip(drawn.where.tolist(), starts, stops, strict=True):
                found[place] = (arrays, start, stop)
        return found


def lines_of(lines: Mapping[str, Array], numbers: Rows) -> Iterator[dict[str, Any]]:
    """The JSON values of some lines of a shard of lines."""
    data, offsets = lines["bytes"], lines["offsets"]
    for start, stop in zip(offsets[numbers].tolist(), offsets[numbers + 1].tolist(), strict=True):
        yield json.loads(data[start:stop].tobytes())
