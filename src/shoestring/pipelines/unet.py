"""Pipelines around a U-Net on Stable Diffusion's noise schedule: diffusers' own where its parts are stock.

    text encoders     autoencoder       pipeline
    SDXL's two        KL or tiny        StableDiffusionXLPipeline
    one CLIP, padded  KL or tiny        StableDiffusionPipeline
    any other         any of ours       UNetPipeline

A stock pipeline opens in plain diffusers and in whatever reads its folders.

    prompt --text encoder--> tokens, pooled --Conditioning, as in training--> [null, text]
    noise --scheduler: 2 x U-Net a step, guidance--> latents --autoencoder--> picture
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor, nn

from shoestring.errors import RecipeError
from shoestring.interfaces import Batch
from shoestring.models.autoencoders import (
    decode_latents,
    latent_channels,
    latent_side,
    size_multiple,
    spatial_factor,
)
from shoestring.models.quiet import muted
from shoestring.models.sdxl_text import SdxlTextPair
from shoestring.models.text_encoders import TextEncoder
from shoestring.models.unet_guidance import guidance_embedding
from shoestring.objectives.noise import NULLS, Conditioning, pool_tokens, predict
from shoestring.pipelines.calls import Callback, CallState, Generators, as_decoded, check_call, first_noise
from shoestring.pipelines.defaults import IMPORTS, Sampling, attach_sampling
from shoestring.pipelines.prompts import Text, encode_pooled, repeat, stack_text
from shoestring.pipelines.shim import write_shim

Encoded = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Prompts as states (B, L, C), which are real tokens (B, L) or None (all), pooled (B, P) or None."""


