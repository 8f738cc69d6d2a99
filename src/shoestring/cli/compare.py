"""`shoestring compare`: several runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN ...", help="Run folders, two to eight.")],
    out: Annotated[Path, typer.Option(help="The HTML file to write.")] = Path("compare.html"),
) -> None:
    """Compare runs: curves in the same axes and what differs, in one HTML file; the table here too."""
    from shoestring.training.compare import read_runs, text_table, write_comparison

    read = read_runs(runs)
    written = write_comparison(read, out)
    typer.echo(f"{text_table(read)}\n\nCurves: {written}")
