"""`shoestring demo`: the whole path on a CPU in minutes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch

    from shoestring.interfaces import MetricRow
    from shoestring.recipes.schema import Recipe
    from shoestring.storage import RunFolder

INTERRUPTED = 130


class DemoSystem(StrEnum):
    """What can be shown."""

    microdit = "microdit"
    wuerstchen = "wuerstchen"
    koala = "koala"


RECIPES = {
    DemoSystem.microdit: "demo",
    DemoSystem.wuerstchen: "wuerstchen-demo",
    DemoSystem.koala: "koala-demo",
}

SHARES = {"": 1.0, "a": 0.2, "b": 0.4, "c": 0.4, "teacher": 0.6, "task": 0.2, "features": 0.2}
"""How the minutes asked for are spread over a recipe's stages."""


def demo(
    system: Annotated[DemoSystem, typer.Option(help="What to train.")] = DemoSystem.microdit,
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
    """Make scenes, train on them, draw unseen prompts, score them, report.

    `--system microdit` trains a small MicroDiT with deferred masking; `--system wuerstchen` the three stages
    of a small cascade; `--system koala` a U-Net, which is then cut to half and distilled twice: by its task
    alone, and with the teacher's features. Each stage is a run of its own. A run that was stopped goes on;
    one that is finished is only measured again.
    """
    from shoestring.errors import RecipeError
    from shoestring.recipes.load import load_recipe, load_stages
    from shoestring.runtime import pick_device
    from shoestring.storage import RunFolder
    from shoestring.training.compare import read_runs, write_comparison

    started = time.perf_counter()
    chosen = pick_device(device)
    recipe = RECIPES[system]
    named = name or (f"{recipe}-{minutes:g}min" if minutes else recipe)
    sets = [*(set_ or ()), f"name={named}"]
    students = []
    for stage, loaded in load_stages(recipe, sets, runs).items():
        if loaded.data.scenes is None:
            told = f"the demo is of scenes. Use shoestring train {recipe} --set ..."
            raise RecipeError(f"--set data.store: {told}")
        run = RunFolder(runs / loaded.name)
        if run.recipe.is_file() and minutes:  # images that were fitted into minutes stay as they are
            loaded = load_recipe(run.recipe)
        fit = minutes and minutes * SHARES[stage]
        images, rows = _run(loaded, run, chosen, fit)
        spent = (time.perf_counter() - started) / 60
        typer.echo(f"{_scores(rows)}, {images:,} images seen, {spent:.1f} minutes, report: {run.report}")
        students += [run.root] if loaded.teacher else []
    if len(students) > 1:
        page = write_comparison(read_runs(students), runs / f"{named}.html")
        typer.echo(f"side by side: {page}")


def _run(
    recipe: Recipe, run: RunFolder, device: torch.device, minutes: float | None
) -> tuple[int, Sequence[MetricRow]]:
    """Train (or go on, or leave as it is), measure, report; images seen and the measured rows."""
    from shoestring import build, estimate
    from shoestring.measure import measure_run
    from shoestring.training.report import write_report

    resume = run.recipe.is_file()
    if minutes and not resume:
        recipe = estimate.fitted(recipe, minutes, device, _say)
    store = build.open_store(recipe, device=device, log=_say)
    with build.claimed(run):
        training = build.make_training(recipe, run, store, device=device, resume=resume, log=_say)
        if training.finished:
            _say(f"{run.root} is trained already; measuring it again. Remove the folder to train anew.")
        elif not training.train():
            _say(f"Stopped; a checkpoint is saved. Run the same command again to go on with {run.root}.")
            raise typer.Exit(INTERRUPTED)
    rows = measure_run(run, device=device, log=_say)
    write_report(run)
    return training.progress.images, rows


def _scores(rows: Sequence[MetricRow]) -> str:
    """The headline figures of a run in one line."""
    found = {
        (row["metric"], row["split"]): row
        for row in rows
        if row["facet"] == "all" and row["value"] is not None
    }
    parts = []
    for metric, words in (("scene_accuracy", "pictures"), ("reconstruction_accuracy", "reconstructions")):
        if row := found.get((metric, "unseen_scenes")):
            pairs = found[metric, "unseen_pairs"]
            parts.append(
                f"scene accuracy {row['value']:.3f} on {row['n']} {words} of unseen scenes "
                f"({pairs['value']:.3f} of unseen pairs)"
            )
    errors = [found.get((metric, "unseen_scenes")) for metric in ("teacher_error", "cut_teacher_error")]
    if errors[0] and errors[1]:
        told = f"error to the teacher {errors[0]['value']:.4f} ({errors[1]['value']:.4f} before distillation)"
        parts.append(told)
    for metric, words in (("reconstruction_psnr", "PSNR {:.1f} dB"), ("reconstruction_ssim", "SSIM {:.3f}")):
        if row := found.get((metric, "unseen_scenes")):
            parts.append(words.format(row["value"]))
    spatial, elements = (
        found.get((f"compression_{each}", "unseen_scenes")) for each in ("spatial", "elements")
    )
    if spatial and elements:
        parts.append(
            f"compression {spatial['value']:.3g}:1 along a side, {elements['value']:.3g}:1 in numbers"
        )
    return ", ".join(parts)


def _say(text: str) -> None:
    typer.echo(text, err=True)
