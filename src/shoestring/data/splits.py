"""Splits: named parts of a store's rows, by position and in the order in which they lie on disk."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from shoestring.data.order import permute

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

    def on_disk(self, numbers: Rows) -> Rows:
        """The rows that come first, second, ... of this split in the store (`numbers` count from 0)."""
        numbers = np.asarray(numbers, dtype=np.int64)
        if not self.shuffled:
            return numbers + self.start
        if self._is_smaller_side:
            return self._listed[numbers]
        # Before row k of the rest lie k others of it, and those listed with at most k others before them.
        return numbers + np.searchsorted(self._listed - np.arange(len(self._listed)), numbers, side="right")

    def below(self, rows: Rows) -> Rows:
        """How many rows of this split lie before each of `rows` in the store."""
        rows = np.asarray(rows, dtype=np.int64)
        if not self.shuffled:
            return np.clip(rows, self.start, self.stop) - self.start
        listed = np.searchsorted(self._listed, rows).astype(np.int64)
        return listed if self._is_smaller_side else rows - listed

    @property
    def _is_smaller_side(self) -> bool:
        return 2 * len(self) <= self.total

    @cached_property
    def _listed(self) -> Rows:
        """Sorted rows of a shuffled split, or those of all the others where they are fewer."""
        inside = np.arange(self.start, self.stop)
        outside = np.concatenate([np.arange(self.start), np.arange(self.stop, self.total)])
        return np.sort(permute(self.key, 0, self.total, inside if self._is_smaller_side else outside))
