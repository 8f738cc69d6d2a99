"""WuerstchenPriorPipeline: Würstchen's Stage C, text to the compressor's code of a picture.

prompt --text encoder--> states --prior.project, once--> keys and values
noise (B, 16, h, w) --scheduler: 2 x prior a step, guidance--> x --x * std + mean--> image embeddings
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMWuerstchenScheduler
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor, nn

from shoestring.models.latent_previewer import LatentPreviewer
from shoestring.models.wuerstchen_prior import WuerstchenPrior
from shoestring.objectives.cosine import default_timesteps, published_timesteps
from shoestring.pipelines.calls import Callback, Generators, first_noise
from shoestring.pipelines.shim import write_shim
from shoestring.pipelines.wuerstchen_sampling import DenoisingStage, Times
from shoestring.pipelines.wuerstchen_sizes import cells, fit_size, nearest_side, whole_multiple

DEFAULT_STAGE_C_TIMESTEPS = default_timesteps()
"""diffusers' list, 29 steps; its first segment is one step short of the authors'."""

PUBLISHED_STAGE_C_TIMESTEPS = published_timesteps()
"""The authors' 30 steps: 20 from 1 to 2/3, 10 from 2/3 to 0."""

DEFAULT_SIDE = 1024
PUBLISHED_CELL = 42.67


@dataclass
class WuerstchenPriorPipelineOutput(BaseOutput):
    """Codes of pictures as Stage B takes them, (B, C, h, w)."""

    image_embeddings: Tensor | np.ndarray[Any, Any]


