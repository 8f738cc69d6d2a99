"""The order of images: a permutation computed for any position on its own, with nothing kept between calls.

    run position p  ->  epoch e = p // n, offset p % n  ->  Feistel network keyed by (seed, e)  ->  row

A Feistel network permutes b-bit numbers: halve the bits, and in each round replace (left, right) by
(right, left xor F(right, key)). With 2^b the next power of two at or above n, outputs of n or more are fed
back until they fall below n ("cycle walking", fewer than two turns on average), which permutes 0 .. n-1.
The numbers are part of exact resume: changing anything here changes every run's order.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

ROUNDS = 8  # even, so that the halves end as wide as they began
LEAST_BITS = 6  # networks of fewer bits are visibly uneven; costs a few more turns for n < 32
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def permute(seed: int, epoch: int, n: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
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


def _feistel(values: NDArray[np.uint64], bits: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One pass over b-bit numbers; the two halves may differ by a bit and swap widths each round."""
    low = bits // 2
    widths = (low, bits - low)  # of right, of left
    right, left = values & _mask(widths[0]), values >> np.uint64(widths[0])
    for turn in range(ROUNDS):
        mask = _mask(widths[1 - turn % 2])  # the new right half is as wide as the old left one
        left, right = right, left ^ (_mix(right + keys[turn]) & mask)
    return (left << np.uint64(widths[0])) | right


def _round_keys(seed: int, epoch: int) -> NDArray[np.uint64]:
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
