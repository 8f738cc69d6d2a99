"""`shoestring sample`: pictures from prompts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shoestring.errors import CheckpointError, RecipeError

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline


def sample(
    model: Annotated[
        str, typer.Argument(metavar="RUN_OR_FOLDER", help="A run, a pipeline folder or a hub id.")
    ],
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="What to draw; several allowed.")],
    out: Annotated[Path, typer.Option(help="Folder for the pictures and their grid.")] = Path("samples"),
    seed: Annotated[
        int, typer.Option(min=0, max=2**62, help="Seed of the first picture; the next ones count up.")
    ] = 0,
    count: Annotated[int, typer.Option(min=1, help="Pictures of each prompt.")] = 1,
    steps: Annotated[int | None, typer.Option(help="Sampler steps, at least 1.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance; 1 is none.")] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="edm_heun, edm_euler, edm_dpm; flow_euler, flow_heun.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    batch: Annotated[int, typer.Option(min=1, help="Pictures made at once.")] = 16,
) -> None:
    """Draw prompts: one PNG each, with prompt, seed and settings in its metadata, and a grid of all."""
    check_numbers(steps, guidance)

    from shoestring.pipelines.generate import generate, save_grid, save_png, warn_cut_prompts
    from shoestring.pipelines.load import load
    from shoestring.runtime import pick_device
    from shoestring.sampling.schedulers import make_scheduler

    chosen = pick_device(device)
    pipeline = load(model).to(chosen)
    _check_draws(model, pipeline, scheduler)
    if scheduler is not None:
        trained = pipeline.scheduler.config
        pipeline.scheduler = make_scheduler(
            scheduler,
            prediction=pipeline.config.prediction,
            sigma_data=getattr(trained, "sigma_data", None),
            shift=getattr(trained, "shift", 1.0),
        )
    for line in warn_cut_prompts(pipeline, prompts):
        typer.echo(line, err=True)
    repeated = [prompt for prompt in prompts for _ in range(count)]
    seeds = [seed + i for _ in prompts for i in range(count)]
    images = []
    pictures = generate(pipeline, repeated, seeds, steps=steps, guidance=guidance, batch_size=batch)
    for number, picture in enumerate(pictures):
        path = out / f"{number:05d}.png"
        save_png(picture, path)
        images.append(picture.image)
        typer.echo(f"{path}  seed {picture.seed}  {picture.prompt}")
    save_grid(images, out / "grid.png", columns=count if count > 1 else None)
    typer.echo(f"{out / 'grid.png'}  {len(images)} pictures")


def _check_draws(model: str, pipeline: DiffusionPipeline, scheduler: str | None) -> None:
    """Raise where a pipeline draws no prompts, or has no use for another scheduler."""
    from shoestring.pipelines.wuerstchen_decoder import WuerstchenDecoderPipeline
    from shoestring.pipelines.wuerstchen_prior import WuerstchenPriorPipeline

    if isinstance(pipeline, (WuerstchenPriorPipeline, WuerstchenDecoderPipeline)):
        raise CheckpointError(
            f"{model}: a {type(pipeline).__name__}, one stage of a cascade, which draws no prompt by itself. "
            "Give a whole cascade, such as a run of its stage c."
        )
    if not hasattr(pipeline.config, "default_steps"):
        raise CheckpointError(
            f"{model}: a {type(pipeline).__name__}, which `shoestring sample` cannot prompt. "
            "Use it in Python: shoestring.load(...) gives the pipeline."
        )
    if scheduler is not None and "prior_scheduler" in pipeline.components:
        raise RecipeError("--scheduler: has no effect on a Würstchen cascade. Leave it out.")


def check_numbers(steps: int | None, guidance: float | None) -> None:
    """Raise `RecipeError` for settings with which nothing can be drawn."""
    if steps is not None and steps < 1:
        raise RecipeError(f"--steps {steps}: must be at least 1.")
    if guidance is not None and not 0 <= guidance < math.inf:
        raise RecipeError(f"--guidance {guidance}: must be a number from 0; 1 is none.")
