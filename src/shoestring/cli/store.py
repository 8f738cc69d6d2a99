"""`shoestring store`: look at a store, check it, copy it, add to it (store_add.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoestring.cli.store_add import add

if TYPE_CHECKING:
    from shoestring.data.store import Store

store = typer.Typer(help="Look at a store, check it, copy it, add to it.", no_args_is_help=True)
store.command()(add)
_PADDINGS = {"none": "real tokens only", "encoder": "padded by the encoder", "masked": "padded under a mask"}

Place = Annotated[str, typer.Argument(help="Folder or URL (s3://, hf://, https://, ...) of the store.")]


@store.command()
def info(path: Place) -> None:
    """Rows, splits, sizes, encoders, bytes a sample, and what was left out."""
    from shoestring.data.store import Store

    opened = Store.open(path)
    manifest = opened.manifest

    def say(name: str, text: str) -> None:
        typer.echo(f"{name:<14}{text}")

    image, text, source = manifest["autoencoder"], manifest["text_encoder"], manifest["source"]
    say("rows", f"{len(opened):,} in {len(manifest['chunks'])} chunks")
    say("splits", ", ".join(f"{name} {len(split):,}" for name, split in opened.splits.items()))
    say("source", f"{source['kind']} {source.get('path', source.get('level', ''))}")
    for size in opened.sizes:
        shape = " x ".join(map(str, opened.latent_shape(size)))
        say(f"{size} px", f"latents {shape}, {manifest['latent_dtype']}")
    say("autoencoder", f"{_named(image)}, {image['spatial_factor']:.5g} px a cell")
    pooled = f" and pooled {text['pooled']}" if text.get("pooled") else ""
    say(
        "text encoder",
        f"{_named(text)}, width {text['width']}{pooled}, {_PADDINGS[text['pad']]}, "
        f"at most {text['max_tokens']}",
    )
    total = 0
    for column, size_bytes in sorted(opened.bytes_by_column().items()):
        total += size_bytes
        say(column, f"{size_bytes / max(1, len(opened)):,.0f} bytes a sample")
    for name in opened.text_sets:
        for title, line in _text_lines(opened, name):
            say(title, line)
    say("in all", f"{total / max(1, len(opened)):,.0f} bytes a sample, {total / 2**20:,.1f} MiB")
    skipped = ", ".join(f"{count} {reason}" for reason, count in manifest["skipped"].items())
    say("left out", skipped or "nothing")
    if manifest["cut"].get("captions"):
        say("cut", f"{manifest['cut']['tokens']} tokens of {manifest['cut']['captions']} captions")
    if opened.has_flips:
        say("mirrored", f"{manifest['mirrored']:,} of {len(opened):,} images")
    for title, line in _work_lines(manifest):
        say(title, line)


@store.command()
def verify(path: Place) -> None:
    """Compare every file with its SHA-256; where some differ, name each with one cure, and exit with 2.

    Files found whole are remembered beside the manifest: training checks them again only when they change.
    """
    from shoestring.data.store import Store

    opened = Store.open(path)
    with _bar("verifying") as tell_progress:
        found = opened.verify(tell_progress, lambda line: typer.echo(line, err=True))
    for name in found.unexpected:
        typer.echo(f"note: {path}/{name} is no part of the store; nothing reads it.", err=True)
    typer.echo(f"{path}: all {found.files:,} files match their SHA-256.")


@store.command()
def copy(
    source: Place, out: Annotated[str, typer.Argument(help="Folder for the copy, on this machine.")]
) -> None:
    """Copy a store from a folder or URL, checking every file; what stopped goes on when run again."""
    from shoestring.data.copying import copy_store

    with _bar("copying") as tell_progress:
        copied = copy_store(source, out, tell_progress)
    size = sum(copied.bytes_by_column().values())
    typer.echo(f"{out}: {len(copied):,} rows, {size / 1e9:,.2f} GB, every file checked.")


@contextmanager
def _bar(doing: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar of files on stderr, gone when done."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(doing, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _text_lines(opened: Store, name: str) -> Iterator[tuple[str, str]]:
    """A set of captions: how long, what its tokens take beside padded float16, how exact they are."""
    of, rows = opened.text_sets[name], max(1, len(opened))
    said = opened.manifest if of.tokens == "text" else opened.manifest["added"][of.tokens]
    figures = said.get("text_measured")
    if figures is None:  # encoded by an earlier version
        return
    captions, limit, error = figures["captions"] / rows, of.encoder["max_tokens"], figures["error"]
    padded, rest = captions * limit * of.encoder["width"] * 2, error["without_large"]
    tokens = figures["tokens"] / max(1, figures["captions"])
    yield (
        "captions",
        f"{name}: {captions:,.1f} a sample, {tokens:,.1f} tokens each of {limit}, {_named(of.encoder)}",
    )
    yield (
        "  tokens",
        f"{of.dtype}: {opened.bytes_by_column()[of.tokens] / rows:,.0f} bytes a sample; "
        f"padded float16 would take {padded:,.0f}",
    )
    yield (
        "  error",
        f"1 - cos {error['mean']:.1e} on average, {error['largest']:.1e} at most; without the 8 largest "
        f"channels {rest['mean']:.1e} and {rest['largest']:.1e} (of {error['tokens']:,} tokens)",
    )


def _work_lines(manifest: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What encoding took: of each worker and device, over all its starts."""
    added = manifest.get("added", {})
    for title, said in [("encoding", manifest), *((f"  {name}", said) for name, said in added.items())]:
        for each in said.get("work", ()):
            yield (
                title,
                f"worker {each['worker']} on {each['device']}: {each['rows']:,} rows in "
                f"{each['seconds']:,.1f} s ({each['rows'] / max(each['seconds'], 1e-9):,.0f} rows/s)",
            )


def _named(encoder: Mapping[str, object]) -> str:
    revision = f"@{encoder['revision']}" if encoder["revision"] else ""
    return f"{encoder['id']}{revision} ({encoder['class']})"
