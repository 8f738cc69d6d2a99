"""`shoestring average`: one pipeline from the weights of several runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def average(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Runs or pipeline folders of one kind.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the pipeline to be made.")],
    weight: Annotated[
        list[float] | None, typer.Option(help="Share of each run, in order, 1 in all; equal by default.")
    ] = None,
) -> None:
    """Average the weights of runs of one recipe, as the published Würstchen Stage C is of two."""
    from shoestring.build.average import average as average_runs
    from shoestring.errors import OutputError

    if out.exists():
        raise OutputError(f"--out {out}: is there already. Choose another folder, or remove it.")
    parts = average_runs(runs, out, weight)
    said = f"{', '.join(parts)} averaged over {len(runs)} runs" if parts else "the runs have the same weights"
    draws = {"transformer", "prior", "prior_prior"} & {each.name for each in out.iterdir()}
    typer.echo(f"{out}: {said}." + (f" Next: shoestring sample {out} PROMPT" if draws else ""))