class WuerstchenPriorPipeline(DenoisingStage, DiffusionPipeline):
    """Image embeddings from prompts; names and arguments as in diffusers.

    Args beyond diffusers':
        latents_mean, latents_std: embeddings = x * latents_std + latents_mean, numbers or one a channel.
            None: the published x * latent_mean - latent_std, with 42 and 1.
        text_pad, max_tokens: how captions were encoded in training: "masked" (padded, the encoder
            told so, all states kept: the published CLIP), "encoder" (padded, CLIP not told) or "none" (real
            tokens only, under a mask).
        default_steps, default_guidance: what a call uses that gives none.
        sample_size: cells along the side trained at; a call without a size makes that one (else 1024 px).
        latents_of: fingerprint of the compressor whose codes these are.
        previewer: a small network from latents to small pictures, for `preview`.
    """

    model_cpu_offload_seq = "text_encoder->prior"
    _optional_components = ["tokenizer", "text_encoder", "previewer"]
    _callback_tensor_inputs = ["latents", "text_encoder_hidden_states", "negative_prompt_embeds"]
    output_types = ("pt", "np", "latent")

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: nn.Module,
        prior: WuerstchenPrior,
        scheduler: DDPMWuerstchenScheduler,
        latent_mean: float = 42.0,
        latent_std: float = 1.0,
        resolution_multiple: float = PUBLISHED_CELL,
        latents_mean: float | list[float] | None = None,
        latents_std: float | list[float] | None = None,
        text_pad: str = "masked",
        max_tokens: int | None = None,
        default_steps: int = 60,
        default_guidance: float = 8.0,
        sample_size: int | None = None,
        latents_of: str | None = None,
        previewer: LatentPreviewer | None = None,
    ) -> None:
        super().__init__()
        if (latents_mean is None) != (latents_std is None):
            raise ValueError("latents_mean and latents_std: give both or none of them.")
        self.register_modules(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            prior=prior,
            scheduler=scheduler,
            previewer=previewer,
        )
        self.register_to_config(
            latent_mean=latent_mean,
            latent_std=latent_std,
            resolution_multiple=resolution_multiple,
            latents_mean=latents_mean,
            latents_std=latents_std,
            text_pad=text_pad,
            max_tokens=max_tokens,
            default_steps=default_steps,
            default_guidance=default_guidance,
            sample_size=sample_size,
            latents_of=latents_of,
        )

    @property
    def size_multiple(self) -> int:
        """Picture sides are multiples of it, in pixels: 128 as published."""
        return whole_multiple(self.config.resolution_multiple)

    @property
    def default_side(self) -> int:
        """Pixels along the side of a picture for which no size is given."""
        trained = self.config.sample_size
        side = trained * self.config.resolution_multiple if trained else DEFAULT_SIDE
        return nearest_side(side, self.size_multiple)

    def denormalize(self, latents: Tensor) -> Tensor:
        """Latents x as the network makes them -> image embeddings as Stage B takes them, (B, C, h, w)."""
        mean, std = self._spread(latents)
        return latents * std + mean

    def normalize(self, image_embeddings: Tensor) -> Tensor:
        """Image embeddings -> latents x as the network makes them, (B, C, h, w)."""
        mean, std = self._spread(image_embeddings)
        return (image_embeddings - mean) / std

    def _spread(self, like: Tensor) -> tuple[Tensor, Tensor]:
        config = self.config
        mean, std = config.latents_mean, config.latents_std
        if mean is None:
            mean, std = -config.latent_std, config.latent_mean
        as_channels = [like.new_tensor(value).reshape(-1, 1, 1) for value in (mean, std)]
        return as_channels[0], as_channels[1]

    @torch.no_grad()
    def preview(self, image_embeddings: Tensor, *, normalized: bool = False) -> list[Image.Image]:
        """Small pictures of image embeddings, without Stages B and A.

        In a callback on `latents` give `normalized=True`. Raises `ValueError` without a previewer.
        """
        if self.previewer is None:
            raise ValueError(
                "This pipeline has no previewer. Give one: WuerstchenPriorPipeline(previewer=...)."
            )
        latents = self.denormalize(image_embeddings) if normalized else image_embeddings
        network = self.previewer
        pictures = network(latents.to(network.device, network.dtype)).float()
        return list(VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(pictures)))

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        timesteps: Times = None,
        guidance_scale: float | None = None,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pt",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        resolution: str = "refuse",
    ) -> WuerstchenPriorPipelineOutput | tuple[Any]:
        """Make image embeddings (B n, C, h, w) in float32.

        Args are diffusers'. `timesteps` is a falling list from 1 to 0, "default" or "published".
        `guidance_scale` up to 1 is none. `resolution`: what becomes of a size that does not fit, see
        `fit_size`. `output_type` is "pt", "np" or "latent": the latents as the network makes them.
        """
        config = self.config
        steps = config.default_steps if num_inference_steps is None else num_inference_steps
        guidance = config.default_guidance if guidance_scale is None else guidance_scale
        side = self.default_side
        height, width = (side if each is None else each for each in (height, width))
        height, width = fit_size(height, width, self.size_multiple, resolution)
        self.check_call(steps, timesteps, guidance, callback_on_step_end_tensor_inputs, output_type)
        self._guidance_scale = float(guidance)
        device = self._execution_device

        text, mask = self.encode_prompt(
            prompt,
            device,
            num_images_per_prompt,
            self.do_classifier_free_guidance,
            negative_prompt,
            prompt_embeds,
            negative_prompt_embeds,
            prompt_attention_mask,
            negative_prompt_attention_mask,
        )
        count = len(text) // (2 if self.do_classifier_free_guidance else 1)
        grid = tuple(cells(pixels, config.resolution_multiple) for pixels in (height, width))
        shape = (count, self.prior.config.c_in, *grid)
        self.set_times(steps, timesteps, device)
        latents = first_noise(shape, device, generator, latents)
        negative = text[count:] if self.do_classifier_free_guidance else None
        latents = self.denoise(
            self.prior,
            latents,
            {"text_encoder_hidden_states": text, "negative_prompt_embeds": negative},
            self._conditions(count, mask),
            generator,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )
        embeddings: Any = latents if output_type == "latent" else self.denormalize(latents)
        self.maybe_free_model_hooks()
        if output_type == "np":
            embeddings = embeddings.cpu().numpy()
        return WuerstchenPriorPipelineOutput(embeddings) if return_dict else (embeddings,)

    def _conditions(
        self, count: int, mask: Tensor | None
    ) -> Callable[[dict[str, Any], bool], dict[str, Any]]:
        """What depends on the text alone, projected once for all steps."""

        def conditions(tensors: dict[str, Any], guided: bool) -> dict[str, Any]:
            rows = 2 * count if guided else count
            text = tensors["text_encoder_hidden_states"][:rows]
            return {"projected": self.prior.project(text, None if mask is None else mask[:rows])}

        return conditions

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Save as diffusers does, with the `pipeline.py` that lets plain diffusers open it."""
        super().save_pretrained(save_directory, *args, **kwargs)
        write_shim(self, save_directory)
