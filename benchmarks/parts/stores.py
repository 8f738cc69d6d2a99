"""Stores to measure on: encoded scenes, and random latents and text of a latent model's shapes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from shoestring.data.encode import EncodeSettings, encode
from shoestring.data.manifest import FORMAT, shard_name
from shoestring.data.seal import seal
from shoestring.data.shards import write_lines, write_shard
from shoestring.data.sources import open_source
from shoestring.data.store import Store

CHUNK = 4096
TOKENS, WIDTH = 77, 1024
LEAST_TOKENS = 8
SIZES = {256: (4, 32, 32)}


def scenes_store(path: Path, samples: int) -> Store:
    """Scenes of 32 px, rendered and encoded as `shoestring encode scenes` does."""
    source = open_source("scenes", scenes={"images": samples, "held_out": 0})
    store = encode(source, path, EncodeSettings(), log=lambda line: None)
    assert store is not None
    return store


def latents_store(
    path: Path,
    samples: int,
    *,
    sizes: Mapping[int, tuple[int, ...]] = SIZES,
    pad: str = "none",
    chunk_rows: int = CHUNK,
    width: int = WIDTH,
) -> Store:
    """Random latents and tokens of the published model's widths, written as the encoder writes them.

    `pad="none"`: captions of 8 to 77 tokens; `"encoder"`: all of 77.
    """
    generator = np.random.default_rng(0)
    begun = {
        "format": FORMAT,
        "command": "python benchmarks",
        "source": {"kind": "random"},
        "autoencoder": {"id": "random", "revision": None, "scaling": {"shift": [0.0], "factor": [1.0]}},
        "text_encoder": {
            "id": "random",
            "revision": None,
            "width": width,
            "pad": pad,
            "max_tokens": TOKENS,
        },
        "sizes": {str(size): list(shape) for size, shape in sizes.items()},
        "preprocessing": {"flip": False},
        "log_variance": False,
        "held_out": 0,
    }
    markers = []
    for chunk, start in enumerate(range(0, samples, chunk_rows)):
        rows = min(chunk_rows, samples - start)
        markers.append(_write_chunk(path, chunk, start, rows, sizes, pad, width, generator))
    seal(path, begun, markers, 0.0, print)
    return Store.open(path)


def _write_chunk(
    path: Path,
    chunk: int,
    start: int,
    rows: int,
    sizes: Mapping[int, tuple[int, ...]],
    pad: str,
    width: int,
    generator: np.random.Generator,
) -> dict[str, Any]:
    """One chunk's shards; its marker."""
    lengths = generator.integers(LEAST_TOKENS if pad == "none" else TOKENS, TOKENS + 1, rows)

    def normal(*shape: int) -> np.ndarray[Any, Any]:
        return generator.standard_normal(shape, np.float32).astype(np.float16)

    columns: dict[str, dict[str, np.ndarray[Any, Any]]] = {
        **{f"latents-{size}": {"mean": normal(rows, *shape)} for size, shape in sizes.items()},
        "text": {
            "tokens": normal(int(lengths.sum()), width),
            "offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        },
        "rows": {"caption_offsets": np.arange(rows + 1), "caption_ids": np.arange(rows)},
    }
    files = [write_shard(path, shard_name(name, chunk), arrays, rows) for name, arrays in columns.items()]
    records = [{"key": f"{start + row}", "captions": ["x" * 200]} for row in range(rows)]
    files.append(write_lines(path, shard_name("json", chunk), records))
    return {
        "source_rows": rows,
        "rows": rows,
        "splits": [["train", rows]],
        "skipped": [],
        "cut": {},
        "mirrored": 0,
        "files": [entry.to_json() for entry in files],
    }
