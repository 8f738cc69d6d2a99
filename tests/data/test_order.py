"""The order is a permutation, even, known in advance, and the same in any pieces."""

from __future__ import annotations

import numpy as np
import pytest

from shoestring.data.order import permute, rows_at


@pytest.mark.parametrize("n", [*range(1, 70), 255, 256, 257, 1000, 4097])
def test_every_epoch_is_a_permutation(n: int) -> None:
    for epoch in (0, 1):
        assert sorted(permute(5, epoch, n, np.arange(n))) == list(range(n))


def test_the_numbers_are_frozen() -> None:
    """Exact resume of existing runs depends on these; they must never change."""
    assert permute(0, 0, 10, np.arange(10)).tolist() == [0, 1, 3, 6, 9, 8, 4, 5, 7, 2]
    assert permute(7, 3, 1_300_000_001, np.array([0, 1, 1_300_000_000])).tolist() == [
        419608396,
        214078124,
        616704394,
    ]


def test_pieces_equal_the_whole() -> None:
    whole = rows_at(1, 23, 0, 100)
    pieces = [rows_at(1, 23, start, min(start + 7, 100)) for start in range(0, 100, 7)]
    assert np.array_equal(np.concatenate(pieces), whole)
    assert [len(set(whole[start : start + 23])) for start in (0, 23, 46)] == [23, 23, 23]


def test_a_stretch_may_span_many_epochs() -> None:
    assert np.bincount(rows_at(0, 3, 0, 30), minlength=3).tolist() == [10, 10, 10]
    assert rows_at(0, 3, 5, 5).size == 0


def test_seeds_and_epochs_give_unrelated_orders() -> None:
    n = 2000
    orders = [permute(seed, epoch, n, np.arange(n)) for seed in (0, 1) for epoch in (0, 1)]
    for i, one in enumerate(orders):
        assert abs(np.corrcoef(one, np.arange(n))[0, 1]) < 0.1
        for other in orders[:i]:
            assert (one == other).sum() < 10


@pytest.mark.parametrize("n", [5, 13])
def test_every_row_is_equally_likely_at_every_position(n: int) -> None:
    """Chi-squared over 600 seeds within five deviations of its mean."""
    counts = np.zeros((n, n))
    for seed in range(600):
        counts[np.arange(n), permute(seed, 0, n, np.arange(n))] += 1
    freedom = (n - 1) ** 2
    statistic = ((counts - 600 / n) ** 2 / (600 / n)).sum()
    assert abs(statistic - freedom) < 5 * (2 * freedom) ** 0.5


def test_positions_outside_are_refused() -> None:
    with pytest.raises(IndexError, match=r"0 \.\. 4"):
        permute(0, 0, 5, np.array([5]))
    with pytest.raises(IndexError, match="no rows"):
        rows_at(0, 0, 0, 1)
