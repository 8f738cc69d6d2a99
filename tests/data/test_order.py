"""The order is a permutation, even, known in advance, and the same in any pieces."""

from __future__ import annotations

import numpy as np
import pytest

from shoestring.data.order import WindowOrder, permute, rows_at


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


# --- windows -----------------------------------------------------------------------------------------------

COUNTS = np.array([10, 1, 10, 10, 3, 10, 10, 10, 7, 10, 10, 2])


@pytest.mark.parametrize("window", [1, 2, 3, 5, 11, 12, 50])
def test_with_a_window_an_epoch_holds_every_row_once(window: int) -> None:
    order = WindowOrder(3, COUNTS, window)
    n = len(order)
    epochs = [order.rows_at(epoch * n, (epoch + 1) * n) for epoch in range(3)]
    assert n == COUNTS.sum()
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(n))
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 3


@pytest.mark.parametrize("window", [1, 3, 5])
def test_windowed_pieces_equal_the_whole(window: int) -> None:
    """Any position on its own, in any grouping, across groups and epochs."""
    order = WindowOrder(1, COUNTS, window)
    whole = order.rows_at(0, 300)
    for step in (1, 7, 64):
        fresh = WindowOrder(1, COUNTS, window)
        pieces = [fresh.rows_at(start, min(start + step, 300)) for start in range(0, 300, step)]
        assert np.array_equal(np.concatenate(pieces), whole)
    assert np.array_equal(WindowOrder(1, COUNTS, window).rows_at(290, 300), whole[290:])


@pytest.mark.parametrize("window", [1, 3, 5])
def test_only_the_chunks_of_a_group_are_needed_in_it(window: int) -> None:
    order = WindowOrder(2, COUNTS, window)
    chunk_of = np.repeat(np.arange(len(COUNTS)), COUNTS)
    position = 0
    for group in order.groups_at(0, 3 * len(order)):
        assert group.start == position
        rows = order.rows_at(group.start, group.stop)
        assert set(chunk_of[rows]) == set(group.chunks.tolist())
        assert len(group.chunks) <= window
        assert order.group_of(group.stop - 1).start == group.start
        position = group.stop
    assert position == 3 * len(order)


def test_groups_are_even_so_that_none_mixes_little() -> None:
    """17 chunks with a window of 16 are 8 and 9, not 16 and one alone."""
    order = WindowOrder(0, np.full(17, 4), 16)
    assert [len(group.chunks) for group in order.groups_at(0, len(order))] == [8, 9]


def test_a_window_mixes_nearly_as_many_chunks_into_a_batch_as_chance_would() -> None:
    """16 chunks in the window, batches of 64: 16 (1 - (15/16)^64) = 15.7 distinct chunks in the mean."""
    order = WindowOrder(0, np.full(160, 256), 16)
    batches = order.rows_at(0, len(order)).reshape(-1, 64) // 256
    distinct = [len(set(batch.tolist())) for batch in batches]
    assert abs(np.mean(distinct) - 16 * (1 - (15 / 16) ** 64)) < 0.05


def test_within_a_window_every_row_is_equally_likely_at_every_position() -> None:
    """200 seeds: each of 8 rows about 25 times at each position, within five deviations."""
    n = 8
    seen = np.zeros((n, n))
    for seed in range(200):
        seen[np.arange(n), WindowOrder(seed, np.full(4, 2), 2).rows_at(0, n)] += 1
    assert abs(seen - 200 / n).max() < 5 * (200 / n * (1 - 1 / n)) ** 0.5


def test_the_windowed_numbers_are_frozen() -> None:
    """Exact resume of existing runs depends on these; they must never change."""
    assert WindowOrder(7, np.array([4, 2, 3, 4, 1]), 2).rows_at(10, 30).tolist() == [
        *[5, 11, 12, 10],
        *[13, 7, 4, 6, 5, 8, 2, 0, 12, 1, 11, 9, 10, 3],  # an epoch
        *[7, 6],
    ]


def test_a_window_of_nothing_is_refused() -> None:
    for counts, window in (([3, 3], 0), ([], 1)):
        with pytest.raises(IndexError, match="at least one chunk"):
            WindowOrder(0, np.array(counts, dtype=np.int64), window)
