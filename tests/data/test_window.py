"""With a window a loader needs few chunks at a time, and is as exact as without one."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shoestring.data.loader import PATIENCE, Loader
from shoestring.data.splits import Split
from shoestring.data.store import Store
from shoestring.data.window import Keeper, make_window
from shoestring.errors import CorruptStoreError, StoreError
from shoestring.interfaces import Batch

CHUNK, TRAIN = 8, 172


@pytest.fixture
def store(chunked: Path) -> Store:
    """26 chunks of 8 rows, the last short, and 31 rows held out at random from nearly all of them."""
    return Store.open(chunked)


def loader(store: Store, **changes: Any) -> Loader:
    return Loader(store, **{"size": 16, "batch_size": 8, "seed": 3, "window": 4, **changes})


def keys(store: Store, loader: Loader, start: int, stop: int) -> list[int]:
    """Row numbers at positions of the run."""
    return loader._rows(start, stop).tolist()


def assert_same(one: list[Batch], other: list[Batch]) -> None:
    for name in ("index", "latents"):
        joined = [torch.cat([getattr(batch, name) for batch in batches]) for batches in (one, other)]
        assert torch.equal(*joined)
    words = [[caption for batch in batches for caption in batch.captions] for batches in (one, other)]
    assert words[0] == words[1]


# --- splits as they lie on disk ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "split",
    [
        Split(0, 7, False, 0, 50),
        Split(7, 50, False, 0, 50),
        Split(0, 9, True, 5, 50),
        Split(9, 50, True, 5, 50),
        Split(10, 35, True, 6, 50),
        Split(25, 50, True, 6, 50),
    ],
)
def test_rows_of_a_split_in_the_order_of_the_disk(split: Split) -> None:
    """Independent answer: all its rows, sorted."""
    wanted = np.sort(split.rows(np.arange(len(split))))
    assert np.array_equal(split.on_disk(np.arange(len(split))), wanted)
    assert split.below(np.arange(51)).tolist() == [(wanted < row).sum() for row in range(51)]


# --- the order ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "held_out"])
@pytest.mark.parametrize("window", [1, 4, 25])
def test_every_row_of_the_split_once_an_epoch_and_no_other(store: Store, split: str, window: int) -> None:
    own = store.splits[split]
    wanted = sorted(own.rows(np.arange(len(own))).tolist())
    with_window = loader(store, split=split, window=window)
    for epoch in range(2):
        found = keys(store, with_window, epoch * len(own), (epoch + 1) * len(own))
        assert sorted(found) == wanted
        assert found != wanted


def test_a_window_as_large_as_the_store_changes_nothing(store: Store) -> None:
    plain = loader(store, window=None)
    for window in (26, 1000):
        assert keys(store, loader(store, window=window), 0, 400) == keys(store, plain, 0, 400)
    assert keys(store, loader(store, window=25), 0, TRAIN) != keys(store, plain, 0, TRAIN)


def test_any_start_batch_size_and_world_give_the_same_images(store: Store) -> None:
    whole = list(loader(store).batches(0, 400))
    assert_same(list(loader(store, batch_size=64).batches(0, 400)), whole)
    for start in (8, 160, 176, 392):
        assert_same(list(loader(store).batches(start, 400)), whole[start // 8 :])
    for world in (2, 4):
        parts = [list(loader(store, rank=rank, world=world).batches(0, 400)) for rank in range(world)]
        assert_same([batch for step in zip(*parts, strict=True) for batch in step], whole)


def test_a_window_of_no_chunk_is_refused(store: Store) -> None:
    with pytest.raises(StoreError, match="window 0: give at least 1 chunk"):
        loader(store, window=0)


# --- what is at hand ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [4, 8, 24])
@pytest.mark.parametrize("window", [1, 4, 9])
def test_at_most_two_windows_of_chunks_are_held(store: Store, window: int, batch_size: int) -> None:
    """At each batch of two epochs, its own among them; a batch may itself span more."""
    made = make_window(store, store.splits["train"], 3, window)
    assert made is not None
    keeper = Keeper(store, made, store.columns(16), patience=PATIENCE)
    most = 0
    for start in range(0, 2 * TRAIN, batch_size):
        stop = min(start + batch_size, 2 * TRAIN)
        keeper.move(start, stop, 2 * TRAIN)
        held = {chunk for group in keeper.held for chunk in made.chunks_of(group)}
        own = {int(row) // CHUNK for row in made.rows_at(start, stop)}
        spanned = len(list(made.order.groups_at(start, stop)))
        assert own <= held
        assert len(held) <= max(2, spanned) * window
        most = max(most, len(held))
    assert most > window or window * CHUNK < batch_size  # the next group was fetched ahead
    keeper.close()
    assert not store._shards._holders


def test_the_group_before_is_kept_for_processes_that_lag(store: Store) -> None:
    """Until some batches into the next group, but not for good."""
    made = make_window(store, store.splits["train"], 3, 9)
    assert made is not None
    first, second = list(made.order.groups_at(0, TRAIN))[:2]
    keeper = Keeper(store, made, store.columns(16), patience=5)
    starts = {}
    for start in range(0, TRAIN, 4):
        keeper.move(start, start + 4, TRAIN)
        starts[start] = [group.start for group in keeper.held]
    begin = -(-second.start // 4) * 4  # the first batch that is wholly within the second group
    assert starts[begin] == starts[begin + 12] == [first.start, second.start]
    assert starts[begin + 20] == [second.start, second.stop]


def test_shards_that_another_loader_holds_stay_open(store: Store) -> None:
    columns = store.columns(16)
    for _ in range(2):
        store.hold(columns, [0, 1])
    everything = store.latents(16, np.arange(16))
    store.padded_text(np.arange(16))
    assert len(store._shards) == 6
    store.release(columns, [0, 1], drop=True)
    assert len(store._shards) == 6
    store.release(columns, [0], drop=True)
    assert len(store._shards) == 3
    store.release(columns, [1], drop=False)
    assert len(store._shards) == 3
    assert torch.equal(store.latents(16, np.arange(16)), everything)


def test_the_next_group_is_checked_before_it_is_asked_for(store: Store) -> None:
    """Its shards are open once the loader has gone some batches into the group before."""
    with_window = loader(store, batch_size=1)
    made = with_window.window
    assert made is not None
    first, second = list(made.order.groups_at(0, TRAIN))[:2]
    batches = with_window.batches(0, TRAIN)
    for _ in range(first.stop - 12):  # well before any batch of the second group is made
        next(batches)
    wanted = {f"columns/latents-16/{chunk:05d}.safetensors" for chunk in made.chunks_of(second)}
    deadline = time.monotonic() + 10
    while not wanted <= store._shards._open.keys() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert wanted <= store._shards._open.keys()
    batches.close()
    assert not store._shards._holders


def test_a_damaged_shard_that_was_fetched_ahead_is_told_when_its_rows_are_due(
    chunked: Path, tmp_path: Path
) -> None:
    store = Store.open(shutil.copytree(chunked, tmp_path / "copy"))
    made = loader(store).window
    assert made is not None
    second = list(made.order.groups_at(0, TRAIN))[1]
    path = store.path / f"columns/latents-16/{made.chunks_of(second)[0]:05d}.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    batches = loader(store).batches(0, TRAIN)
    for _ in range(second.start // 8):
        next(batches)
    with pytest.raises(CorruptStoreError, match=path.name):
        list(batches)
