"""How fast a store is written and read: samples/s shuffled and in order; one JSON line a claim.

python benchmarks/store.py [--tiny] [--samples 8192] [--batch 64] [--folder /a/disk]

`scenes` is the store of the demo (32 px, hashing). `latents` has the shape of a latent model's at 256 px:
4 x 32 x 32 latents and about 42 tokens of width 1024 a sample, 95 kB.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shoestring.data.encode import EncodeSettings, encode
from shoestring.data.loader import Loader
from shoestring.data.order import rows_at
from shoestring.data.seal import seal
from shoestring.data.shards import write_lines, write_shard
from shoestring.data.sources import open_source
from shoestring.data.store import FORMAT, Store, shard_name
from shoestring.runtime import cpu_name

CHUNK = 4096


def scenes_store(path: Path, samples: int) -> Store:
    """Rendered and encoded, as `shoestring encode scenes` does."""
    source = open_source("scenes", scenes={"images": samples, "held_out": 0})
    store = encode(source, path, EncodeSettings(), log=lambda line: None)
    assert store is not None
    return store


def latents_store(path: Path, samples: int) -> Store:
    """Random latents and tokens, written as the encoder writes them."""
    generator = np.random.default_rng(0)
    begun = {
        "format": FORMAT,
        "command": "python benchmarks/store.py",
        "source": {"kind": "random"},
        "autoencoder": {"id": "random", "scaling": {"shift": [0.0], "factor": [0.13025]}},
        "text_encoder": {"id": "random", "width": 1024, "pad": "none", "max_tokens": 77},
        "sizes": {"256": [4, 32, 32]},
        "preprocessing": {"flip": False},
        "log_variance": False,
        "held_out": 0,
    }
    markers = []
    for chunk, start in enumerate(range(0, samples, CHUNK)):
        rows = min(CHUNK, samples - start)
        lengths = generator.integers(8, 78, rows)
        columns: dict[str, dict[str, np.ndarray[Any, Any]]] = {
            "latents-256": {
                "mean": generator.standard_normal((rows, 4, 32, 32), np.float32).astype(np.float16)
            },
            "text": {
                "tokens": generator.standard_normal((int(lengths.sum()), 1024), np.float32).astype(
                    np.float16
                ),
                "offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            },
            "rows": {"caption_offsets": np.arange(rows + 1), "caption_ids": np.arange(rows)},
        }
        files = [write_shard(path, shard_name(name, chunk), arrays, rows) for name, arrays in columns.items()]
        records = [{"key": f"{start + row}", "captions": ["x" * 200]} for row in range(rows)]
        files.append(write_lines(path, shard_name("json", chunk), records))
        markers.append(
            {
                "source_rows": rows,
                "rows": rows,
                "splits": [["train", rows]],
                "skipped": [],
                "cut": {},
                "mirrored": 0,
                "files": [entry.to_json() for entry in files],
            }
        )
    seal(path, begun, markers, 0.0, print)
    return Store.open(path)


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


def timed(work: Callable[[], int]) -> float:
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
    machine = {"samples": samples, "batch": arguments.batch, "threads": 1, "machine": cpu_name()}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for name, make in (("scenes", scenes_store), ("latents", latents_store)):
            start = time.perf_counter()
            store = make(Path(folder) / name, samples)
            seconds = time.perf_counter() - start
            size = sum(store.bytes_by_column().values())

            def tell(claim: str, rate: float, name: str = name, size: int = size) -> None:
                line = {
                    "benchmark": "store",
                    "store": name,
                    "claim": claim,
                    "samples_per_second": round(rate),
                }
                print(
                    json.dumps(
                        {**line, "megabytes_per_second": round(rate * size / samples / 1e6), **machine}
                    )
                )

            tell("made and written", samples / seconds)
            tell("read in order", timed(partial(reads, store, arguments.batch, False)))
            tell("read shuffled", timed(partial(reads, store, arguments.batch, True)))
            tell("loader, shuffled", timed(partial(loads, store, arguments.batch)))


if __name__ == "__main__":
    main()
