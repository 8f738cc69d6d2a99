"""`shoestring train`: a recipe becomes a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from shoestring.processes import World
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
    """Train by a recipe. Ctrl-C saves a checkpoint; `--resume` goes on from it exactly.

    On several processes: torchrun --nproc-per-node N -m shoestring train RECIPE (docs/cluster.md).
    """
    from shoestring.processes import join

    sets = [*(set_ or ()), *([f"train.dtype={dtype}"] if dtype is not None else [])]
    with join(device) as (world, own_device):
        loaded, run = _recipe_and_run(recipe, sets, name, runs)
        if dry_run:
            if world.is_main:
                _print_plan(loaded, own_device)
            return
        finished = _train(loaded, run, own_device, resume, world)
    if not finished:
        raise typer.Exit(INTERRUPTED)


def _print_plan(recipe: Recipe, device: str) -> None:
    from shoestring import estimate
    from shoestring.recipes.load import dump
    from shoestring.runtime import pick_device

    typer.echo(dump(recipe), nl=False)
    for line in estimate.cost_lines(recipe, pick_device(device)):
        typer.echo(f"# {line}")


def _train(recipe: Recipe, folder: Path, device: str, resume: bool, world: World) -> bool:
    """Train to the end and write the report; False when stopped on request."""
    from shoestring import build
    from shoestring.runtime import pick_device
    from shoestring.storage import RunFolder
    from shoestring.training.report import write_report

    def say(text: str) -> None:
        if world.is_main:
            typer.echo(text, err=True)

    run, chosen = RunFolder(folder), pick_device(device)
    if world.is_main:
        build.check_claim(recipe, run, resume)
    store = build.open_store(recipe, device=chosen, log=say, world=world)
    with build.claimed(run, world):
        training = build.make_training(recipe, run, store, device=chosen, resume=resume, log=say, world=world)
        images = training.progress.images
        if training.finished:
            if world.is_main:
                typer.echo(f"{folder} is finished: {images:,} images.")
                if not run.report.is_file():  # it was killed just before
                    write_report(run)
            return True
        finished = training.train()
        images = training.progress.images
        if not finished:
            say(
                f"Stopped after {images:,} images; a checkpoint is saved. "
                f"Go on with: shoestring train {folder} --resume"
            )
        elif world.is_main:
            report = write_report(run)
            typer.echo(f"{folder}: {images:,} images. Pipeline in {folder}/pipeline, report in {report}.")
    return finished


def _recipe_and_run(recipe: str, sets: list[str], name: str | None, runs: Path) -> tuple[Recipe, Path]:
    """The resolved recipe and the run's folder; a run folder in place of a recipe means its own recipe."""
    from shoestring.recipes.load import load_recipe

    if name is not None:
        sets = [*sets, f"name={name}"]
    folder = Path(recipe)
    if (folder / "recipe.yaml").is_file():
        loaded = load_recipe(folder / "recipe.yaml", sets)
        return loaded, runs / loaded.name if name is not None else folder
    loaded = load_recipe(recipe, sets)
    return loaded, runs / loaded.name
