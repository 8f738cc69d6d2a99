"""WuerstchenCombinedPipeline: Würstchen's whole cascade, text to pictures.

prompt --Stage C: WuerstchenPriorPipeline--> image embeddings --Stages B and A--> pictures
                                                       or     --an autoencoder's decoder--> pictures
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMWuerstchenScheduler
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from PIL import Image
from torch import Tensor, nn

from shoestring.errors import CheckpointError
from shoestring.models import autoencoders
from shoestring.models.autoencoders import (
    as_scaling,
    decode_latents,
    latent_channels,
    scale_latents,
    spatial_factor,
)
from shoestring.models.latent_previewer import LatentPreviewer
from shoestring.models.semantic_compressor import SemanticCompressor
from shoestring.models.wuerstchen_decoder import WuerstchenDiffNeXt
from shoestring.models.wuerstchen_prior import WuerstchenPrior
from shoestring.models.wuerstchen_vqgan import PaellaVQModel
from shoestring.pipelines.calls import Callback, Generators
from shoestring.pipelines.shim import write_shim
from shoestring.pipelines.wuerstchen_decoder import WuerstchenDecoderPipeline
from shoestring.pipelines.wuerstchen_prior import PUBLISHED_CELL, WuerstchenPriorPipeline
from shoestring.pipelines.wuerstchen_sampling import Times, fetch
from shoestring.pipelines.wuerstchen_sizes import fit_size, nearest_side, whole_multiple

DEFAULT_SIDE = 512


class WuerstchenCombinedPipeline(DiffusionPipeline):
    """Pictures from prompts by all stages; names and arguments as in diffusers.

    Either `decoder`, `scheduler` and `vqgan` (with or without `text_encoder` and `tokenizer`) make pictures
    of Stage C's codes, or `vae` does: any autoencoder of `models/autoencoders.py`, such as
    `WuerstchenAutoencoder` or diffusers' `AutoencoderDC`.

    Args beyond diffusers':
        vae: decodes Stage C's codes in place of decoder and vqgan.
        compressor: the network whose codes these are, for `decoder_pipe.reconstruct`.
        previewer: a small network from codes to small pictures, for `preview`.
        latent_mean, latent_std, latents_mean, latents_std, resolution_multiple, sample_size, latents_of:
            as for `WuerstchenPriorPipeline`; with `vae`, what is not given follows from it.
        latent_dim_scale, null_tokens: as for `WuerstchenDecoderPipeline`.
        text_pad, max_tokens: how captions were encoded, for both stages' text encoders.
        default_steps, default_guidance: Stage C's in a call that gives none; decoder_steps: Stage B's.
        decoder_latents_of: fingerprint of the compressor whose codes decoder or vae read; None: that of
            the compressor or vae given, in float32.

    Raises `CheckpointError` for a missing stage, and for stages that belong to two compressors.
    """

    model_cpu_offload_seq = "prior_text_encoder->prior_prior->text_encoder->compressor->decoder->vqgan->vae"
    _optional_components = [
        "tokenizer",
        "text_encoder",
        "decoder",
        "scheduler",
        "vqgan",
        "prior_tokenizer",
        "prior_text_encoder",
        "vae",
        "compressor",
        "previewer",
    ]

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: nn.Module | None,
        decoder: WuerstchenDiffNeXt | None,
        scheduler: DDPMWuerstchenScheduler | None,
        vqgan: PaellaVQModel | None,
        prior_tokenizer: Any,
        prior_text_encoder: nn.Module,
        prior_prior: WuerstchenPrior,
        prior_scheduler: DDPMWuerstchenScheduler,
        vae: nn.Module | None = None,
        compressor: SemanticCompressor | None = None,
        previewer: LatentPreviewer | None = None,
        latent_mean: float = 42.0,
        latent_std: float = 1.0,
        resolution_multiple: float | None = None,
        latents_mean: float | list[float] | None = None,
        latents_std: float | list[float] | None = None,
        latent_dim_scale: float | None = None,
        null_tokens: int | None = None,
        text_pad: str = "masked",
        max_tokens: int | None = None,
        default_steps: int = 60,
        default_guidance: float = 4.0,
        decoder_steps: int = 12,
        sample_size: int | None = None,
        latents_of: str | None = None,
        decoder_latents_of: str | None = None,
    ) -> None:
        super().__init__()
        _check_stages(prior_prior, decoder, scheduler, vqgan, vae)
        decoder_latents_of = decoder_latents_of or _fingerprint(compressor if vae is None else vae)
        _check_compressors(latents_of, decoder_latents_of)
        if vae is not None and latents_mean is None:
            scaling = as_scaling(vae)
            latents_mean, latents_std = list(scaling.shift), [1 / each for each in scaling.factor]
        if resolution_multiple is None:
            resolution_multiple = PUBLISHED_CELL if vae is None else float(spatial_factor(vae))
        self.register_modules(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            decoder=decoder,
            scheduler=scheduler,
            vqgan=vqgan,
            prior_tokenizer=prior_tokenizer,
            prior_text_encoder=prior_text_encoder,
            prior_prior=prior_prior,
            prior_scheduler=prior_scheduler,
            vae=vae,
            compressor=compressor,
            previewer=previewer,
        )
        self.decoder_pipe = None
        if decoder is not None:
            self.decoder_pipe = WuerstchenDecoderPipeline(
                latent_dim_scale=latent_dim_scale,
                null_tokens=null_tokens,
                text_pad=text_pad,
                max_tokens=max_tokens,
                default_steps=decoder_steps,
                **self._parts_of_decoder(),
            )
            latent_dim_scale = self.decoder_pipe.config.latent_dim_scale
            null_tokens = self.decoder_pipe.config.null_tokens
        self.size_multiple = self._size_multiple(resolution_multiple)
        of_prior: dict[str, Any] = {
            "latent_mean": latent_mean,
            "latent_std": latent_std,
            "resolution_multiple": resolution_multiple,
            "latents_mean": latents_mean,
            "latents_std": latents_std,
            "text_pad": text_pad,
            "max_tokens": max_tokens,
            "default_steps": default_steps,
            "default_guidance": default_guidance,
            "sample_size": sample_size,
            "latents_of": latents_of,
        }
        self.prior_pipe = WuerstchenPriorPipeline(**of_prior, **self._parts_of_prior())
        self.register_to_config(
            **of_prior,
            latent_dim_scale=latent_dim_scale,
            null_tokens=null_tokens,
            decoder_steps=decoder_steps,
            decoder_latents_of=decoder_latents_of,
        )
        self.image_processor = VaeImageProcessor()

    @property
    def default_side(self) -> int:
        """Pixels along the side of a picture for which no size is given: as trained at, else near 512."""
        if self.config.sample_size is None:
            return nearest_side(DEFAULT_SIDE, self.size_multiple)
        return self.prior_pipe.default_side

    def preview(self, image_embeddings: Tensor, *, normalized: bool = False) -> list[Image.Image]:
        """Small pictures of image embeddings: see `WuerstchenPriorPipeline.preview`."""
        self._share_parts()
        return self.prior_pipe.preview(image_embeddings, normalized=normalized)

    def cut_prompts(self, prompts: Sequence[str]) -> list[str]:
        """A line for each prompt that is longer than Stage C's text encoder takes."""
        self._share_parts()
        return self.prior_pipe.cut_prompts(prompts)

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        """Settings of every stage's bar."""
        super().set_progress_bar_config(**kwargs)
        for stage in (self.prior_pipe, self.decoder_pipe):
            if stage is not None:
                stage.set_progress_bar_config(**kwargs)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        prior_num_inference_steps: int | None = None,
        prior_timesteps: Times = None,
        prior_guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        decoder_timesteps: Times = None,
        decoder_guidance_scale: float = 0.0,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        prior_callback_on_step_end: Callback | None = None,
        prior_callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        use_text: bool | None = None,
        resolution: str = "refuse",
    ) -> ImagePipelineOutput | tuple[Any]:
        """Make pictures.

        Args are diffusers', and those of both stages' pipelines: `prior_...` are Stage C's, `decoder_...`,
        `num_inference_steps`, `use_text` and the plain callback Stage B's, which do not go with a `vae`.
        A size not given is the one trained at, else 512 px. `generator` is one for all pictures or a list of
        one a picture. `output_type` is "pil", "np" (B, H, W, 3 in [0, 1]), "pt" (B, 3, H, W) or "latent":
        Stage B's latents; with a `vae`, image embeddings. (A `WuerstchenAutoencoder` draws Stage B's noise by
        a seed of its own, so that a code always makes the same picture.)
        """
        of_decoder: dict[str, Any] = {
            "num_inference_steps": num_inference_steps,
            "decoder_timesteps": decoder_timesteps,
            "decoder_guidance_scale": decoder_guidance_scale or None,
            "use_text": use_text,
            "callback_on_step_end": callback_on_step_end,
        }
        self._check_call(output_type, of_decoder)
        side = self.default_side
        height, width = (side if each is None else each for each in (height, width))
        height, width = fit_size(height, width, self.size_multiple, resolution)
        self._share_parts()
        embeddings: Tensor = self.prior_pipe(
            prompt=prompt,
            height=height,
            width=width,
            num_inference_steps=prior_num_inference_steps,
            timesteps=prior_timesteps,
            guidance_scale=prior_guidance_scale,
            negative_prompt=negative_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            latents=latents,
            return_dict=False,
            callback_on_step_end=prior_callback_on_step_end,
            callback_on_step_end_tensor_inputs=prior_callback_on_step_end_tensor_inputs,
            prompt_attention_mask=prompt_attention_mask,
            negative_prompt_attention_mask=negative_prompt_attention_mask,
        )[0]
        if self.decoder_pipe is None:
            images = self._decode(embeddings, output_type)
        else:
            texts: dict[str, Any] = {}
            if self.text_encoder is not None and use_text is not False:
                texts["prompt"] = [""] * len(embeddings) if prompt is None else prompt
                texts["negative_prompt"] = negative_prompt
            images = self.decoder_pipe(
                embeddings,
                **texts,
                num_inference_steps=num_inference_steps,
                timesteps=decoder_timesteps,
                guidance_scale=decoder_guidance_scale,
                generator=generator,
                output_type=output_type,
                return_dict=False,
                callback_on_step_end=callback_on_step_end,
                callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
                use_text=use_text,
            )[0]
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _check_call(self, output_type: str, of_decoder: dict[str, Any]) -> None:
        if output_type not in WuerstchenDecoderPipeline.output_types:
            known = ", ".join(WuerstchenDecoderPipeline.output_types)
            raise ValueError(f"output_type {output_type!r}: unknown. Use {known}.")
        given = [name for name, value in of_decoder.items() if value is not None]
        if given and self.decoder_pipe is None:
            raise ValueError(
                f"{given[0]}: has no effect, pictures come from a {type(self.vae).__name__}. Leave it out."
            )

    def _decode(self, embeddings: Tensor, output_type: str) -> Any:
        """Pictures of image embeddings by the autoencoder."""
        if output_type == "latent":
            return embeddings
        fetch(self.vae)
        pictures = decode_latents(self.vae, scale_latents(self.vae, embeddings))
        return self.image_processor.postprocess(pictures, output_type)

    def _size_multiple(self, resolution_multiple: float) -> int:
        """Picture sides that every stage can make are multiples of it, in pixels."""
        multiple = whole_multiple(resolution_multiple)
        if self.decoder_pipe is not None:
            return math.lcm(multiple, self.decoder_pipe.size_multiple)
        return math.lcm(multiple, autoencoders.size_multiple(self.vae))

    def _share_parts(self) -> None:
        """Have the stages' pipelines hold the parts that this one holds now."""
        self.prior_pipe.register_modules(**self._parts_of_prior())
        if self.decoder_pipe is not None:
            self.decoder_pipe.register_modules(**self._parts_of_decoder())

    def _parts_of_prior(self) -> dict[str, Any]:
        return {
            "tokenizer": self.prior_tokenizer,
            "text_encoder": self.prior_text_encoder,
            "prior": self.prior_prior,
            "scheduler": self.prior_scheduler,
            "previewer": self.previewer,
        }

    def _parts_of_decoder(self) -> dict[str, Any]:
        names = ("tokenizer", "text_encoder", "decoder", "scheduler", "vqgan", "compressor")
        return {name: getattr(self, name) for name in names}

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Save as diffusers does, with the `pipeline.py` that lets plain diffusers open it."""
        super().save_pretrained(save_directory, *args, **kwargs)
        write_shim(self, save_directory)


def _check_stages(prior: Any, decoder: Any, scheduler: Any, vqgan: Any, vae: Any) -> None:
    """Raise `CheckpointError` unless all stages of one way to pictures are there and of one size of code."""
    if prior is None:
        raise CheckpointError("prior_prior: Stage C is missing. Give it, or use WuerstchenDecoderPipeline.")
    parts = {"decoder": decoder, "vqgan": vqgan, "scheduler": scheduler}
    missing = [name for name, part in parts.items() if part is None]
    if vae is not None and len(missing) < len(parts):
        raise CheckpointError("vae: takes the place of decoder, vqgan and scheduler. Give one or the others.")
    if vae is None and missing:
        raise CheckpointError(
            f"{' and '.join(missing)}: missing, so that no picture can be made of Stage C's codes. "
            "Give decoder, vqgan and scheduler, or a vae; Stage C alone is a WuerstchenPriorPipeline."
        )
    name, taken = ("decoder", decoder.config.effnet_embd) if vae is None else ("vae", latent_channels(vae))
    if prior.config.c_in != taken:
        raise CheckpointError(
            f"prior_prior makes codes of {prior.config.c_in} channels, {name} takes {taken}: "
            "they do not fit together. Use stages of one training."
        )


def _fingerprint(compressor: Any) -> str | None:
    """Of a compressor or autoencoder whose weights are whole; rounded ones no longer tell."""
    if compressor is None or compressor.dtype != torch.float32:
        return None
    return autoencoders.encoder_fingerprint(compressor)


def _check_compressors(of_prior: str | None, of_decoder: str | None) -> None:
    """Raise `CheckpointError` for stages of two compressors, where both say whose codes they know."""
    if None not in (of_prior, of_decoder) and of_prior != of_decoder:
        raise CheckpointError(
            f"prior_prior makes codes of the compressor {of_prior}, decoder or vae reads those of "
            f"{of_decoder}: they do not fit together. "
            "Use a prior trained on the codes of this very compressor."
        )
