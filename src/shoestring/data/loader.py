"""Batches of a split in the run's order, made ahead by one thread.

    positions start .. stop-1 of the run -> order -> rows of the split -> store -> Batch

Everything about image p of a run (its row, its caption, its latent's draw, its mirroring) depends on
(seed, p) alone: the same for any number of processes, and after any resume.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from shoestring.data.order import rows_at
from shoestring.data.shards import Array
from shoestring.data.splits import Rows
from shoestring.data.store import Store
from shoestring.data.window import Keeper, make_window
from shoestring.errors import StoreError
from shoestring.interfaces import Batch
from shoestring.runtime import keyed_normal, keyed_uniform

AHEAD = 2  # batches made before they are asked for
PATIENCE = 2 * (AHEAD + 1)  # batches that one process may be ahead of another, and some
EXTRA = ("pooled", "size_crop")


class Loader:
    """Reads global batches of `batch_size` images; this process takes slice `rank` of `world` of each.

    `extra` names more tensors for `Batch.extra`: `pooled` (the caption's single vector), `size_crop`.
    Without `captions` a batch carries no caption strings, which spares reading them. With a `window` the rows
    of that many chunks are mixed at a time, and the next ones are fetched meanwhile (data/window.py); one as
    large as the store is none.
    """

    def __init__(
        self,
        store: Store,
        *,
        size: int,
        split: str = "train",
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        extra: Sequence[str] = (),
        captions: bool = True,
        window: int | None = None,
        pin_memory: bool = False,
    ) -> None:
        store.check(size=size)
        if split not in store.splits:
            raise StoreError(f"{store.path}: no split {split!r}; there are: {', '.join(store.splits)}.")
        if batch_size < 1 or not 0 <= rank < world:
            raise StoreError(
                f"batch_size {batch_size}, rank {rank} of {world}: give at least 1, and 0 to world-1."
            )
        if unknown := set(extra) - set(EXTRA):
            raise StoreError(f"extra {min(unknown)!r}: unknown. Use {' or '.join(EXTRA)}.")
        if "pooled" in extra and not store.manifest["text_encoder"].get("pooled"):
            raise StoreError(
                f"{store.path}: its text encoder ({store.manifest['text_encoder']['id']}) gives no pooled "
                "text. Make a store with a CLIP text encoder."
            )
        self.store, self.size, self.split = store, size, store.splits[split]
        self.batch_size, self.seed, self.rank, self.world = batch_size, seed, rank, world
        self.extra, self.captions, self.pin_memory = tuple(extra), captions, pin_memory
        self.columns = store.columns(size, captions=captions, size_crop="size_crop" in extra)
        self.window = make_window(store, self.split, seed, window, self.columns)

    def __len__(self) -> int:
        """Images in one epoch."""
        return len(self.split)

    def batches(self, start: int, stop: int) -> Generator[Batch, None, None]:
        """This process's part of the global batches from position `start` of the run up to `stop`.

        The last batch may be short. Close the iterator (or leave the loop) to stop the thread.
        """
        ready: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=AHEAD)
        stopped = threading.Event()

        def put(item: Batch | BaseException | None) -> None:
            while not stopped.is_set():
                try:
                    return ready.put(item, timeout=0.05)
                except queue.Full:
                    continue

        def work() -> None:
            torch.set_num_threads(1)  # for this thread, whose work is small ...
            torch.get_num_threads()  # (takes effect here before it is set for the others)
            alone.set()
            keeper = self.window and Keeper(self.store, self.window, self.columns, patience=PATIENCE)
            try:
                for begin in range(start, stop, self.batch_size):
                    if stopped.is_set():
                        break
                    end = min(begin + self.batch_size, stop)
                    if keeper:
                        keeper.move(begin, end, stop)
                    put(self.batch(begin, end))
                put(None)
            except BaseException as error:  # raised again where the batch is asked for
                put(error)
            finally:
                if keeper:
                    keeper.close()

        threads, alone = torch.get_num_threads(), threading.Event()
        thread = threading.Thread(target=work, name="shoestring-loader", daemon=True)
        thread.start()
        alone.wait()
        torch.set_num_threads(threads)  # ... for every other: two teams of threads would slow each other
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stopped.set()
            thread.join()

    def batch(self, start: int, stop: int) -> Batch:
        """This process's part of the global batch at positions start .. stop-1 of the run."""
        count = stop - start
        stop = start + count * (self.rank + 1) // self.world
        start = start + count * self.rank // self.world
        index = torch.arange(start, stop)
        rows = self._rows(start, stop)
        choice = keyed_uniform(self.seed, "caption", index).numpy()
        text, mask = self.store.padded_text(rows, choice)
        batch = Batch(
            index=index,
            latents=self._latents(rows, index),
            text=text,
            text_mask=None if self.store.padded else mask,
            captions=self.store.chosen_captions(rows, choice) if self.captions else (),
            extra=self._extra(rows, choice),
        )
        return _pinned(batch) if self.pin_memory else batch

    def _rows(self, start: int, stop: int) -> Rows:
        if self.window:
            return self.window.rows_at(start, stop)
        return self.split.rows(rows_at(self.seed, len(self.split), start, stop))

    def _latents(self, rows: Rows, index: Tensor) -> Tensor:
        noise = flipped = None
        if self.store.has_log_variance:
            noise = keyed_normal(self.seed, "latent", index, self.store.latent_shape(self.size))
        if self.store.has_flips:
            flipped = keyed_uniform(self.seed, "flip", index).numpy() < 0.5
        return self.store.latents(self.size, rows, noise=noise, flipped=flipped)

    def _extra(self, rows: Rows, choice: Array) -> dict[str, Tensor]:
        extra: dict[str, Tensor] = {}
        if "pooled" in self.extra and (pooled := self.store.pooled(rows, choice)) is not None:
            extra["pooled"] = pooled
        if "size_crop" in self.extra:
            extra["size_crop"] = self.store.size_crop(rows, self.size)
        return extra


def _pinned(batch: Batch) -> Batch:
    """The same batch in page-locked memory, from where copies to a GPU run beside its work."""
    return Batch(
        index=batch.index.pin_memory(),
        latents=batch.latents.pin_memory(),
        text=batch.text.pin_memory(),
        text_mask=None if batch.text_mask is None else batch.text_mask.pin_memory(),
        captions=batch.captions,
        extra={name: tensor.pin_memory() for name, tensor in batch.extra.items()},
    )
