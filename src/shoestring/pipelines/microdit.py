"""MicroDiTPipeline: text to pictures with a MicroDiT, a diffusers `DiffusionPipeline`.

prompt --text encoder--> embeddings --project_text, once--> [null, text]
noise --scheduler: 2 x MicroDiT a step, guidance--> latents --autoencoder--> picture
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import SanaLoraLoaderMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from torch import Tensor, nn

from shoestring.models.autoencoders import (
    decode_latents,
    latent_channels,
    latent_side,
    size_multiple,
    spatial_factor,
)
from shoestring.models.microdit import MicroDiT, ProjectedText
from shoestring.models.text_encoders import TextEncoder
from shoestring.objectives.flow import TIMESTEPS, velocity_from_x0
from shoestring.pipelines.calls import CallState, as_decoded, check_call, first_noise
from shoestring.pipelines.prompts import Text, encode_prompts, repeat, stack_text
from shoestring.pipelines.shim import write_shim
from shoestring.sampling.edm_heun import EDMHeunScheduler

PREDICTIONS = ("edm", "velocity", "x0")


class MicroDiTPipeline(CallState, DiffusionPipeline, SanaLoraLoaderMixin):
    """Pictures from prompts. Open one with `shoestring.load(path_or_id)`.

    `prediction` says what the network puts out: "edm" (raw output under EDM's preconditioning, with an EDM
    scheduler), "velocity" or "x0" (with a flow-matching scheduler). `default_steps` and `default_guidance`
    are what a call uses that gives none. `text_pad` and `max_tokens` repeat how captions were encoded in
    training.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components = ["tokenizer"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        transformer: MicroDiT,
        vae: nn.Module,
        text_encoder: nn.Module,
        scheduler: EDMHeunScheduler,
        tokenizer: Any = None,
        prediction: str = "edm",
        text_pad: str = "none",
        max_tokens: int | None = None,
        default_steps: int = 30,
        default_guidance: float = 5.0,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
    ) -> None:
        super().__init__()
        if prediction not in PREDICTIONS:
            raise ValueError(f"prediction {prediction!r}: unknown. Use {', '.join(PREDICTIONS)}.")
        if prediction == "edm" and not hasattr(scheduler, "scale_model_input"):
            raise ValueError(f"prediction 'edm' needs an EDM scheduler, not {type(scheduler).__name__}.")
        self.register_modules(
            transformer=transformer,
            vae=vae,
            text_encoder=text_encoder,
            scheduler=scheduler,
            tokenizer=tokenizer,
        )
        self.register_to_config(
            prediction=prediction,
            text_pad=text_pad,
            max_tokens=max_tokens,
            default_steps=default_steps,
            default_guidance=default_guidance,
            latents_mean=latents_mean,
            latents_std=latents_std,
        )
        self.vae_scale_factor = 1 if vae is None else spatial_factor(vae)
        self._guidance_scale = float(default_guidance)
        self._num_timesteps = 0
        self.image_processor = VaeImageProcessor()  # sizes are checked here

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the call under way evaluates the null caption too."""
        return self._guidance_scale != 1.0

    @property
    def size_multiple(self) -> int:
        """Sides of pictures must be multiples of this: the autoencoder's cells fill whole patches."""
        multiple, patch = size_multiple(self.vae), self.transformer.config.patch_size
        return multiple * patch // math.gcd(latent_side(self.vae, multiple), patch)

    def encode_prompt(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        device: torch.device | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """Text embeddings (B n, L, C) and masks (B n, L), each prompt repeated n times in a row.

        Without a negative prompt the null caption of training is used: zeros (one token, or L without mask).
        A prompt that is longer than the text encoder takes is cut, with a warning in the log.
        """
        device = device or self._execution_device
        if prompt_embeds is None:
            prompt_embeds, prompt_attention_mask = self._encode(prompt)
        if negative_prompt_embeds is None:
            if negative_prompt is None:
                length = 1 if prompt_attention_mask is not None else prompt_embeds.shape[1]
                negative_prompt_embeds = prompt_embeds.new_zeros(1, length, prompt_embeds.shape[2])
                if prompt_attention_mask is not None:
                    negative_prompt_attention_mask = prompt_attention_mask.new_ones(1, 1)
            else:
                negative_prompt_embeds, negative_prompt_attention_mask = self._encode(negative_prompt)
        count = prompt_embeds.shape[0]
        if negative_prompt_embeds.shape[0] != count:
            negative_prompt_embeds = negative_prompt_embeds.expand(count, -1, -1)
            if negative_prompt_attention_mask is not None:
                negative_prompt_attention_mask = negative_prompt_attention_mask.expand(count, -1)
        dtype = self.transformer.dtype if self.transformer is not None else prompt_embeds.dtype
        prompt_embeds = repeat(prompt_embeds, num_images_per_prompt, device).to(dtype)
        negative_prompt_embeds = repeat(negative_prompt_embeds, num_images_per_prompt, device).to(dtype)
        if prompt_attention_mask is not None:
            prompt_attention_mask = repeat(prompt_attention_mask, num_images_per_prompt, device)
        if negative_prompt_attention_mask is not None:
            negative_prompt_attention_mask = repeat(
                negative_prompt_attention_mask, num_images_per_prompt, device
            )
        return (
            prompt_embeds,
            prompt_attention_mask,
            negative_prompt_embeds,
            negative_prompt_attention_mask,
        )

    def _encode(self, prompt: str | list[str]) -> Text:
        return encode_prompts(self._captions(), [prompt] if isinstance(prompt, str) else prompt)

    def cut_prompts(self, prompts: Sequence[str]) -> list[str]:
        """A line for each prompt that is longer than the text encoder takes."""
        return self._captions().warnings(prompts)

    def _captions(self) -> TextEncoder:
        """The text encoder as captions were encoded in training."""
        return TextEncoder(
            self.text_encoder, self.tokenizer, pad=self.config.text_pad, max_tokens=self.config.max_tokens
        )

    def check_inputs(
        self,
        prompt: str | list[str] | None,
        height: int,
        width: int,
        num_inference_steps: int,
        prompt_embeds: Tensor | None,
        callback_on_step_end_tensor_inputs: list[str],
    ) -> None:
        """Raise `ValueError` for inputs that cannot be sampled."""
        known = self._callback_tensor_inputs
        names = callback_on_step_end_tensor_inputs
        check_call(
            prompt, prompt_embeds, height, width, self.size_multiple, num_inference_steps, names, known
        )

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 - diffusers' signature
    ) -> ImagePipelineOutput | tuple[Any]:
        """Make pictures.

        Args are diffusers' usual ones. `guidance_scale` 1 is none: out = null + scale * (text - null).
        `latents` are standard normal noise (B n, C, h, w), scaled by the scheduler's first noise level here.
        `output_type` is "pil", "np" (B, H, W, 3 in [0, 1]), "pt" (B, 3, H, W in [0, 1]) or "latent".
        """
        side = round(self.transformer.config.sample_size * self.vae_scale_factor)
        height, width = height or side, width or side
        steps = self.config.default_steps if num_inference_steps is None else num_inference_steps
        self.check_inputs(prompt, height, width, steps, prompt_embeds, callback_on_step_end_tensor_inputs)
        self._guidance_scale = self.config.default_guidance if guidance_scale is None else guidance_scale
        self._interrupt = False
        device = self._execution_device

        prompt_embeds, prompt_attention_mask, negative_prompt_embeds, negative_prompt_attention_mask = (
            self.encode_prompt(
                prompt,  # type: ignore[arg-type]
                negative_prompt,
                num_images_per_prompt,
                device,
                prompt_embeds,
                prompt_attention_mask,
                negative_prompt_embeds,
                negative_prompt_attention_mask,
            )
        )
        text, mask = prompt_embeds, prompt_attention_mask
        if self.do_classifier_free_guidance:
            text, mask = stack_text(
                (negative_prompt_embeds, negative_prompt_attention_mask),
                (prompt_embeds, prompt_attention_mask),
            )
        latents = self.prepare_latents(prompt_embeds.shape[0], height, width, device, generator, latents)
        self.scheduler.set_timesteps(steps, device=device)
        timesteps = self.scheduler.timesteps
        latents = latents * getattr(self.scheduler, "init_noise_sigma", 1.0)
        self._num_timesteps = len(timesteps)
        prompt_inputs = self._prompt_inputs(text, mask)

        with self.progress_bar(total=len(timesteps)) as progress:
            for number, timestep in enumerate(timesteps):
                if self._interrupt:
                    continue
                self._current_timestep = timestep
                velocity_or_raw = self._evaluate(latents, timestep, prompt_inputs, attention_kwargs)
                latents = self.scheduler.step(velocity_or_raw, timestep, latents, return_dict=False)[0]
                if callback_on_step_end is not None:
                    given = {}
                    for name in callback_on_step_end_tensor_inputs:
                        given[name] = latents if name == "latents" else locals()[name]
                    returned = callback_on_step_end(self, number, timestep, given)
                    latents = returned.pop("latents", latents)
                progress.update()
        self._current_timestep = None

        images = latents
        if output_type != "latent":
            decoded = decode_latents(self.vae, as_decoded(self.config, self.vae, latents))
            images = self.image_processor.postprocess(decoded, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def prepare_latents(
        self,
        count: int,
        height: int,
        width: int,
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None,
    ) -> Tensor:
        """Standard normal noise (count, C, h, w) in float32, drawn with `generator` unless given."""
        sides = (latent_side(self.vae, side) for side in (height, width))
        shape = (count, latent_channels(self.vae), *sides)
        return first_noise(shape, device, generator, latents)

    def _prompt_inputs(self, text: Tensor, mask: Tensor | None) -> dict[str, Any]:
        """What depends on the prompt alone, as arguments of the network.

        Hooks of diffusers' caches split and match plain arguments, so with a cache on the text goes in raw.
        """
        if self.transformer.is_cache_enabled:
            return {"encoder_hidden_states": text, "encoder_attention_mask": mask}
        projected: ProjectedText = self.transformer.project_text(text, mask, with_key_values=True)
        return {"projected_text": projected}

    def _evaluate(
        self,
        latents: Tensor,
        timestep: Tensor,
        prompt_inputs: dict[str, Any],
        attention_kwargs: dict[str, Any] | None,
    ) -> Tensor:
        """The network's guided output at one timestep, in the form that the scheduler takes."""
        inputs = latents
        if self.config.prediction == "edm":
            inputs = self.scheduler.scale_model_input(latents, timestep)
        if self.do_classifier_free_guidance:
            inputs = torch.cat([inputs, inputs])
        with self.transformer.cache_context("cond_uncond"):
            output = self.transformer(
                hidden_states=inputs.to(self.transformer.dtype),
                timestep=timestep.expand(inputs.shape[0]),
                attention_kwargs=attention_kwargs,
                return_dict=False,
                **prompt_inputs,
            )[0].float()
        if self.do_classifier_free_guidance:
            null, text = output.chunk(2)
            output = torch.lerp(null, text, self.guidance_scale)
        if self.config.prediction == "x0":
            output = velocity_from_x0(output, latents, timestep / TIMESTEPS)
        return output

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Save as diffusers does, with the one-line `pipeline.py` that lets plain diffusers open it."""
        super().save_pretrained(save_directory, *args, **kwargs)
        write_shim(self, save_directory)
