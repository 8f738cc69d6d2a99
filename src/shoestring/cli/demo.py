"""`shoestring demo`: the whole path on a CPU in minutes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

INTERRUPTED = 130


def demo(
    minutes: Annotated[
        float | None,
        typer.Option(min=0.05, help="Train for about so long: speed is measured, then images are fixed."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe.")
    ] = None,
    runs: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs"),
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "cpu",
) -> None:
    """Make scenes, train a small MicroDiT with deferred masking, draw unseen prompts, score them, report.

    A run that was stopped goes on; one that is finished is only measured again.
    """
    from shoestring import build, estimate
    from shoestring.errors import RecipeError
    from shoestring.measure import measure_run
    from shoestring.recipes.load import load_recipe
    from shoestring.runtime import pick_device
    from shoestring.storage import RunFolder
    from shoestring.training.report import write_report

    started = time.perf_counter()
    chosen = pick_device(device)
    run = RunFolder(runs / (name or (f"demo-{minutes:g}min" if minutes else "demo")))
    resume = run.recipe.is_file()
    sets = [*(set_ or ()), f"name={name if name is not None else run.root.name}"]
    if resume and minutes:
        sets = []  # images that were fitted into minutes stay as they are
    recipe = load_recipe(run.recipe if resume else "demo", sets)
    if recipe.data.scenes is None:
        raise RecipeError("--set data.store: the demo is of scenes. Use shoestring train demo --set ...")
    if minutes and not resume:
        recipe = estimate.fitted(recipe, minutes, chosen, _say)
    store = build.open_store(recipe, device=chosen, log=_say)
    with build.claimed(run):
        training = build.make_training(recipe, run, store, device=chosen, resume=resume, log=_say)
        if training.finished:
            _say(f"{run.root} is trained already; measuring it again. Remove the folder to train anew.")
        elif not training.train():
            _say(f"Stopped; a checkpoint is saved. Run the same command again to go on with {run.root}.")
            raise typer.Exit(INTERRUPTED)
    rows = measure_run(run, device=chosen, log=_say)
    report = write_report(run)
    score = {row["split"]: row for row in rows if (row["metric"], row["facet"]) == ("scene_accuracy", "all")}
    unseen, pairs = score["unseen_scenes"], score["unseen_pairs"]
    spent = (time.perf_counter() - started) / 60
    typer.echo(
        f"scene accuracy {unseen['value']:.3f} on {unseen['n']} pictures of unseen scenes "
        f"({pairs['value']:.3f} of unseen pairs), {training.progress.images:,} images seen, "
        f"{spent:.1f} minutes, report: {report}"
    )


def _say(text: str) -> None:
    typer.echo(text, err=True)
