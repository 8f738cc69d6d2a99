"""Pictures from a pipeline, each with its own seed, and PNG files that say how they were made."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from shoestring.errors import RecipeError
from shoestring.models.quiet import muted
from shoestring.models.sizes import check_size
from shoestring.pipelines.defaults import argument_names, sampling_of, scheduler_of
from shoestring.pipelines.prompts import logger
from shoestring.sampling.grid import grid
from shoestring.sampling.schedulers import check_steps
from shoestring.storage import atomic_path

CRISP_SIDE = 128
_TOKENIZERS = "transformers.tokenization_utils_base"
"""Which logs when a prompt is longer than the model takes."""


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
    size: tuple[int, int] | None = None,
    batch_size: int = 64,
) -> Iterator[Picture]:
    """One picture for each (prompt, seed), in order.

    Each is drawn with a generator of its own, so the noise of a picture does not depend on its neighbours.
    `steps`, `guidance` and `size` (height, width in pixels) not given are the pipeline's own; raises
    `RecipeError` for a size or a number of steps that it cannot draw with. Prompts that are cut are not told
    here, since previews would tell it each time: see `warn_cut_prompts`.
    """
    own = sampling_of(pipeline)
    steps = own.steps if steps is None else steps
    guidance = own.guidance if guidance is None else guidance
    how: dict[str, float] = dict(zip(argument_names(pipeline), (steps, guidance), strict=True))
    if size is not None:
        check_size(*size, _size_multiple(pipeline))
        how |= {"height": size[0], "width": size[1]}
    scheduler = scheduler_of(pipeline)
    check_steps(scheduler, steps)
    pipeline.set_progress_bar_config(disable=True)
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds[part]]
        with cuts_untold(pipeline):
            images = pipeline(list(prompts[part]), generator=generators, **how).images
        for image, prompt, seed in zip(images, prompts[part], seeds[part], strict=True):
            yield Picture(image, prompt, seed, steps, guidance, type(scheduler).__name__)


@contextmanager
def cuts_untold(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Within: nothing is logged of prompts that are cut, which `warn_cut_prompts` tells once."""
    with muted(logger.name), muted(type(pipeline).__module__, about="truncated"), muted(_TOKENIZERS):
        yield


def _size_multiple(pipeline: DiffusionPipeline) -> int:
    """What sides must be multiples of, in pixels."""
    for name in ("size_multiple", "vae_scale_factor"):  # ours; diffusers'
        if (multiple := getattr(pipeline, name, None)) is not None:
            return int(multiple)
    raise RecipeError(
        f"--size: cannot be given to a {type(pipeline).__name__}, whose sizes are not known here. "
        "Leave it out."
    )


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
    if hasattr(pipeline, "cut_prompts"):
        lines = pipeline.cut_prompts(prompts)
    else:
        lines = _cut_by_tokenizers(pipeline, prompts)
    return [f"warning: {line}" for line in lines]


def _cut_by_tokenizers(pipeline: DiffusionPipeline, prompts: Sequence[str]) -> list[str]:
    """Of a stock pipeline: what none of its text encoders sees, since the one that takes most stops there."""
    tokenizers = [
        part for name, part in pipeline.components.items() if name.startswith("tokenizer") and callable(part)
    ]
    lines = []
    for prompt in prompts if tokenizers else ():
        with muted(_TOKENIZERS):
            cut = [len(each(prompt)["input_ids"]) - each.model_max_length for each in tokenizers]
        place = min(range(len(cut)), key=cut.__getitem__)
        if cut[place] > 0:
            lines.append(
                f"prompt too long for the text encoder: the last {cut[place]} of its tokens are ignored "
                f"(it takes {tokenizers[place].model_max_length}): {prompt}"
            )
    return lines
