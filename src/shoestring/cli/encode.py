"""`shoestring encode`: captioned images into a store."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from shoestring.data.encode import EncodeSettings
    from shoestring.data.store import Store


def encode(
    source: Annotated[
        str, typer.Argument(help="Image folder, WebDataset tars, Parquet, hub id (owner/name), or scenes.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the store.")],
    size: Annotated[list[int] | None, typer.Option(help="Side in pixels; repeat for several. [32]")] = None,
    autoencoder: Annotated[str, typer.Option(help="pixels, a folder, or a hub id[@revision].")] = "pixels",
    text_encoder: Annotated[str, typer.Option(help="hashing, a folder, or a hub id[@revision].")] = "hashing",
    pad: Annotated[
        str,
        typer.Option(
            help="none: real tokens only; encoder: padded, CLIP not told so (SDXL's way); masked: told so."
        ),
    ] = "none",
    max_tokens: Annotated[int | None, typer.Option(help="Longest caption in tokens. [the encoder's]")] = None,
    text_dtype: Annotated[
        str, typer.Option(help="Tokens as float16, or as int8 with scales: half the bytes.")
    ] = "float16",
    held_out: Annotated[
        int | None, typer.Option(help="Rows kept out of training (scenes: of each held-out split). [0; 1024]")
    ] = None,
    log_variance: Annotated[bool, typer.Option(help="Store latents as distributions.")] = False,
    flip: Annotated[
        bool, typer.Option(help="Store mirrored versions, unless a caption says a side.")
    ] = False,
    upscale: Annotated[bool, typer.Option(help="Enlarge too small images.")] = False,
    max_bad: Annotated[float, typer.Option(help="Share of bad rows that is still accepted.")] = 0.05,
    image_column: Annotated[str | None, typer.Option(help="Column of images (or file names).")] = None,
    caption_column: Annotated[
        list[str] | None, typer.Option(help="Column of captions; may be repeated.")
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Split to read where a source has several. [train]")
    ] = None,
    worker: Annotated[
        str | None, typer.Option(help="This worker of all: 0/4, 1/4, ... [torchrun's numbers; 0/1]")
    ] = None,
    chunk_rows: Annotated[int, typer.Option(help="Rows of a chunk, the unit of work.")] = 4096,
    level: Annotated[str | None, typer.Option(help="scenes: cells or free. [cells]")] = None,
    images: Annotated[int | None, typer.Option(help="scenes: how many to train on. [60000]")] = None,
    seed: Annotated[int | None, typer.Option(help="scenes: which ones. [0]")] = None,
    objects: Annotated[int | None, typer.Option(help="scenes: most objects in one. [3]")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
) -> None:
    """Encode captioned images into a store. Run again after a stop: finished chunks are kept."""
    import time

    from shoestring.data.encode import EncodeSettings
    from shoestring.data.encode import encode as run
    from shoestring.data.sources import open_source
    from shoestring.processes import own_device
    from shoestring.runtime import pick_device

    is_scenes = source == "scenes"
    settings = EncodeSettings(
        autoencoder=autoencoder,
        text_encoder=text_encoder,
        sizes=tuple(size or [32]),
        pad=pad,
        max_tokens=max_tokens,
        text_dtype=text_dtype,
        log_variance=log_variance,
        flip=flip,
        upscale=upscale,
        held_out=0 if is_scenes else held_out or 0,
        chunk_rows=chunk_rows,
        max_bad=max_bad,
    )
    asked = {"level": level, "images": images, "seed": seed, "objects": objects}
    opened = open_source(
        source,
        image_column=image_column,
        caption_columns=caption_column or (),
        split=split,
        scenes=_scene_options(is_scenes, asked, held_out, settings),
    )
    begun = time.perf_counter()
    numbers, place = worker_of(worker), pick_device(own_device(device))
    store = with_progress(partial(run, opened, out, settings, device=place, worker=numbers))
    _closing_line(store, out, numbers, time.perf_counter() - begun)


def _scene_options(
    is_scenes: bool, asked: dict[str, Any], held_out: int | None, settings: EncodeSettings
) -> dict[str, Any] | None:
    """What `ScenesSource` takes; options of scenes without effect are refused."""
    from shoestring.errors import SourceError

    given = {name: value for name, value in asked.items() if value is not None}
    if not is_scenes:
        if given:
            raise SourceError(f"--{next(iter(given))} is for the source `scenes` only. Leave it out.")
        return None
    if held_out is not None:
        given["held_out"] = held_out
    return {**given, "size": max(settings.sizes)}


def worker_of(text: str | None) -> tuple[int, int]:
    """`1/4` as (1, 4); where nothing is said, this process's place among those that torchrun started."""
    from shoestring.errors import StoreError

    if text is None:
        return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    rank, _, count = text.partition("/")
    if not (rank.isdigit() and count.isdigit() and int(rank) < int(count)):
        raise StoreError(f"--worker {text}: give NUMBER/OF_ALL, from 0/4 to 3/4 for four workers.")
    return int(rank), int(count)


def with_progress(run: Callable[..., Store | None]) -> Store | None:
    """Call `run` with a log, and a bar that shows images a second and the time left."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("encoding"),
        BarColumn(),
        TextColumn("{task.completed:,}{task.fields[of]} images"),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
    )
    first = os.environ.get("RANK", "0") == "0"  # of the workers that torchrun started
    hidden = not (console.is_terminal and first)
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task("encoding", total=None, of="", speed="")

        def progress(done: int, total: int | None) -> None:
            speed = bar.tasks[0].speed
            of = "" if total is None else f" of {total:,}"
            bar.update(task, completed=done, total=total, of=of, speed=f"{speed:,.0f}/s" if speed else "")

        return run(
            log=lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True),
            progress=progress,
        )


def _closing_line(store: Store | None, out: Path, worker: tuple[int, int], seconds: float) -> None:
    if store is None:
        typer.echo(
            f"{out}: worker {worker[0]}/{worker[1]} is done; the last worker to finish seals the store."
        )
        return
    splits = ", ".join(f"{len(split):,} {name}" for name, split in store.splits.items())
    sizes = " and ".join(f"{size}" for size in store.sizes)
    megabytes = sum(store.bytes_by_column().values()) / 2**20
    typer.echo(
        f"{out}: {len(store):,} images of {sizes} px ({splits}), {megabytes:,.1f} MiB, in {seconds:.1f} s. "
        f"Next: shoestring train RECIPE --set data.store={out}"
    )
