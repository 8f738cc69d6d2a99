"""`shoestring train`: a recipe becomes a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from shoestring.recipes.schema import Recipe

INTERRUPTED = 130


def train(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A built-in recipe, a YAML file, or a run folder.")
    ],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a key, e.g. phases.0.images=50k."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run; the recipe's by default.")] = None,
    runs: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    dtype: Annotated[
        str | None, typer.Option(help="auto, float32 or bfloat16: the same as --set train.dtype=...")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved recipe and its cost; train nothing.")
    ] = False,
) -> None:
    """Train by a recipe. Ctrl-C saves a checkpoint; `--resume` goes on from it exactly."""
    from shoestring import build, estimate
    from shoestring.recipes.load import dump
    from shoestring.runtime import pick_device
    from shoestring.storage import RunFolder

    sets = [*(set_ or ()), *([f"train.dtype={dtype}"] if dtype else [])]
    loaded, run = _recipe_and_run(recipe, sets, name, runs)
    if dry_run:
        typer.echo(dump(loaded), nl=False)
        for line in estimate.cost_lines(loaded, pick_device(device)):
            typer.echo(f"# {line}")
        return
    chosen = pick_device(device)
    build.check_claim(loaded, RunFolder(run), resume)
    store = build.open_store(loaded, device=chosen, log=_say)
    training = build.make_training(loaded, RunFolder(run), store, device=chosen, resume=resume, log=_say)
    if training.finished:
        typer.echo(f"{run} is finished: {training.progress.images:,} images.")
        return
    finished = training.train()
    if not finished:
        typer.echo(
            f"Stopped after {training.progress.images:,} images; a checkpoint is saved. "
            f"Go on with: shoestring train {run} --resume",
            err=True,
        )
        raise typer.Exit(INTERRUPTED)
    from shoestring.training.report import write_report

    report = write_report(RunFolder(run))
    typer.echo(f"{run}: {training.progress.images:,} images. Pipeline in {run}/pipeline, report in {report}.")


def _recipe_and_run(recipe: str, sets: list[str], name: str | None, runs: Path) -> tuple[Recipe, Path]:
    """The resolved recipe and the run's folder; a run folder in place of a recipe means its own recipe."""
    from shoestring.recipes.load import load_recipe

    if name:
        sets = [*sets, f"name={name}"]
    folder = Path(recipe)
    if (folder / "recipe.yaml").is_file():
        loaded = load_recipe(folder / "recipe.yaml", sets)
        return loaded, runs / loaded.name if name else folder
    loaded = load_recipe(recipe, sets)
    return loaded, runs / loaded.name


def _say(text: str) -> None:
    typer.echo(text, err=True)
