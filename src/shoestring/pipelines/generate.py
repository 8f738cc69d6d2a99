"""Pictures from a pipeline, each with its own seed, and PNG files that say how they were made."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from shoestring.models.quiet import muted
from shoestring.pipelines.prompts import logger
from shoestring.sampling.grid import grid
from shoestring.storage import atomic_path

CRISP_SIDE = 128


@dataclass(frozen=True)
class Picture:
    """A picture and all that is needed to make it again."""

    image: Image.Image
    prompt: str
    seed: int
    steps: int
    guidance: float
    scheduler: str

    def settings(self) -> dict[str, object]:
        """Prompt, seed, steps, guidance and scheduler, as written into the PNG."""
        names = ("prompt", "seed", "steps", "guidance", "scheduler")
        return {name: getattr(self, name) for name in names}


def generate(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int | None = None,
    guidance: float | None = None,
    batch_size: int = 64,
) -> Iterator[Picture]:
    """One picture for each (prompt, seed), in order.

    Each is drawn with a generator of its own, so the noise of a picture does not depend on its neighbours.
    Prompts that are cut are not told here, since previews would tell it each time: see `warn_cut_prompts`.
    """
    steps = pipeline.config.default_steps if steps is None else steps
    guidance = pipeline.config.default_guidance if guidance is None else guidance
    scheduler = type(_sampler(pipeline)).__name__
    pipeline.set_progress_bar_config(disable=True)
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds[part]]
        with muted(logger.name):
            images = pipeline(
                list(prompts[part]),
                generator=generators,
                **_how(pipeline, steps, guidance),
            ).images
        for image, prompt, seed in zip(images, prompts[part], seeds[part], strict=True):
            yield Picture(image, prompt, seed, steps, guidance, scheduler)


def _how(pipeline: DiffusionPipeline, steps: int, guidance: float) -> dict[str, Any]:
    """Steps and guidance as a call's arguments; a cascade's are those of its first stage."""
    names = ("num_inference_steps", "guidance_scale")
    if _is_cascade(pipeline):
        names = ("prior_num_inference_steps", "prior_guidance_scale")
    return dict(zip(names, (steps, guidance), strict=True))


def _sampler(pipeline: DiffusionPipeline) -> Any:
    return pipeline.prior_scheduler if _is_cascade(pipeline) else pipeline.scheduler


def _is_cascade(pipeline: DiffusionPipeline) -> bool:
    """Whether a first stage makes what a second one decodes."""
    return "prior_scheduler" in pipeline.components


def save_png(picture: Picture, path: Path) -> None:
    """Write a PNG with `prompt` and `shoestring` (all settings as JSON) in its text chunks."""
    info = PngInfo()
    info.add_itxt("prompt", picture.prompt)
    info.add_itxt("shoestring", json.dumps(picture.settings(), ensure_ascii=False))
    with atomic_path(path) as aside:
        picture.image.save(aside, format="png", pnginfo=info)


def save_grid(images: Sequence[Image.Image], path: Path, columns: int | None = None) -> None:
    """Write pictures as one PNG; small ones are enlarged by whole pixels so that they can be seen."""
    scale = max(1, CRISP_SIDE // images[0].width)
    with atomic_path(path) as aside:
        grid(images, columns, gap=2 * scale, scale=scale).save(aside, format="png")


def warn_cut_prompts(pipeline: DiffusionPipeline, prompts: Sequence[str]) -> list[str]:
    """A line for each prompt that is longer than the text encoder takes."""
    return [f"warning: {line}" for line in pipeline.cut_prompts(prompts)]
