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
    from shoestring.data.store import Store

Given = dict[str, Any]
"""Options by their names; None for those not given."""


def add(
    path: Annotated[Path, typer.Argument(help="Folder of the finished store.")],
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
    pad: Annotated[str | None, typer.Option(help="Of --text-encoder: none or encoder. [none]")] = None,
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
    worker: Annotated[str, typer.Option(help="This worker of all: 0/4, 1/4, ...")] = "0/1",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
) -> None:
    """Add a size, captions or a text encoder: new columns for the same rows; nothing there is rewritten."""
    from shoestring.data.add import add as run
    from shoestring.data.store import Store
    from shoestring.runtime import pick_device

    _check_choice(size, caption_column, text_encoder)
    of_source = size or caption_column
    _check_idle("--size", size, upscale=upscale, autoencoder=autoencoder)
    _check_idle("captions", not size, name=name, text_dtype=text_dtype)
    _check_idle("--caption-column", caption_column, max_bad=max_bad)
    _check_idle("--text-encoder", text_encoder, pad=pad, max_tokens=max_tokens)
    _check_idle(
        "--size or --caption-column", of_source, SOURCE=source, image_column=image_column, split=split
    )
    place, numbers = pick_device(device), worker_of(worker)
    again = {"image_column": image_column, "split": split}
    for number in size or [0]:
        store = Store.open(path)
        if number:
            given: Given = {"SOURCE": source, **again, "autoencoder": autoencoder, "upscale": upscale}
            addition = _size(store, number, given, place)
        else:
            given = {
                "SOURCE": source,
                **again,
                "caption_column": caption_column,
                "text_encoder": text_encoder,
            }
            given |= {"pad": pad, "max_tokens": max_tokens, "text_dtype": text_dtype, "max_bad": max_bad}
            addition = _captions(store, name, given, place)
        grown = with_progress(partial(run, store, addition, device=place, worker=numbers))
        _closing_line(grown, path, addition)


def _size(store: Store, size: int, given: Given, device: torch.device) -> Addition:
    from shoestring.data.add import SizeAddition, source_again
    from shoestring.data.encoders import ImageEncoder

    place = given["autoencoder"] or _full_name(store.manifest["autoencoder"])
    image = ImageEncoder.load(place, device=device, log_variance=store.has_log_variance)
    again = {name: given[name] for name in ("image_column", "split")}
    source = source_again(store, given["SOURCE"], size=size, **again)
    return SizeAddition(store, source, size, image, upscale=given["upscale"], words=_words(given))


def _captions(store: Store, name: str | None, given: Given, device: torch.device) -> Addition:
    from shoestring.data.add import CaptionAddition, source_again
    from shoestring.data.encoders import CaptionEncoder
    from shoestring.data.text_column import dtype_of

    place, columns, made = given["text_encoder"], given["caption_column"], store.manifest["text_encoder"]
    text = CaptionEncoder.load(
        place or _full_name(made),
        given["text_dtype"] or dtype_of(store.manifest["text_dtype"]),
        pad=(given["pad"] or "none") if place else made["pad"],
        max_tokens=given["max_tokens"] if place else made["max_tokens"],
        device=device,
    )
    source = None
    if columns:
        again = {name: given[name] for name in ("image_column", "split")}
        source = source_again(store, given["SOURCE"], caption_columns=columns, **again)
    called = name or re.sub(r"[^\w.-]+", "-", "-".join(columns or [Path(place).name]))
    max_bad = given["max_bad"]
    return CaptionAddition(
        store,
        source,
        text,
        name=called,
        words=_words(given),
        **({} if max_bad is None else {"max_bad": max_bad}),
    )


def _words(given: Given) -> list[str]:
    """What was given, as on the command line."""
    words = [given["SOURCE"]] if given["SOURCE"] else []
    for name, value in given.items():
        option = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(option)
        elif value and name != "SOURCE":
            words += [
                word
                for each in (value if isinstance(value, list) else [value])
                for word in (option, str(each))
            ]
    return words


def _check_choice(size: list[int] | None, columns: list[str] | None, text_encoder: str | None) -> None:
    """One thing at a time."""
    from shoestring.errors import StoreError

    if bool(size) == bool(columns or text_encoder):
        raise StoreError(
            "what to add: give --size N, or --caption-column NAME, or --text-encoder PLACE (or the latter "
            "two together)."
        )


def _check_idle(needs: str, there: object, **options: object) -> None:
    """No option without effect."""
    from shoestring.errors import StoreError

    for option, value in options.items():
        if value and not there:
            name = option if option.isupper() else f"--{option.replace('_', '-')}"
            raise StoreError(f"{name} has no effect without {needs}. Leave it out.")


def _full_name(encoder: dict[str, Any]) -> str:
    return f"{encoder['id']}@{encoder['revision']}" if encoder["revision"] else str(encoder["id"])


def _closing_line(store: Store | None, path: Path, addition: Addition) -> None:
    if store is None:
        typer.echo(f"{path}: this worker is done; the last to finish adds {addition.name} to the store.")
        return
    size = sum(store.bytes_by_column()[column] for column in addition.columns)
    typer.echo(
        f"{path}: {addition.name} added, {size / max(1, len(store)):,.0f} bytes a sample, "
        f"{size / 2**20:,.1f} MiB."
    )
