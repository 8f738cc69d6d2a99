"""`shoestring store`: look at a store and check it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

store = typer.Typer(help="Look at a store and check it.", no_args_is_help=True)

Place = Annotated[Path, typer.Argument(help="Folder of the store.")]


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
    say("autoencoder", f"{_named(image)}, {image['spatial_factor']} px a cell")
    padding = "padded by the encoder" if text["pad"] == "encoder" else "real tokens only"
    say("text encoder", _named(text) + f", width {text['width']}, {padding}, at most {text['max_tokens']}")
    total = 0
    for column, size_bytes in sorted(opened.bytes_by_column().items()):
        total += size_bytes
        say(column, f"{size_bytes / max(1, len(opened)):,.0f} bytes a sample")
    say("in all", f"{total / max(1, len(opened)):,.0f} bytes a sample, {total / 2**20:,.1f} MiB")
    skipped = ", ".join(f"{count} {reason}" for reason, count in manifest["skipped"].items())
    say("left out", skipped or "nothing")
    if manifest["cut"].get("captions"):
        say("cut", f"{manifest['cut']['tokens']} tokens of {manifest['cut']['captions']} captions")
    if opened.has_flips:
        say("mirrored", f"{manifest['mirrored']:,} of {len(opened):,} images")


@store.command()
def verify(path: Place) -> None:
    """Compare every file with its SHA-256; exit code 2 and the damaged files' names where one differs."""
    from rich.console import Console
    from rich.progress import Progress

    from shoestring.data.store import Store

    opened = Store.open(path)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("verifying", total=None)
        count = opened.verify(lambda done, total: bar.update(task, completed=done, total=total))
    typer.echo(f"{path}: all {count:,} files match their SHA-256.")


def _named(encoder: dict[str, object]) -> str:
    revision = f"@{encoder['revision']}" if encoder["revision"] else ""
    return f"{encoder['id']}{revision} ({encoder['class']})"