class UNetPipeline(CallState, DiffusionPipeline, StableDiffusionLoraLoaderMixin):
    """Pictures from prompts with any text encoder and autoencoder. Open one with `shoestring.load`.

    `null` says what guidance goes against where no negative prompt is given: "zeros", or "empty", the encoded
    empty string. `default_steps` and `default_guidance` are what a call uses that gives none. `text_pad` and
    `max_tokens` repeat how captions were encoded in training. `latents_mean` and `latents_std` (a number a
    channel) are there where latents were trained on under another scaling than the autoencoder's own.
    """

    model_cpu_offload_seq = "text_encoder->unet->vae"
    _optional_components = ["tokenizer"]
    _callback_tensor_inputs = ["latents"]
    _lora_loadable_modules = ["unet"]  # of text encoders few have adapters, hashing none

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: nn.Module,
        text_encoder: nn.Module,
        scheduler: SchedulerMixin,
        tokenizer: Any = None,
        null: str = "zeros",
        text_pad: str = "none",
        max_tokens: int | None = None,
        default_steps: int = 25,
        default_guidance: float = 5.0,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
    ) -> None:
        super().__init__()
        if null not in NULLS:
            raise ValueError(f"null {null!r}: unknown. Use {' or '.join(NULLS)}.")
        self.register_modules(
            unet=unet, vae=vae, text_encoder=text_encoder, scheduler=scheduler, tokenizer=tokenizer
        )
        self.register_to_config(
            null=null,
            text_pad=text_pad,
            max_tokens=max_tokens,
            default_steps=default_steps,
            default_guidance=default_guidance,
            latents_mean=latents_mean,
            latents_std=latents_std,
        )
        self.vae_scale_factor = 1 if vae is None else spatial_factor(vae)
        self.image_processor = VaeImageProcessor()  # sizes are checked here
        self._guidance_scale = float(default_guidance)

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the call under way evaluates the null caption too; some networks are told the scale."""
        return self._guidance_scale > 1 and self.unet.config.time_cond_proj_dim is None

    @property
    def size_multiple(self) -> int:
        """Sides of pictures must be multiples of this, in pixels."""
        return size_multiple(self.vae)

    def cut_prompts(self, prompts: Sequence[str]) -> list[str]:
        """A line for each prompt that is longer than the text encoder takes."""
        return self._captions().warnings(prompts)

    def _captions(self) -> TextEncoder:
        """The text encoder as captions were encoded in training."""
        return TextEncoder(
            self.text_encoder, self.tokenizer, pad=self.config.text_pad, max_tokens=self.config.max_tokens
        )

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        device: torch.device | None = None,
        do_classifier_free_guidance: bool = True,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
    ) -> tuple[Tensor | None, ...]:
        """States (B n, L, C), mask (B n, L), pooled (B n, P) of prompts, then of what guidance goes against.

        Each prompt comes n times in a row. The mask is None where all tokens count; without guidance the last
        three are. Pooled text is the encoder's or, where it gives none, the mean of a prompt's tokens.
        A prompt that is longer than the text encoder takes is cut, with a warning in the log.
        """
        device = device or self._execution_device
        text: Encoded = (prompt_embeds, prompt_attention_mask, pooled_prompt_embeds)
        if prompt_embeds is None:
            text = self._encode([prompt] if isinstance(prompt, str) else prompt or [])
        null: Encoded = (
            negative_prompt_embeds,
            negative_prompt_attention_mask,
            negative_pooled_prompt_embeds,
        )
        if not do_classifier_free_guidance:
            null = (None, None, None)
        elif negative_prompt_embeds is None and negative_prompt is None and self.config.null == "zeros":
            null = _zeros(text)
        elif negative_prompt_embeds is None:
            words = negative_prompt or ""
            null = self._encode([words] if isinstance(words, str) else words)
        count, nulls = (0 if each[0] is None else len(each[0]) for each in (text, null))
        if nulls not in (0, 1, count):
            raise ValueError(f"{nulls} negative prompts for {count} prompts: give one, or one for each.")
        dtype = torch.float32 if self.unet is None else self.unet.dtype
        return (
            *_repeated(text, num_images_per_prompt, device, dtype),
            *_repeated(null, num_images_per_prompt * count // max(nulls, 1), device, dtype),
        )

    def _encode(self, prompts: Sequence[str]) -> Encoded:
        if not prompts:
            raise ValueError("prompt []: must hold at least one prompt.")
        (states, mask), pooled = encode_pooled(self._captions(), prompts)
        return states, mask, pool_tokens(states, mask) if pooled is None else pooled

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
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **embeds: Tensor | None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Make pictures.

        Args are diffusers' usual ones; `embeds` are those of `encode_prompt`. Guidance up to 1 is none.
        `latents` are standard normal noise (B n, C, h, w), scaled by the scheduler's first noise level here.
        `output_type` is "pil", "np" (B, H, W, 3 in [0, 1]), "pt" (B, 3, H, W in [0, 1]) or "latent".
        """
        sides = self._default_sides()
        height, width = height or sides[0], width or sides[1]
        steps = self.config.default_steps if num_inference_steps is None else num_inference_steps
        names = callback_on_step_end_tensor_inputs
        states = embeds.get("prompt_embeds")
        known = self._callback_tensor_inputs
        check_call(prompt, states, height, width, self.size_multiple, steps, names, known)
        guidance = self.config.default_guidance if guidance_scale is None else guidance_scale
        self._guidance_scale, self._interrupt = float(guidance), False
        device = self._execution_device
        guided = self.do_classifier_free_guidance
        encoded = self.encode_prompt(prompt, negative_prompt, num_images_per_prompt, device, guided, **embeds)
        self.scheduler.set_timesteps(steps, device=device)
        count = len(encoded[0])  # type: ignore[arg-type]
        shape = (count, latent_channels(self.vae), *(latent_side(self.vae, each) for each in (height, width)))
        latents = first_noise(shape, device, generator, latents) * self.scheduler.init_noise_sigma
        given = self._given(encoded, latents, height, width)

        latents = self._denoise(
            latents,
            {**given, "cross_attention_kwargs": cross_attention_kwargs},
            generator,
            callback_on_step_end,
            names,
        )
        images: Any = latents
        if output_type != "latent":
            decoded = decode_latents(self.vae, as_decoded(self.config, self.vae, latents))
            images = self.image_processor.postprocess(decoded, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _default_sides(self) -> tuple[int, int]:
        """Height and width in pixels of a picture for which none are given."""
        trained = self.unet.config.sample_size
        height, width = (trained, trained) if isinstance(trained, int) else trained
        return round(height * self.vae_scale_factor), round(width * self.vae_scale_factor)

    def _given(
        self, encoded: Sequence[Tensor | None], latents: Tensor, height: int, width: int
    ) -> dict[str, Any]:
        """The U-Net's arguments beside z and t, as it was trained: for the null captions, then the texts.

        A picture counts as its own original, not cropped.
        """
        states, mask, pooled, null_states, null_mask, null_pooled = encoded
        assert states is not None, "encode_prompt gives states"
        text: Text = (states, mask)
        if null_states is not None:
            text = stack_text((null_states, null_mask), text)
            pooled = None if pooled is None or null_pooled is None else torch.cat([null_pooled, pooled])
        if pooled is None and self.unet.config.addition_embed_type == "text_time":
            raise ValueError(
                "prompt_embeds: this U-Net wants pooled_prompt_embeds too (and the negative's). "
                "encode_prompt gives them."
            )
        rows, count = len(text[0]), len(latents)
        ids = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32, device=latents.device)
        extra = {"size_crop": ids.expand(rows, -1)} | ({} if pooled is None else {"pooled": pooled})
        batch = Batch(
            index=torch.arange(rows),
            latents=latents.repeat(rows // count, 1, 1, 1),
            text=text[0],
            text_mask=text[1],
            extra=extra,
        )
        given: dict[str, Any] = Conditioning(self.unet.config)(batch, train=False)
        if self.unet.config.time_cond_proj_dim is not None:
            w = torch.full((rows,), self.guidance_scale - 1, device=latents.device)
            given["timestep_cond"] = guidance_embedding(w, self.unet.config.time_cond_proj_dim).to(
                self.unet.dtype
            )
        return given

    def _denoise(
        self,
        latents: Tensor,
        given: dict[str, Any],
        generator: Generators,
        callback: Callback | None,
        callback_tensor_inputs: Sequence[str],
    ) -> Tensor:
        """From noise (B, C, h, w) to latents along the scheduler's timesteps, in float32."""
        guided = self.do_classifier_free_guidance
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)
        takes = inspect.signature(self.scheduler.step).parameters
        # No fresh noise where a scheduler leaves it open, as in diffusers' own pipelines.
        offered = {"generator": generator, "eta": 0.0}
        more = {name: value for name, value in offered.items() if name in takes}
        with self.progress_bar(total=len(timesteps)) as progress:
            for number, timestep in enumerate(timesteps):
                if self._interrupt:
                    continue
                self._current_timestep = timestep
                z = self.scheduler.scale_model_input(latents, timestep).to(self.unet.dtype)
                z = torch.cat([z, z]) if guided else z
                output = predict(self.unet, z, timestep, given)
                if guided:
                    null, text = output.chunk(2)
                    output = null + self._guidance_scale * (text - null)
                latents = self.scheduler.step(output, timestep, latents, **more, return_dict=False)[0]
                if callback is not None:
                    seen = dict.fromkeys(callback_tensor_inputs, latents)
                    latents = callback(self, number, timestep, seen).pop("latents", latents)
                progress.update()
        self._current_timestep = None
        return latents

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Save as diffusers does, with the one-line `pipeline.py` that lets plain diffusers open it."""
        super().save_pretrained(save_directory, *args, **kwargs)
        write_shim(self, save_directory)


def _zeros(text: Encoded) -> Encoded:
    """The null caption of training where it is zeros: one token, or all of them where there is no mask."""
    states, mask, pooled = text
    assert states is not None, "of prompts that were encoded"
    null = states.new_zeros(1, states.shape[1] if mask is None else 1, states.shape[2])
    real = None if mask is None else mask.new_ones(1, 1)
    return null, real, None if pooled is None else torch.zeros_like(pooled[:1])


def _repeated(text: Encoded, count: int, device: torch.device, dtype: torch.dtype) -> Encoded:
    """Each row `count` times in a row, states and pooled in the network's type."""
    states, mask, pooled = (None if each is None else repeat(each, count, device) for each in text)
    return (
        None if states is None else states.to(dtype),
        mask,
        None if pooled is None else pooled.to(dtype),
    )


