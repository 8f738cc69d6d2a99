"""With a window a loader needs few chunks at a time, and is as exact as without one."""

from __future__ import annotations

import gc
import shutil
import threading
import time
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
import pytest
import torch

from shoestring.data import resident
from shoestring.data.integrity import Entry
from shoestring.data.loader import PATIENCE, Loader
from shoestring.data.resident import Resident
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


def test_a_shard_that_comes_when_nobody_wants_it_any_more_is_closed(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was being opened when its chunk was dropped; one that is held again meanwhile stays."""
    turned_to, go_on, left = threading.Semaphore(0), threading.Event(), list[str]()
    local = store.files.local

    def slow(entry: Entry) -> Path:
        turned_to.release()
        assert go_on.wait(10)
        return local(entry)

    monkeypatch.setattr(store.files, "local", slow)
    monkeypatch.setattr(store.files, "leave", lambda entries: left.extend(e["path"] for e in entries))
    store.hold(["latents-16"], [0, 1])
    for _ in range(2):
        assert turned_to.acquire(timeout=10)
    store.release(["latents-16"], [0, 1], drop=True)
    store.hold(["latents-16"], [1])
    before = left.copy()
    go_on.set()
    deadline = time.monotonic() + 10
    while store._shards._helpers and time.monotonic() < deadline:
        time.sleep(0.01)
    assert list(store._shards._open) == ["columns/latents-16/00001.safetensors"]
    assert left == [*before, "columns/latents-16/00000.safetensors"]


def test_shards_that_are_held_are_not_closed_for_others(store: Store) -> None:
    store._shards = Resident(store.files, store._entries, most=3)
    store.hold(["latents-16"], [0, 1])
    everything = store.latents(16, np.arange(203))
    names = {f"columns/latents-16/{chunk:05d}.safetensors" for chunk in (0, 1)}
    assert names <= store._shards._open.keys()
    assert len(store._shards) == 3
    store.hold(["latents-16"], range(2, 8))  # more than may be open: slow, and as exact
    assert torch.equal(store.latents(16, np.arange(203)), everything)
    assert len(store._shards) == 3


def test_a_window_of_more_files_than_may_be_open_is_refused(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoestring.data.window.most_open", lambda: 24)
    with pytest.raises(StoreError) as caught:
        loader(store, window=5, captions=False)
    assert str(caught.value).endswith(
        "two windows of 5 chunks (data.window) are 30 open files of 3 columns; this process may have 24. "
        "Use a window of 4 or less, or allow more with `ulimit -n 60`."
    )
    assert loader(store, window=4, captions=False).window is not None


def test_stores_share_what_may_be_open(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    gc.collect()
    monkeypatch.setattr(resident, "_residents", WeakSet())
    monkeypatch.setattr(resident, "most_open", lambda: 3000)
    kept = [Resident(store.files, store._entries) for _ in range(3)]
    assert [each.most for each in kept] == [1000] * 3
    kept.pop()
    assert kept[0].most == 1500


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
