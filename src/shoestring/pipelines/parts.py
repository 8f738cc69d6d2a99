"""Parts put in place of a loaded pipeline's own: another scheduler, a tiny decoder."""

from __future__ import annotations

from typing import Any

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from shoestring.data.store import split_revision
from shoestring.errors import RecipeError, UserError
from shoestring.models.autoencoders import (
    LatentScaling,
    as_scaling,
    latent_channels,
    load_autoencoder,
    spatial_factor,
)
from shoestring.models.quiet import cast
from shoestring.pipelines.microdit import MicroDiTPipeline
from shoestring.sampling.schedulers import make_noise_scheduler, make_scheduler


def use_scheduler(pipeline: DiffusionPipeline, name: str) -> None:
    """Sample with the scheduler `name`, on the schedule and for the prediction that the network has.

    Raises `RecipeError` for a name that is unknown or of another kind, and for a pipeline that takes none.
    """
    config = pipeline.components["scheduler"].config if "scheduler" in pipeline.components else {}
    if isinstance(pipeline, MicroDiTPipeline):
        pipeline.scheduler = make_scheduler(
            name,
            prediction=pipeline.config.prediction,
            sigma_data=config.get("sigma_data"),
            shift=config.get("shift", 1.0),
        )
    elif "unet" in pipeline.components and "beta_schedule" in config:
        pipeline.scheduler = make_noise_scheduler(
            name, config, prediction=config.get("prediction_type", "epsilon")
        )
    else:
        raise RecipeError(f"--scheduler: has no effect on a {type(pipeline).__name__}. Leave it out.")


def use_tiny_decoder(pipeline: DiffusionPipeline, path_or_id: str) -> None:
    """Let an `AutoencoderTiny` decode in place of the pipeline's AutoencoderKL (`path` or `id[@revision]`).

    It is trained on latents as the AutoencoderKL scales them, and has factor 1 itself, so that stock
    pipelines and ours hand it what it wants. A pipeline's own `latents_mean` and `latents_std` are of raw
    latents, and are set anew for scaled ones. Raises `RecipeError` for a pipeline without an AutoencoderKL
    and for an autoencoder that is not tiny or has latents of another shape.
    """
    old: Any = pipeline.components.get("vae")
    if not isinstance(old, AutoencoderKL):
        raise RecipeError(
            f"--tiny-decoder: stands in for an AutoencoderKL, and this {type(pipeline).__name__} has "
            f"{'none' if old is None else f'a {type(old).__name__}'}. Leave it out."
        )
    if old.config.get("latents_mean") is not None:
        raise RecipeError(
            "--tiny-decoder: this pipeline's autoencoder scales latents by channel, which no tiny one is "
            "trained on. Leave it out."
        )
    place, revision = split_revision(path_or_id)
    try:
        tiny = load_autoencoder(place, revision=revision)
    except UserError as error:  # whose advice is for autoencoders of any kind
        problem = str(error).removeprefix(f"autoencoder {place}: ").partition(" Give ")[0]
        raise RecipeError(
            f"--tiny-decoder {path_or_id}: {problem} Give an AutoencoderTiny, its folder or its hub id, such "
            "as madebyollin/taesdxl for SDXL."
        ) from error
    if not isinstance(tiny, AutoencoderTiny):
        raise RecipeError(
            f"--tiny-decoder {path_or_id}: is of class {type(tiny).__name__}, not AutoencoderTiny. "
            "Give one, such as madebyollin/taesdxl for SDXL."
        )
    shapes = [(latent_channels(each), spatial_factor(each)) for each in (tiny, old)]
    if shapes[0] != shapes[1]:
        (channels, factor), (wanted, cell) = shapes
        raise RecipeError(
            f"--tiny-decoder {path_or_id}: reads {channels} channels at 1/{factor} of the size, the "
            f"pipeline's latents have {wanted} at 1/{cell}. Give the tiny autoencoder of its family."
        )
    _rescale(pipeline, as_scaling(old))
    pipeline.register_modules(vae=cast(tiny, old.device, old.dtype))


def _rescale(pipeline: DiffusionPipeline, scaling: LatentScaling) -> None:
    """Let the pipeline's mean and std be those of latents that `scaling` has scaled."""
    mean, std = (pipeline.config.get(name) for name in ("latents_mean", "latents_std"))
    if mean is None or std is None:
        return
    (shift,), (factor,) = scaling.shift, scaling.factor
    pipeline.register_to_config(
        latents_mean=[(each - shift) * factor for each in mean], latents_std=[each * factor for each in std]
    )
