"""`shoestring report`: a run's curves, pictures, scores and cost as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, such as runs/demo.")],
) -> None:
    """Write RUN/report.html: curves, pictures, scores, cost. It needs no other file and no network."""
    from shoestring.storage import RunFolder
    from shoestring.training.report import write_report

    typer.echo(f"report: {write_report(RunFolder.open(run))}")
