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
    stage: Annotated[
        str | None, typer.Option(help="Train this stage alone, of a recipe that has several.")
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

    A recipe with stages is trained stage by stage; each is a run of its own, NAME-STAGE.
    On several processes: torchrun --nproc-per-node N -m shoestring train RECIPE (docs/cluster.md).
    """
    from shoestring.processes import join

    sets = [*(set_ or ()), *([f"train.dtype={dtype}"] if dtype is not None else [])]
    with join(device) as (world, own_device):
        chosen = stages(recipe, sets, stage, name, runs)
        if dry_run:
            if world.is_main:
                for loaded, _ in chosen.values():
                    _print_plan(recipe, loaded, runs, own_device)
            return
        for loaded, run in chosen.values():
            check_earlier(recipe, loaded, runs)
            goes_on = resume and (len(chosen) == 1 or (run / "recipe.yaml").is_file())
            if not _train(loaded, run, own_device, goes_on, world):
                raise typer.Exit(INTERRUPTED)


def _print_plan(recipe: str, loaded: Recipe, runs: Path, device: str) -> None:
    from shoestring import estimate
    from shoestring.errors import CheckpointError
    from shoestring.recipes.load import dump
    from shoestring.runtime import pick_device

    typer.echo(dump(loaded), nl=False)
    try:
        check_earlier(recipe, loaded, runs)
        lines = estimate.cost_lines(loaded, pick_device(device))
    except CheckpointError as error:  # another network that this one needs
        lines = [f"cost: unknown. {error}"]
    for line in lines:
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


def stages(
    recipe: str, sets: list[str], stage: str | None, name: str | None, runs: Path
) -> dict[str, tuple[Recipe, Path]]:
    """Each stage's resolved recipe and run folder, in order; one without a name where there are no stages.

    A run folder in place of a recipe means its own recipe. Raises `RecipeError` for a stage there is not.
    """
    from shoestring.errors import RecipeError
    from shoestring.recipes.load import load_stages
    from shoestring.recipes.messages import did_you_mean

    if name is not None:
        sets = [*sets, f"name={name}"]
    folder = Path(recipe)
    is_run = (folder / "recipe.yaml").is_file()
    loaded = load_stages(folder / "recipe.yaml" if is_run else recipe, sets, runs)
    if stage is not None and stage not in loaded:
        said = did_you_mean(stage, loaded) if set(loaded) != {""} else " It has none: leave --stage out."
        raise RecipeError(f"--stage {stage}: {recipe} has no such stage.{said}")
    return {
        each: (found, folder if is_run and name is None else runs / found.name)
        for each, found in loaded.items()
        if stage in {None, each}
    }


def check_earlier(recipe: str, loaded: Recipe, runs: Path) -> None:
    """Raise `CheckpointError` where a stage needs an earlier one that has not been trained."""
    from shoestring.errors import CheckpointError

    needed = [loaded.data.autoencoder, getattr(loaded.model, "vqgan", ""), loaded.teacher or ""]
    for each in needed:
        run = Path(each)
        prefix = f"{loaded.name.rpartition('-')[0]}-"
        if run.parent == runs and run.name.startswith(prefix) and not (run / "pipeline").is_dir():
            stage = run.name.removeprefix(prefix)
            whole = "RECIPE" if (Path(recipe) / "recipe.yaml").is_file() else recipe
            raise CheckpointError(
                f"{loaded.name}: needs stage {stage}, which has no weights yet ({run}/pipeline). "
                f"Train it first: shoestring train {whole} --stage {stage}"
            )
