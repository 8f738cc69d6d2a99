"""`shoestring store add`: a size, captions or a text encoder more, beside what a store holds."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoestring.cli.encode import with_progress, worker_of

if TYPE_CHECKING:
    import torch

    from shoestring.data.add import Addition
    from shoestring.data.rows import Source
    from shoestring.data.store import Store

Given = dict[str, Any]
"""The options that were given, by their names."""


def add(
    path: Annotated[str, typer.Argument(help="Folder of the finished store.")],
    source: Annotated[
        str | None, typer.Argument(help="What the store was made of, where that has moved. [as then]")
    ] = None,
    size: Annotated[list[int] | None, typer.Option(help="Add images of this side in pixels; repeat.")] = None,
    caption_column: Annotated[
        list[str] | None, typer.Option(help="Add the captions of this column; may be repeated.")
    ] = None,
    text_encoder: Annotated[
        str | None, typer.Option(help="Add captions under this encoder: a folder or a hub id[@revision].")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="What to call the added captions. [the column's or encoder's name]")
    ] = None,
    pad: Annotated[str | None, typer.Option(help="none, encoder, masked: as for `encode`. [none]")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Of --text-encoder: longest caption.")] = None,
    text_dtype: Annotated[
        str | None, typer.Option(help="Added tokens as float16 or int8. [the store's]")
    ] = None,
    autoencoder: Annotated[
        str | None, typer.Option(help="Where the store's autoencoder is now. [as then]")
    ] = None,
    upscale: Annotated[bool, typer.Option(help="Enlarge images too small for --size.")] = False,
    image_column: Annotated[str | None, typer.Option(help="Column of images. [as then]")] = None,
    split: Annotated[str | None, typer.Option(help="Split of the source. [as then]")] = None,
    max_bad: Annotated[
        float | None, typer.Option(help="Share of rows that may lack the added caption. [0.05]")
    ] = None,
    worker: Annotated[
        str | None, typer.Option(help="This worker of all: 0/4, 1/4, ... [torchrun's numbers; 0/1]")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
) -> None:
    """Add a size, captions or a text encoder: new columns for the same rows; nothing there is rewritten."""
    from shoestring.data.add import add as run
    from shoestring.data.folder import refuse_url
    from shoestring.data.store import Store
    from shoestring.processes import own_device
    from shoestring.runtime import pick_device

    given: Given = {
        "SOURCE": source,
        "size": size,
        "caption_column": caption_column,
        "text_encoder": text_encoder,
    }
    given |= {"name": name, "pad": pad, "max_tokens": max_tokens, "text_dtype": text_dtype}
    given |= {"autoencoder": autoencoder, "upscale": upscale, "image_column": image_column, "split": split}
    given = {option: value for option, value in (given | {"max_bad": max_bad}).items() if _is_given(value)}
    _check(given)
    refuse_url(path, "Add to a folder of this machine (`shoestring store copy URL FOLDER`), then upload it.")
    place, numbers = pick_device(own_device(device)), worker_of(worker)
    for number in given.get("size", [None]):
        store = Store.open(path)
        addition = _captions(store, given, place) if number is None else _size(store, number, given, place)
        grown = with_progress(partial(run, store, addition, device=place, worker=numbers))
        _closing_line(grown, path, addition)


def _is_given(value: object) -> bool:
    return value is not None and value is not False and value != []


def _check(given: Given) -> None:
    """One thing at a time, and no option without effect."""
    from shoestring.errors import StoreError

    captions = "caption_column" in given or "text_encoder" in given
    if ("size" in given) == captions:
        raise StoreError(
            "what to add: give --size N, or --caption-column NAME, or --text-encoder PLACE (or the latter "
            "two together)."
        )
    for needed, options in _NEEDED_BY.items():
        idle = [option for option in options if option in given]
        if idle and not any(each in given for each in needed):
            names = " or ".join(map(_option, needed))
            raise StoreError(f"{_option(idle[0])} has no effect without {names}. Leave it out.")


_NEEDED_BY = {
    ("size",): ("upscale", "autoencoder"),
    ("caption_column", "text_encoder"): ("name", "text_dtype"),
    ("caption_column",): ("max_bad",),
    ("text_encoder",): ("pad", "max_tokens"),
    ("size", "caption_column"): ("SOURCE", "image_column", "split"),
}


def _option(name: str) -> str:
    return name if name.isupper() else f"--{name.replace('_', '-')}"


def _size(store: Store, size: int, given: Given, device: torch.device) -> Addition:
    from shoestring.data.add import SizeAddition
    from shoestring.data.encoders import ImageEncoder
    from shoestring.errors import StoreError

    if size < 1:
        raise StoreError(f"--size {size}: give a size in pixels, such as --size 32.")
    place = given.get("autoencoder") or _full_name(store.manifest["autoencoder"])
    image = ImageEncoder.load(place, device=device, log_variance=store.has_log_variance)
    source = _source(store, given, size=size)
    return SizeAddition(store, source, size, image, upscale="upscale" in given, words=_words(given))


def _captions(store: Store, given: Given, device: torch.device) -> Addition:
    from shoestring.data.add import MAX_BAD, CaptionAddition
    from shoestring.data.encoders import CaptionEncoder
    from shoestring.data.text_column import dtype_of

    columns, place, made = given.get("caption_column"), given.get("text_encoder"), store.manifest
    was = made["text_encoder"]
    text = CaptionEncoder.load(
        place or _full_name(was),
        given.get("text_dtype") or dtype_of(made["text_dtype"]),
        pad=given.get("pad", "none") if place else was["pad"],
        max_tokens=given.get("max_tokens") if place else was["max_tokens"],
        device=device,
    )
    source = _source(store, given, caption_columns=columns) if columns else None
    called = re.sub(r"[^\w.-]+", "-", "-".join(columns or [Path(str(place)).name]))
    name, max_bad = given.get("name", called), given.get("max_bad", MAX_BAD)
    return CaptionAddition(store, source, text, name=name, words=_words(given), max_bad=max_bad)


def _source(store: Store, given: Given, **options: Any) -> Source:
    from shoestring.data.add import source_again

    again = {option: given[option] for option in ("image_column", "split") if option in given}
    return source_again(store, given.get("SOURCE"), **again, **options)


def _words(given: Given) -> list[str]:
    """What was given, as on the command line; size and name are the addition's own."""
    words = [given["SOURCE"]] if "SOURCE" in given else []
    for name, value in given.items():
        if name not in ("SOURCE", "size", "name"):
            for each in value if isinstance(value, list) else [value]:
                words += [_option(name)] if each is True else [_option(name), str(each)]
    return words


def _full_name(encoder: dict[str, Any]) -> str:
    return f"{encoder['id']}@{encoder['revision']}" if encoder["revision"] else str(encoder["id"])


def _closing_line(store: Store | None, path: str, addition: Addition) -> None:
    if store is None:
        typer.echo(f"{path}: this worker is done; the last to finish adds {addition.name} to the store.")
        return
    size = sum(store.bytes_by_column()[column] for column in addition.columns)
    typer.echo(
        f"{path}: {addition.name} added, {size / max(1, len(store)):,.0f} bytes a sample, "
        f"{size / 2**20:,.1f} MiB."
    )
