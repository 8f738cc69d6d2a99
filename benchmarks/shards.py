"""How fast a store of many shards is read: samples/s through the loader, and what a window and a cache take.

python benchmarks/shards.py [--tiny] [--chunks 2000] [--rows 8] [--width 64] [--window 16] [--batch 64]

`first_epoch` checks every shard when it is first opened; `next_epoch` does not, its shards are remembered;
`few_open` is the next epoch with 256 shards open at once instead of half of what `ulimit -n` allows. The
window's epochs mix `--window` chunks at a time; `remote` is the first epoch of the same store at a file://
URL through a cache, with the most bytes that the cache held. `chunks_a_batch` is how many chunks a batch's
rows come from, with a window and without.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from parts.figures import tell
from parts.stores import latents_store

from shoestring.data import integrity
from shoestring.data.loader import Loader
from shoestring.data.resident import FEWEST, Resident
from shoestring.data.store import Store


def epoch(store: Store, batch: int, window: int | None, number: int = 0) -> Iterator[None]:
    """One epoch through the loader, batch by batch."""
    loader = Loader(store, size=256, batch_size=batch, seed=0, captions=False, window=window)
    for _ in loader.batches(number * len(store), (number + 1) * len(store)):
        yield


def rate(store: Store, batch: int, window: int | None = None, number: int = 0) -> float:
    """Samples a second of one epoch."""
    start = time.perf_counter()
    for _ in epoch(store, batch, window, number):
        pass
    return len(store) / (time.perf_counter() - start)


def remote_rate(store: Store, cache: Path, batch: int, window: int) -> tuple[float, int]:
    """Samples a second of the first epoch from a URL, and the most bytes in the cache."""
    far = Store.open(store.path.as_uri(), cache=cache)
    most, start, looking = 0, time.perf_counter(), 0.0
    for number, _ in enumerate(epoch(far, batch, window)):
        if number % 4 == 0:
            look = time.perf_counter()
            most = max(most, bytes_in(far.path / "files"))
            looking += time.perf_counter() - look
    return len(store) / (time.perf_counter() - start - looking), most


def bytes_in(folder: Path) -> int:
    """Size of the files in a folder, some of which may go while they are counted."""
    size = 0
    for file in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):
            size += file.stat().st_size
    return size


def chunks_a_batch(store: Store, batch: int, window: int | None, rows: int) -> float:
    """Mean number of chunks that a batch's rows come from, over an epoch."""
    loader = Loader(store, size=256, batch_size=batch, seed=0, captions=False, window=window)
    starts = range(0, len(store) - batch + 1, batch)
    return float(np.mean([len(np.unique(loader._rows(start, start + batch) // rows)) for start in starts]))


def main() -> None:
    """Write the store into a temporary folder and read it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="50 chunks")
    parser.add_argument("--chunks", type=int, default=2000)
    parser.add_argument("--rows", type=int, default=8, help="of a chunk")
    parser.add_argument("--width", type=int, default=64, help="of a text token")
    parser.add_argument("--window", type=int, default=16)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--folder", help="where to write; the system's temporary folder by default")
    arguments = parser.parse_args()
    chunks = 50 if arguments.tiny else arguments.chunks
    batch, window, rows = arguments.batch, arguments.window, arguments.rows
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        store = latents_store(Path(folder) / "store", chunks * rows, chunk_rows=rows, width=arguments.width)
        size = sum(store.bytes_by_column().values())
        figures = {
            "first_epoch": rate(Store.open(store.path), batch),
            "next_epoch": rate(store, batch, number=1),
        }
        integrity._whole.clear()
        figures["window_first_epoch"] = rate(Store.open(store.path), batch, window)
        figures["window_next_epoch"] = rate(store, batch, window, number=1)
        store._shards = Resident(store.files, store._entries, most=FEWEST)
        figures["few_open"] = rate(store, batch, number=1)
        figures["remote"], most = remote_rate(store, Path(folder) / "cache", batch, window)
        settings = {
            "chunks": chunks,
            "rows_a_chunk": rows,
            "bytes_a_sample": round(size / len(store)),
            "batch": batch,
            "window": window,
            "threads": 1,
        }
        for metric, value in figures.items():
            tell("shards", metric, value, "samples/s", **settings)
        tell("shards", "cache_of_store", most / size, "share", **settings)
        for metric, one in (("chunks_a_batch", None), ("window_chunks_a_batch", window)):
            tell("shards", metric, chunks_a_batch(store, batch, one, rows), "chunks", **settings)


if __name__ == "__main__":
    main()
