"""How many steps and how much guidance a pipeline draws with when nobody says: its own numbers.

Our pipelines keep them in their configuration. The classes of diffusers have no place for them, so beside a
stock pipeline lies `sampling.json`, {"steps": 10, "guidance": 3.5}, which diffusers passes over and
`shoestring.load` attaches; where it is missing, the class's own defaults hold.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from shoestring.errors import CheckpointError
from shoestring.models.quiet import muted
from shoestring.storage import read_json, write_json

SAMPLING = "sampling.json"
IMPORTS = ("transformers.utils.import_utils", "torchvision")
"""What says, as a stock pipeline is imported, that torchvision is missing, which none of ours needs."""
_ATTRIBUTE = "sampling"


@dataclass(frozen=True)
class Sampling:
    """Sampler steps, and the scale of classifier-free guidance (1 is none)."""

    steps: int
    guidance: float


def argument_names(pipeline: DiffusionPipeline) -> tuple[str, str]:
    """What a call's steps and guidance are called; of a cascade, those of its first stage."""
    first = _first_stage(pipeline)
    return f"{first}num_inference_steps", f"{first}guidance_scale"


def scheduler_of(pipeline: DiffusionPipeline) -> Any:
    """The scheduler that those steps are of."""
    return getattr(pipeline, f"{_first_stage(pipeline)}scheduler")


def _first_stage(pipeline: DiffusionPipeline) -> str:
    """What names of a cascade's first stage begin with."""
    return "prior_" if "prior_scheduler" in pipeline.config else ""


def draws_prompts(pipeline: DiffusionPipeline) -> bool:
    """Whether it makes pictures from prompts alone: one of ours, or a stock one of text to image.

    Of the stock ones, those that have steps and guidance, as numbers, and need no picture.
    """
    if hasattr(pipeline.config, "default_steps"):
        return True
    with muted(*IMPORTS):
        from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING as STOCK

    taken = inspect.signature(type(pipeline).__call__).parameters
    numbers = [taken[name].default for name in argument_names(pipeline) if name in taken]
    return (
        isinstance(pipeline, tuple(STOCK.values()))
        and {"prompt", "generator"} <= set(taken)
        and not {"image", "control_image"} & set(taken)
        and [type(each) in (int, float) for each in numbers] == [True, True]
    )


def sampling_of(pipeline: DiffusionPipeline) -> Sampling:
    """Its own numbers: attached, configured, or the defaults of its class."""
    if (attached := attached_sampling(pipeline)) is not None:
        return attached
    if hasattr(pipeline.config, "default_steps"):
        return Sampling(pipeline.config.default_steps, pipeline.config.default_guidance)
    taken = inspect.signature(type(pipeline).__call__).parameters
    steps, guidance = (taken[name].default for name in argument_names(pipeline))
    return Sampling(int(steps), float(guidance))


def attached_sampling(pipeline: DiffusionPipeline) -> Sampling | None:
    """What `attach_sampling` attached."""
    found: Sampling | None = getattr(pipeline, _ATTRIBUTE, None)
    return found


def attach_sampling(pipeline: DiffusionPipeline, sampling: Sampling) -> None:
    """Let a pipeline draw with these numbers where `generate` is given none."""
    setattr(pipeline, _ATTRIBUTE, sampling)


def write_sampling(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Write `sampling.json` into a saved pipeline, where numbers are attached to it."""
    if (attached := attached_sampling(pipeline)) is not None:
        write_json(folder / SAMPLING, asdict(attached))


def read_sampling(file: Path) -> Sampling:
    """The numbers in a `sampling.json`; raises `CheckpointError` for one that cannot be used."""
    try:
        content: Any = read_json(file)
        steps, guidance = content["steps"], content["guidance"]
        if type(steps) is not int or steps < 1:
            raise ValueError(f"steps {steps!r} must be a whole number from 1")
        if type(guidance) not in (int, float) or not 0 <= guidance < math.inf:
            raise ValueError(f"guidance {guidance!r} must be a number from 0")
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(
            f'{file}: cannot be used ({error}). Write {{"steps": 10, "guidance": 3.5}} there, or remove it.'
        ) from error
    return Sampling(steps, float(guidance))
