"""WuerstchenDecoderPipeline: Würstchen's Stages B and A, image embeddings to pictures.

image embeddings (B, 16, h, w), text or none --decoder.project, once--> mapped codes, keys and values
noise (B, 4, H / 4, W / 4) --scheduler: decoder a step--> latents --scale_factor, Stage A--> pictures
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMWuerstchenScheduler
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from torch import Tensor, nn

from shoestring.models.autoencoders import PIXELS_AT_ONCE
from shoestring.models.latent_previewer import LatentPreviewer
from shoestring.models.semantic_compressor import SemanticCompressor
from shoestring.models.wuerstchen_autoencoder import vq_factor
from shoestring.models.wuerstchen_decoder import WuerstchenDiffNeXt
from shoestring.models.wuerstchen_vqgan import PaellaVQModel
from shoestring.pipelines.calls import Callback, Generators, first_noise
from shoestring.pipelines.prompts import repeat
from shoestring.pipelines.shim import write_shim
from shoestring.pipelines.wuerstchen_sampling import DenoisingStage, Times, fetch
from shoestring.pipelines.wuerstchen_sizes import fit_size, scaled_cells

PUBLISHED_SCALE = 10.67
PUBLISHED_NULL_TOKENS = 77

Embeddings = Tensor | np.ndarray[Any, Any] | Sequence[Tensor]


class WuerstchenDecoderPipeline(DenoisingStage, DiffusionPipeline):
    """Pictures from image embeddings; names and arguments as in diffusers.

    Args beyond diffusers':
        compressor: the network whose codes these are; with it `reconstruct` takes pictures.
        previewer: a small network from codes to small pictures, kept for Stage C's pipelines.
        null_tokens: zero tokens that Stage B sees where it gets no text; 0: none. None: 77, as published,
            with a text encoder, and none without.
        text_pad, max_tokens: as for `WuerstchenPriorPipeline`.
        default_steps, default_guidance: what a call uses that gives none.
        latents_of: fingerprint of the compressor whose codes the decoder was trained on.

    `latent_dim_scale`, Stage B's cells along a side for each cell of the code, follows from the compressor
    where there is one, else it is the published 10.67. `text_encoder` and `tokenizer` may be None: Stage B
    then works without text. The published one loses nothing by that (arXiv 2306.00637, appendix J), and
    spares a text encoder of 353 M parameters.
    """

    model_cpu_offload_seq = "text_encoder->compressor->decoder->vqgan"
    _optional_components = ["tokenizer", "text_encoder", "compressor", "previewer"]
    _callback_tensor_inputs = [
        "latents",
        "text_encoder_hidden_states",
        "negative_prompt_embeds",
        "image_embeddings",
    ]
    output_types = ("pil", "np", "pt", "latent")

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: nn.Module | None,
        decoder: WuerstchenDiffNeXt,
        scheduler: DDPMWuerstchenScheduler,
        vqgan: PaellaVQModel,
        latent_dim_scale: float | None = None,
        compressor: SemanticCompressor | None = None,
        previewer: LatentPreviewer | None = None,
        null_tokens: int | None = None,
        text_pad: str = "masked",
        max_tokens: int | None = None,
        default_steps: int = 12,
        default_guidance: float = 0.0,
        latents_of: str | None = None,
    ) -> None:
        super().__init__()
        if latent_dim_scale is None:
            latent_dim_scale = PUBLISHED_SCALE
            if compressor is not None:
                latent_dim_scale = float(compressor.stride / compressor.ratio / vq_factor(vqgan.config))
        if null_tokens is None:
            null_tokens = 0 if text_encoder is None else PUBLISHED_NULL_TOKENS
        self.register_modules(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            decoder=decoder,
            scheduler=scheduler,
            vqgan=vqgan,
            compressor=compressor,
            previewer=previewer,
        )
        self.register_to_config(
            latent_dim_scale=latent_dim_scale,
            null_tokens=null_tokens,
            text_pad=text_pad,
            max_tokens=max_tokens,
            default_steps=default_steps,
            default_guidance=default_guidance,
            latents_of=latents_of,
        )
        self.image_processor = VaeImageProcessor(do_normalize=False)

    @property
    def grid(self) -> int:
        """Stage B's latents must be multiples of this many cells along each side: 16 as published."""
        config = self.decoder.config
        return int(config.patch_size * 2 ** (len(config.c_hidden) - 1))

    @property
    def unit(self) -> int:
        """Image embeddings must be multiples of this many cells along each side: 3 as published."""
        scale = self.config.latent_dim_scale
        for count in range(1, 4 * self.grid):
            latents = scaled_cells(count, scale)
            if latents and latents % self.grid == 0:
                return count
        raise ValueError(f"latent_dim_scale {scale}: no code fits a decoder whose grid is {self.grid} cells.")

    @property
    def size_multiple(self) -> int:
        """Picture sides are multiples of it, in pixels: 128 as published."""
        return scaled_cells(self.unit, self.config.latent_dim_scale) * vq_factor(self.vqgan.config)

    def check_embeddings(self, image_embeddings: Tensor) -> None:
        """Raise `ValueError` for codes that this decoder cannot take."""
        channels, unit = self.decoder.config.effnet_embd, self.unit
        shape = tuple(image_embeddings.shape)
        if len(shape) != 4 or shape[1] != channels or not all(shape):
            raise ValueError(f"image_embeddings of shape {shape}: must be (B, {channels}, h, w).")
        if any(side % unit for side in shape[2:]):
            nearest = [max(1, round(side / unit)) * unit for side in shape[2:]]
            raise ValueError(
                f"image_embeddings of {shape[2]} x {shape[3]} cells: both must be multiples of {unit} "
                f"(pictures of {self.size_multiple} px); nearest: {nearest[0]} x {nearest[1]}."
            )

    @torch.no_grad()
    def __call__(
        self,
        image_embeddings: Embeddings,
        prompt: str | list[str] | None = None,
        num_inference_steps: int | None = None,
        timesteps: Times = None,
        guidance_scale: float | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        use_text: bool | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Make `num_images_per_prompt` pictures of each of the image embeddings (B, C, h, w).

        Args are diffusers'. Prompts are one for all embeddings, or one for the same number of them each.
        `guidance_scale` up to 1 is none; the unconditional has an empty prompt and a code of zeros.
        `use_text=False` has Stage B see `null_tokens` zeros and no text; None: text where there is an
        encoder. `output_type` is "pil", "np" (B, H, W, 3 in [0, 1]), "pt" (B, 3, H, W) or "latent".
        """
        config = self.config
        steps = config.default_steps if num_inference_steps is None else num_inference_steps
        guidance = config.default_guidance if guidance_scale is None else guidance_scale
        self.check_call(steps, timesteps, guidance, callback_on_step_end_tensor_inputs, output_type)
        self._guidance_scale = float(guidance)
        device = self._execution_device
        codes = repeat(_as_tensor(image_embeddings).float(), num_images_per_prompt, device)
        self.check_embeddings(codes)

        count = len(codes)
        if self._with_text(use_text, prompt, negative_prompt, prompt_embeds):
            states, mask = self._text_for(
                count,
                "" if prompt is None and prompt_embeds is None else prompt,
                negative_prompt,
                (prompt_embeds, prompt_attention_mask),
                (negative_prompt_embeds, negative_prompt_attention_mask),
            )
        else:
            states, mask = self._no_text(2 * count if self.do_classifier_free_guidance else count, device)
        sides = tuple(scaled_cells(side, config.latent_dim_scale) for side in codes.shape[2:])
        self.set_times(steps, timesteps, device)
        latents = first_noise((count, self.decoder.config.c_in, *sides), device, generator, latents)
        negative = states[count:] if states is not None and self.do_classifier_free_guidance else None
        latents = self.denoise(
            self.decoder,
            latents,
            {
                "text_encoder_hidden_states": states,
                "negative_prompt_embeds": negative,
                "image_embeddings": codes,
            },
            self._conditions(mask, sides),
            generator,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )
        images: Any = latents
        if output_type != "latent":
            images = self.image_processor.postprocess(self.decode(latents), output_type, [False] * count)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @torch.no_grad()
    def reconstruct(self, images: Any, resolution: str = "refuse", **call: Any) -> Any:
        """Pictures through the compressor, Stage B and Stage A: what of them survives.

        `images` is one or a list of PIL pictures, or arrays or tensors in [0, 1]; `call` goes to the
        pipeline's call. Raises `ValueError` without a compressor and for sizes that do not fit.
        """
        if self.compressor is None:
            raise ValueError(
                "This pipeline has no compressor, which image embeddings come from. "
                "Give one: WuerstchenDecoderPipeline(compressor=...)."
            )
        pictures = self.image_processor.preprocess(images)
        height, width = fit_size(pictures.shape[-2], pictures.shape[-1], self.size_multiple, resolution)
        if (height, width) != tuple(pictures.shape[-2:]):
            pictures = nn.functional.interpolate(
                pictures, (height, width), mode="bilinear", antialias=True, align_corners=False
            )
        fetch(self.compressor)
        codes = self.compressor.compress(pictures.to(self._execution_device))
        return self(codes, **call)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Stage B's latents (B, 4, h, w) -> pictures (B, 3, H, W) in [0, 1], float32, a few at a time."""
        raw = (latents * self.vqgan.config.scale_factor).to(self.vqgan.dtype)
        pixels = raw.shape[-2] * raw.shape[-1] * vq_factor(self.vqgan.config) ** 2
        parts = raw.split(max(1, PIXELS_AT_ONCE // pixels))
        return torch.cat([self.vqgan.decode(part).sample.float().clamp(0, 1) for part in parts])

    def _with_text(self, use_text: bool | None, *given: Any) -> bool:
        """Whether this call gives Stage B text; raises `ValueError` for text that nobody would see."""
        if use_text is not False and (self.text_encoder is not None or given[-1] is not None):
            return True
        if use_text:
            raise ValueError("use_text=True: this decoder has no text encoder. Give one, or prompt_embeds.")
        if any(each is not None for each in given):
            why = "use_text=False" if use_text is False else "this decoder has no text encoder"
            raise ValueError(f"prompt: has no effect, {why}. Leave prompt, negative_prompt and embeds out.")
        return False

    def _text_for(
        self,
        count: int,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None,
        embeds: tuple[Tensor | None, Tensor | None],
        negative_embeds: tuple[Tensor | None, Tensor | None],
    ) -> tuple[Tensor | None, Tensor | None]:
        """Text of `count` rows (twice with guidance), each prompt for the same number of codes in a row."""
        if embeds[0] is not None:
            given = len(embeds[0])
        else:
            given = 1 if isinstance(prompt, str) else len(prompt or ())
        if not given or count % given:
            raise ValueError(f"{given} prompts for {count} pictures: give one, or one for each.")
        return self.encode_prompt(
            prompt,
            self._execution_device,
            count // given,
            self.do_classifier_free_guidance,
            negative_prompt,
            embeds[0],
            negative_embeds[0],
            embeds[1],
            negative_embeds[1],
        )

    def _no_text(self, rows: int, device: torch.device) -> tuple[Tensor | None, None]:
        """`null_tokens` zeros for each row, or None where there are none."""
        tokens, width = self.config.null_tokens, self.decoder.config.clip_embd
        return (torch.zeros(rows, tokens, width, device=device) if tokens else None), None

    def _conditions(
        self, mask: Tensor | None, size: tuple[int, ...]
    ) -> Callable[[dict[str, Any], bool], dict[str, Any]]:
        """What depends on code and text alone, projected once for all steps."""

        def conditions(tensors: dict[str, Any], guided: bool) -> dict[str, Any]:
            codes, text = tensors["image_embeddings"], tensors["text_encoder_hidden_states"]
            if guided:
                codes = torch.cat([codes, torch.zeros_like(codes)])
            rows = len(codes)
            return {
                "projected": self.decoder.project(
                    codes,
                    None if text is None else text[:rows],
                    None if mask is None else mask[:rows],
                    size=size,
                )
            }

        return conditions

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Save as diffusers does, with the `pipeline.py` that lets plain diffusers open it."""
        super().save_pretrained(save_directory, *args, **kwargs)
        write_shim(self, save_directory)


def _as_tensor(image_embeddings: Embeddings) -> Tensor:
    """One tensor (B, C, h, w) of a tensor, an array or a list of tensors."""
    if isinstance(image_embeddings, Tensor):
        return image_embeddings
    if isinstance(image_embeddings, np.ndarray):
        return torch.from_numpy(image_embeddings)
    return torch.cat(list(image_embeddings))
