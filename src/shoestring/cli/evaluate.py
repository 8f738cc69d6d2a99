"""`shoestring evaluate`: what a run has learned, measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, such as runs/demo.")],
    prompts: Annotated[int | None, typer.Option(min=1, help="Held-out prompts a split.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Pictures of each prompt.")] = None,
    steps: Annotated[int | None, typer.Option(help="Sampler steps, at least 1.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance; 1 is none.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
) -> None:
    """Measure a run: scene accuracy where its data are scenes, and loss on held-out images in any case."""
    from shoestring.cli.sample import check_numbers

    check_numbers(steps, guidance)

    from shoestring.measure import measure_run
    from shoestring.runtime import pick_device
    from shoestring.storage import RunFolder
    from shoestring.training.report import write_report

    opened = RunFolder.open(run)
    rows = measure_run(
        opened,
        device=pick_device(device),
        prompts=prompts,
        seeds=seeds,
        steps=steps,
        guidance=guidance,
        log=lambda text: typer.echo(text, err=True),
    )
    for row in rows:
        value = "-" if row["value"] is None else f"{row['value']:.4f}"
        interval = "" if row["low"] is None else f"  [{row['low']:.4f}, {row['high']:.4f}]"
        typer.echo(
            f"{row['metric']:24} {row['split']:14} {row['facet']:14} {value}{interval}  "
            f"n {row['n']}  {row['status']}"
        )
    typer.echo(f"Rows in {opened.evaluation}, report in {write_report(opened)}.")