def make_unet_pipeline(
    unet: UNet2DConditionModel,
    *,
    text: TextEncoder,
    vae: nn.Module,
    scheduler: SchedulerMixin,
    null: str,
    steps: int,
    guidance: float,
    size: int,
    max_tokens: int | None = None,
    pad: str = "none",
    latents_mean: list[float] | None = None,
    latents_std: list[float] | None = None,
) -> DiffusionPipeline:
    """A pipeline around a U-Net: one of diffusers' where its parts are stock, else a `UNetPipeline`.

    text, max_tokens, pad  the text encoder, and how captions were encoded in training
    null                   "zeros" or "empty": what guidance goes against without a negative prompt
    steps, guidance        what `generate` uses that is given none
    size                   pixels along the side of a picture for which no size is given; becomes the U-Net's
                           `sample_size`
    latents_mean, _std     a number a channel, where latents have another scaling than the autoencoder's

    Raises `RecipeError` for a size that does not fit, and where the parts call for a stock pipeline that
    could not sample as the network was trained.
    """
    unet.register_to_config(sample_size=latent_side(vae, size))
    parts = {"unet": unet, "vae": vae, "scheduler": scheduler}
    ours = latents_mean is not None or not isinstance(vae, AutoencoderKL | AutoencoderTiny)
    added = unet.config.addition_embed_type
    if isinstance(text.model, SdxlTextPair):
        if ours or added != "text_time":
            raise RecipeError(
                "SDXL's two text encoders go with its pipeline: an AutoencoderKL or AutoencoderTiny with its "
                f"own scaling (here {type(vae).__name__}) and a U-Net with added conditions (here {added}). "
                "Encode the store with SDXL's autoencoder and `normalise: autoencoder`."
            )
        pipeline = _sdxl(parts, text, null)
    elif not ours and added is None and _is_stable_diffusions(text, pad, max_tokens):
        pipeline = _stable_diffusion(parts, text, null)
    else:
        return UNetPipeline(
            **parts,
            text_encoder=text.model,
            tokenizer=text.tokenizer,
            null=null,
            text_pad=pad,
            max_tokens=max_tokens,
            default_steps=steps,
            default_guidance=guidance,
            latents_mean=latents_mean,
            latents_std=latents_std,
        )
    attach_sampling(pipeline, Sampling(steps, float(guidance)))
    return pipeline


