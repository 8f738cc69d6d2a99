"""`shoestring sample`: pictures from prompts."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shoestring.errors import CheckpointError, RecipeError

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    from shoestring.pipelines.generate import Picture


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
    size: Annotated[
        str | None,
        typer.Option(metavar="PX", help="Height x width, such as 1216x832, or both at once: 768."),
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(
            help="edm_heun, edm_euler, edm_dpm; flow_euler, flow_heun; U-Net: euler, ddim, dpm++, lcm, tcd."
        ),
    ] = None,
    tiny_decoder: Annotated[
        str | None,
        typer.Option(
            metavar="PATH_OR_ID",
            help="An AutoencoderTiny that decodes in the autoencoder's place: faster, coarser.",
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Of a U-Net: draw within this much memory, such as 4GiB, one stage after the other.",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    batch: Annotated[int, typer.Option(min=1, help="Pictures made at once.")] = 16,
) -> None:
    """Draw prompts: one PNG each, with prompt, seed and settings in its metadata, and a grid of all."""
    check_numbers(steps, guidance)

    from shoestring.pipelines.generate import save_grid, save_png
    from shoestring.runtime import pick_device

    chosen = str(pick_device(device))
    repeated = [prompt for prompt in prompts for _ in range(count)]
    seeds = [seed + i for _ in prompts for i in range(count)]
    sides = None if size is None else _sides(size)
    order = _Order(model, repeated, seeds, batch, steps, guidance, sides, scheduler, tiny_decoder, chosen)
    pictures = _whole(order) if memory is None else _staged(order, memory)
    images = []
    for number, picture in enumerate(pictures):
        path = out / f"{number:05d}.png"
        save_png(picture, path)
        images.append(picture.image)
        typer.echo(f"{path}  seed {picture.seed}  {picture.prompt}")
    save_grid(images, out / "grid.png", columns=count if count > 1 else None)
    typer.echo(f"{out / 'grid.png'}  {len(images)} pictures")


@dataclass(frozen=True)
class _Order:
    """What is to be drawn, of what, how and where: a prompt and a seed for each picture."""

    model: str
    prompts: list[str]
    seeds: list[int]
    batch: int
    steps: int | None
    guidance: float | None
    size: tuple[int, int] | None
    scheduler: str | None
    tiny_decoder: str | None
    device: str


def _whole(order: _Order) -> Iterator[Picture]:
    """Pictures from the pipeline with all its parts in memory; tells of prompts that are cut."""
    from shoestring.pipelines.generate import generate, warn_cut_prompts
    from shoestring.pipelines.load import load
    from shoestring.pipelines.parts import use_scheduler, use_tiny_decoder

    pipeline = load(order.model)
    _check_draws(order.model, pipeline)
    if order.scheduler is not None:
        use_scheduler(pipeline, order.scheduler)
    if order.tiny_decoder is not None:
        use_tiny_decoder(pipeline, order.tiny_decoder)
    pipeline.to(order.device)
    for line in warn_cut_prompts(pipeline, list(dict.fromkeys(order.prompts))):
        typer.echo(line, err=True)
    return generate(
        pipeline,
        order.prompts,
        order.seeds,
        steps=order.steps,
        guidance=order.guidance,
        size=order.size,
        batch_size=order.batch,
    )


def _staged(order: _Order, memory: str) -> Iterator[Picture]:
    """Pictures within a budget: tells the plan, then each stage is loaded in its turn."""
    from shoestring.pipelines.memory import parse_size
    from shoestring.pipelines.staged import StagedPipeline

    budget = parse_size(memory)
    pipeline = StagedPipeline(order.model, scheduler=order.scheduler, tiny_decoder=order.tiny_decoder)
    most = min(order.batch, len(order.prompts))
    plan = pipeline.plan(budget, device=order.device, batch=most, guidance=order.guidance, size=order.size)
    pictures = pipeline.generate(
        plan,
        order.prompts,
        order.seeds,
        steps=order.steps,
        guidance=order.guidance,
        tell=lambda line: typer.echo(line, err=True),
    )
    typer.echo(str(plan))
    return pictures


def _sides(text: str) -> tuple[int, int]:
    """(height, width) of "1216x832" or "768"; raises `RecipeError` for other text."""
    match = re.fullmatch(r"(\d{1,6})(?:\s*x\s*(\d{1,6}))?", text.strip())
    if match is None:
        raise RecipeError(f"--size {text}: must be pixels, height x width, such as 1216x832, or one number.")
    return int(match[1]), int(match[2] or match[1])


def _check_draws(model: str, pipeline: DiffusionPipeline) -> None:
    """Raise where a pipeline draws no prompts."""
    from shoestring.pipelines.defaults import draws_prompts
    from shoestring.pipelines.wuerstchen_decoder import WuerstchenDecoderPipeline
    from shoestring.pipelines.wuerstchen_prior import WuerstchenPriorPipeline

    if isinstance(pipeline, (WuerstchenPriorPipeline, WuerstchenDecoderPipeline)):
        raise CheckpointError(
            f"{model}: a {type(pipeline).__name__}, one stage of a cascade, which draws no prompt by itself. "
            "Give a whole cascade, such as a run of its stage c."
        )
    if not draws_prompts(pipeline):
        raise CheckpointError(
            f"{model}: a {type(pipeline).__name__}, which `shoestring sample` cannot prompt. "
            "Use it in Python: shoestring.load(...) gives the pipeline."
        )


def check_numbers(steps: int | None, guidance: float | None) -> None:
    """Raise `RecipeError` for settings with which nothing can be drawn."""
    if steps is not None and steps < 1:
        raise RecipeError(f"--steps {steps}: must be at least 1.")
    if guidance is not None and not 0 <= guidance < math.inf:
        raise RecipeError(f"--guidance {guidance}: must be a number from 0; 1 is none.")
