"""The order of images: a permutation computed for any position on its own, with nothing kept between calls.

    run position p  ->  epoch e = p // n, offset p % n  ->  Feistel network keyed by (seed, e)  ->  row

A Feistel network permutes b-bit numbers: halve the bits, and in each round replace (left, right) by
(right, left xor F(right, key)). With 2^b the next power of two at or above n, outputs of n or more are fed
back until they fall below n ("cycle walking", fewer than two turns on average), which permutes 0 .. n-1.

With a window of W chunks an epoch is a few groups of at most W chunks, one after the other, and only the rows
of one group are mixed. All of it is computed for any position on its own, too:

    epoch e  ->  chunks in the order of a network keyed by (seed, e), cut into even groups of at most W
    offset in a group  ->  network keyed by (seed, e, group)  ->  a row of the group's chunks

The numbers are part of exact resume: changing anything here changes every run's order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ROUNDS = 8  # even, so that the halves end as wide as they began
LEAST_BITS = 6  # networks of fewer bits are visibly uneven; costs a few more turns for n < 32
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def permute(seed: int | str, epoch: int, n: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each of `positions` (any shape, in 0 .. n-1) goes under the permutation of (seed, epoch)."""
    positions = np.asarray(positions, dtype=np.int64)
    if positions.size and (positions.min() < 0 or positions.max() >= n):
        raise IndexError(f"positions must lie in 0 .. {n - 1}, got {positions.min()} .. {positions.max()}")
    if n <= 1:
        return positions.copy()
    bits = max(LEAST_BITS, (n - 1).bit_length())
    keys = _round_keys(seed, epoch)
    values = _feistel(positions.astype(np.uint64).ravel(), bits, keys)
    outside = np.flatnonzero(values >= np.uint64(n))
    while outside.size:
        values[outside] = _feistel(values[outside], bits, keys)
        outside = outside[values[outside] >= np.uint64(n)]
    return values.astype(np.int64).reshape(positions.shape)


def rows_at(seed: int, n: int, start: int, stop: int) -> NDArray[np.int64]:
    """The rows (0 .. n-1) that stand at positions start .. stop-1 of an endless run over n rows."""
    if n < 1:
        raise IndexError("there are no rows to put in order")
    first, last = start // n, max(start, stop - 1) // n
    parts = [
        permute(
            seed, epoch, n, np.arange(max(start - epoch * n, 0), min(stop - epoch * n, n), dtype=np.int64)
        )
        for epoch in range(first, last + 1)
    ]
    return np.concatenate(parts)


@dataclass(frozen=True)
class Group:
    """A stretch of an epoch in which rows of a few chunks are mixed."""

    epoch: int
    number: int
    start: int  # position in the run of its first row
    stop: int
    chunks: NDArray[np.int64]


class WindowOrder:
    """The order of an endless run over rows that lie in chunks, of which at most `window` are needed at once.

    `counts` holds the rows of each chunk, all at least 1. Rows are numbered as they lie: 0 is the first of
    the first chunk.
    """

    def __init__(self, seed: int, counts: NDArray[np.int64], window: int) -> None:
        self.seed, self.counts, self.window = seed, np.asarray(counts, dtype=np.int64), window
        if window < 1 or not len(self.counts):
            raise IndexError("a window holds at least one chunk, and there must be rows to put in order")
        self.first = np.concatenate([[0], np.cumsum(self.counts)])  # the number of each chunk's first row
        groups = -(-len(self.counts) // window)
        self.edges = np.arange(groups + 1) * len(self.counts) // groups  # chunks of groups, as even as can be
        self._epochs: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}

    def __len__(self) -> int:
        return int(self.first[-1])

    def rows_at(self, start: int, stop: int) -> NDArray[np.int64]:
        """The rows that stand at positions start .. stop-1 of the run."""
        parts = [np.empty(0, np.int64)]
        for group in self.groups_at(start, stop):
            offsets = np.arange(max(start, group.start), min(stop, group.stop)) - group.start
            key = f"{self.seed}:group {group.number}"
            mixed = permute(key, group.epoch, group.stop - group.start, offsets)
            ends = np.cumsum(self.counts[group.chunks])
            place = np.searchsorted(ends, mixed, side="right")
            chunk = group.chunks[place]
            parts.append(self.first[chunk] + mixed - (ends[place] - self.counts[chunk]))
        return np.concatenate(parts)

    def groups_at(self, start: int, stop: int) -> Iterator[Group]:
        """The groups that positions start .. stop-1 lie in, in order."""
        while start < stop:
            group = self.group_of(start)
            yield group
            start = group.stop

    def group_of(self, position: int) -> Group:
        """The group that a position of the run lies in."""
        epoch, offset = divmod(position, len(self))
        chunks, starts = self._epoch(epoch)
        number = int(np.searchsorted(starts, offset, side="right")) - 1
        begin = epoch * len(self)
        return Group(
            epoch,
            number,
            begin + int(starts[number]),
            begin + int(starts[number + 1]),
            chunks[self.edges[number] : self.edges[number + 1]],
        )

    def _epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The order of chunks in an epoch, and the offset of each group's first row (and of the end)."""
        if epoch not in self._epochs:
            chunks = permute(f"{self.seed}:chunks", epoch, len(self.counts), np.arange(len(self.counts)))
            ends = np.concatenate([[0], np.cumsum(self.counts[chunks])])
            while len(self._epochs) > 1:
                del self._epochs[min(self._epochs)]
            self._epochs[epoch] = chunks, ends[self.edges]
        return self._epochs[epoch]


def _feistel(values: NDArray[np.uint64], bits: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One pass over b-bit numbers; the two halves may differ by a bit and swap widths each round."""
    low = bits // 2
    widths = (low, bits - low)  # of right, of left
    right, left = values & _mask(widths[0]), values >> np.uint64(widths[0])
    for turn in range(ROUNDS):
        mask = _mask(widths[1 - turn % 2])  # the new right half is as wide as the old left one
        left, right = right, left ^ (_mix(right + keys[turn]) & mask)
    return (left << np.uint64(widths[0])) | right


def _round_keys(seed: int | str, epoch: int) -> NDArray[np.uint64]:
    digest = hashlib.blake2b(f"order:{seed}:{epoch}".encode(), digest_size=8 * ROUNDS).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The splitmix64 finaliser."""
    z = z + _GOLDEN
    z = (z ^ (z >> np.uint64(30))) * _MIX_1
    z = (z ^ (z >> np.uint64(27))) * _MIX_2
    return z ^ (z >> np.uint64(31))


def _mask(width: int) -> np.uint64:
    return np.uint64((1 << width) - 1)
