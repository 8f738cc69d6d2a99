"""Batches depend on (seed, position) alone: on no number of processes, no restart, no batch size."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shoestring.data.loader import Loader
from shoestring.data.order import rows_at
from shoestring.data.rows import Row
from shoestring.data.store import Store
from shoestring.errors import CorruptStoreError, StoreError
from shoestring.interfaces import Batch
from shoestring.models.autoencoders import scale_latents
from shoestring.models.text_encoders import load_text_encoder

MakeStore = Callable[..., Store]
MakeRows = Callable[..., list[Row]]


def loader(store: Store, **changes: Any) -> Loader:
    return Loader(store, **{"size": 16, "batch_size": 8, "seed": 3, **changes})


def by_position(batches: Any) -> dict[int, tuple[torch.Tensor, torch.Tensor, str]]:
    """Position in the run -> (latent, real tokens, caption)."""
    found = {}
    for batch in batches:
        for i, position in enumerate(batch.index.tolist()):
            tokens = batch.text[i] if batch.text_mask is None else batch.text[i][batch.text_mask[i]]
            found[position] = (batch.latents[i], tokens, batch.captions[i])
    return found


def assert_same(one: dict[int, Any], other: dict[int, Any]) -> None:
    assert one.keys() == other.keys()
    for position, (latent, tokens, caption) in one.items():
        assert torch.equal(latent, other[position][0])
        assert torch.equal(tokens, other[position][1])
        assert caption == other[position][2]


@pytest.fixture
def store(make_store: MakeStore, rows: MakeRows) -> Store:
    return make_store(rows(25), held_out=4)


def test_a_batch_is_the_orders_rows_of_the_split(store: Store, rows: MakeRows) -> None:
    """Independent answer: the order, the split and the given rows, put together by hand."""
    given = rows(25)
    batch = next(iter(loader(store).batches(16, 40)))
    wanted = store.splits["train"].rows(rows_at(3, 21, 16, 24))
    pictures = torch.stack([torch.from_numpy(np.array(given[i].image)) for i in wanted])
    assert torch.equal(batch.latents, pictures.permute(0, 3, 1, 2).float() / 127.5 - 1)
    assert batch.index.tolist() == list(range(16, 24))
    for i, row in enumerate(wanted):
        assert batch.captions[i] in given[row].captions
        tokens = load_text_encoder("hashing").encode([batch.captions[i]]).tokens[0].half().float()
        assert batch.text_mask is not None
        assert torch.equal(batch.text[i][batch.text_mask[i]], tokens)
        assert not batch.text[i][~batch.text_mask[i]].any()


def test_an_epoch_holds_every_row_once_and_never_a_held_out_one(store: Store) -> None:
    held_out = {tuple(store.captions(int(r))) for r in store.splits["held_out"].rows(np.arange(4))}
    every = {tuple(store.captions(row)) for row in range(25)}
    for epoch in (0, 1):
        batches = list(loader(store).batches(21 * epoch, 21 * (epoch + 1)))
        captions = [caption for batch in batches for caption in batch.captions]
        told = {next(each for each in every if caption in each) for caption in captions}
        assert len(told) == len(captions) == 21
        assert not told & held_out


def test_the_last_batch_may_be_short(store: Store) -> None:
    assert [len(batch) for batch in loader(store).batches(0, 20)] == [8, 8, 4]
    assert list(loader(store).batches(5, 5)) == []


def test_any_start_batch_size_and_world_give_the_same_images(store: Store) -> None:
    whole = by_position(loader(store).batches(0, 64))
    assert_same(by_position(loader(store, batch_size=64).batches(0, 64)), whole)
    resumed = by_position(loader(store).batches(24, 64))
    assert_same(resumed, {p: value for p, value in whole.items() if p >= 24})
    for world in (2, 3, 8):
        parts = [list(loader(store, rank=rank, world=world).batches(0, 64)) for rank in range(world)]
        assert_same(by_position(batch for part in parts for batch in part), whole)
        for step in zip(*parts, strict=True):  # the same global batches, in contiguous slices
            positions = [p for batch in step for p in batch.index.tolist()]
            assert positions == list(range(positions[0], positions[0] + 8))


def test_captions_take_turns(make_store: MakeStore, rows: MakeRows) -> None:
    """Each of three captions about a third of the time."""
    store = make_store([Row("a", rows(1)[0].image, ("one", "two", "three"))])
    captions = [
        caption for batch in loader(store, batch_size=300).batches(0, 1200) for caption in batch.captions
    ]
    assert all(
        abs(captions.count(each) - 400) < 5 * (1200 * 2 / 9) ** 0.5 for each in ("one", "two", "three")
    )


def test_latents_are_drawn_anew_and_reproducibly(
    make_store: MakeStore, rows: MakeRows, kl_folder: Path
) -> None:
    """With a stored variance, draws scatter about the mean by exactly that variance."""
    store = make_store(rows(1), autoencoder=str(kl_folder), log_variance=True)
    drawn = torch.cat([batch.latents for batch in loader(store, batch_size=200).batches(0, 2000)])
    again = torch.cat([batch.latents for batch in loader(store, batch_size=100).batches(0, 2000)])
    assert torch.equal(drawn, again)
    mean = store.latents(16, np.array([0]))[0]
    log_variance = torch.from_numpy(store._gather("latents-16", "log_variance", np.array([0]))).float()[0]
    deviation = (log_variance / 2).exp() * 0.5  # the autoencoder's scaling
    assert ((drawn.mean(0) - mean) / deviation).abs().max() < 5 / 2000**0.5
    assert (drawn.std(0) / deviation - 1).abs().max() < 0.1
    assert scale_latents(store.scaling, torch.zeros(1, 4, 1, 1)).flatten().tolist() == [-0.125] * 4


def test_half_of_the_images_are_mirrored(make_store: MakeStore, rows: MakeRows) -> None:
    store = make_store(rows(1), flip=True)
    plain = store.latents(16, np.array([0]))[0]
    drawn = torch.cat([batch.latents for batch in loader(store, batch_size=100).batches(0, 1000)])
    is_plain = (drawn == plain).flatten(1).all(1)
    assert ((drawn == plain.flip(-1)).flatten(1).all(1) == ~is_plain).all()
    assert abs(int(is_plain.sum()) - 500) < 5 * 250**0.5


@pytest.mark.parametrize("pad", ["encoder", "masked"])
def test_padded_text_needs_no_mask(
    pad: str, make_store: MakeStore, rows: MakeRows, clip_folder: Path
) -> None:
    store = make_store(rows(9), text_encoder=str(clip_folder), pad=pad)
    batch = loader(store, extra=("pooled", "size_crop")).batch(0, 8)
    assert batch.text_mask is None
    assert batch.text.shape == (8, 8, 16)
    assert batch.extra["pooled"].shape == (8, 16)
    assert batch.extra["size_crop"].tolist() == [[16, 16, 0, 0, 16, 16]] * 8


# --- the thread ------------------------------------------------------------------------------------------


def threads() -> int:
    return sum(thread.name == "shoestring-loader" for thread in threading.enumerate())


def test_leaving_early_stops_the_thread(store: Store) -> None:
    before = threads()
    batches = loader(store).batches(0, 10**9)
    next(iter(batches))
    assert threads() == before + 1
    batches.close()  # type: ignore[attr-defined]
    assert threads() == before


def test_batches_are_made_ahead_but_not_without_bound(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    plain = Loader.batch

    def batch(self: Loader, start: int, stop: int) -> Batch:
        made.append(start)
        return plain(self, start, stop)

    monkeypatch.setattr(Loader, "batch", batch)
    batches = loader(store).batches(0, 800)
    next(iter(batches))
    waiting = threading.Event()
    waiting.wait(0.3)
    assert 2 <= len(made) <= 4
    batches.close()  # type: ignore[attr-defined]


def test_an_error_in_the_thread_reaches_the_training_loop(make_store: MakeStore, rows: MakeRows) -> None:
    """After the good batches before it: here a shard damaged after the store was made."""
    store = make_store(rows(25))
    path = store.path / "columns/latents-16/00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(CorruptStoreError, match="latents-16/00001"):
        list(loader(Store.open(store.path)).batches(0, 25))
    assert threads() == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "test"}, "no split 'test'; there are: held_out, train"),
        ({"size": 64}, "holds images of 16 pixels, not 64"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"rank": 2, "world": 2}, "rank 2 of 2"),
        ({"extra": ("pixels",)}, "extra 'pixels': unknown"),
        ({"extra": ("pooled",)}, "gives no pooled text"),
    ],
)
def test_what_the_store_cannot_give_is_refused(store: Store, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(StoreError, match=message):
        loader(store, **changes)
