"""How fast a store is written and read: samples/s in order, shuffled, and through the loader.

python benchmarks/store.py [--tiny] [--samples 8192] [--batch 64] [--folder /a/disk]

`scenes` is the store of the demo (32 px, hashing). `latents` has the shape of a latent model's at 256 px:
4 x 32 x 32 latents and about 42 tokens of width 1024 a sample, 95 kB.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from parts.figures import tell
from parts.stores import latents_store, scenes_store

from shoestring.data.loader import Loader
from shoestring.data.order import rows_at
from shoestring.data.store import Store


def reads(store: Store, batch: int, shuffled: bool) -> int:
    """All rows once, straight from the store: latents and padded text."""
    order = rows_at(1, len(store), 0, len(store)) if shuffled else np.arange(len(store))
    for start in range(0, len(store), batch):
        rows = order[start : start + batch]
        store.latents(store.sizes[0], rows)
        store.padded_text(rows)
    return len(store)


def loads(store: Store, batch: int) -> int:
    """All rows once, shuffled, through the loader and its thread."""
    loader = Loader(store, size=store.sizes[0], batch_size=batch, seed=0)
    return sum(len(each) for each in loader.batches(0, len(store)))


def rate(work: Callable[[], int]) -> float:
    """Samples a second, the better of two runs after one that fills the file cache."""
    work()
    best = 0.0
    for _ in range(2):
        start = time.perf_counter()
        count = work()
        best = max(best, count / (time.perf_counter() - start))
    return best


def main() -> None:
    """Write both stores into a temporary folder and read them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="256 samples")
    parser.add_argument("--samples", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--folder", help="where to write; the system's temporary folder by default")
    arguments = parser.parse_args()
    samples = 256 if arguments.tiny else arguments.samples
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for name, make in (("scenes", scenes_store), ("latents", latents_store)):
            start = time.perf_counter()
            store = make(Path(folder) / name, samples)
            written = samples / (time.perf_counter() - start)
            figures = {
                "made_and_written": written,
                "read_in_order": rate(partial(reads, store, arguments.batch, False)),
                "read_shuffled": rate(partial(reads, store, arguments.batch, True)),
                "loader_shuffled": rate(partial(loads, store, arguments.batch)),
            }
            settings = {
                "store": name,
                "bytes_a_sample": round(sum(store.bytes_by_column().values()) / samples),
                "samples": samples,
                "batch": arguments.batch,
                "threads": 1,
            }
            for metric, value in figures.items():
                tell("store", metric, value, "samples/s", **settings)


if __name__ == "__main__":
    main()