def _is_stable_diffusions(text: TextEncoder, pad: str, max_tokens: int | None) -> bool:
    """Whether captions were encoded as Stable Diffusion's pipeline does it: CLIP's last states, padded."""
    limit = getattr(text.tokenizer, "model_max_length", None)
    return type(text.model).__name__ == "CLIPTextModel" and pad == "encoder" and max_tokens in (None, limit)


def _sdxl(parts: dict[str, Any], text: TextEncoder, null: str) -> DiffusionPipeline:
    with muted(*IMPORTS):
        from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import (
            StableDiffusionXLPipeline,
        )

    pair: Any = text.model
    pipeline: DiffusionPipeline = StableDiffusionXLPipeline(
        **parts,
        text_encoder=pair.text_encoder,
        text_encoder_2=pair.text_encoder_2,
        tokenizer=text.tokenizer.tokenizer,
        tokenizer_2=text.tokenizer.tokenizer_2,
        force_zeros_for_empty_prompt=null == "zeros",
        add_watermarker=False,
    )
    # Else a machine that happens to have the watermark's package would draw other pixels than the previews.
    pipeline.register_to_config(add_watermarker=False)
    return pipeline


def _stable_diffusion(parts: dict[str, Any], text: TextEncoder, null: str) -> DiffusionPipeline:
    if null != "empty":
        raise RecipeError(
            f"objective.null_caption {null!r}: Stable Diffusion's pipeline guides against the empty caption. "
            "Set objective.null_caption=empty."
        )
    with muted(*IMPORTS):
        from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

    pipeline: DiffusionPipeline = StableDiffusionPipeline(
        **parts,
        text_encoder=text.model,
        tokenizer=text.tokenizer,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return pipeline
