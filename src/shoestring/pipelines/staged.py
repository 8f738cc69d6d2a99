"""Pictures by a memory plan: text encoders, U-Net and autoencoder are loaded one after the other, and let go.

    prompts --text encoders--> embeddings --U-Net--> latents --autoencoder--> pictures
             of all batches,  (on the CPU)          (on the CPU)
             then released

What a stage computes is what the pipeline's own code computes: `encode_prompt`, then its call with embeddings
and `output_type="latent"`. Decoding is the end of the stock calls, written out since it has no door there.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from PIL import Image
from torch import Tensor, nn

from shoestring.models.autoencoders import decode_latents, spatial_factor
from shoestring.models.quiet import muted, no_bars
from shoestring.models.unet_teachers import load_unet
from shoestring.pipelines.calls import as_decoded
from shoestring.pipelines.defaults import IMPORTS, Sampling, sampling_of, scheduler_of
from shoestring.pipelines.generate import Picture, cuts_untold, warn_cut_prompts
from shoestring.pipelines.load import load, open_index, whole
from shoestring.pipelines.memory import MemoryPlan, Stage, plan_memory, require_int8
from shoestring.pipelines.memory_parts import Parts, check_kind, read_parts, set_tile
from shoestring.pipelines.parts import use_scheduler, use_tiny_decoder
from shoestring.pipelines.unet import UNetPipeline
from shoestring.sampling.schedulers import check_steps

_EMBEDS = {
    "StableDiffusionXLPipeline": (
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    ),
    "StableDiffusionPipeline": ("prompt_embeds", "negative_prompt_embeds"),
    "UNetPipeline": (
        "prompt_embeds",
        "prompt_attention_mask",
        "pooled_prompt_embeds",
        "negative_prompt_embeds",
        "negative_prompt_attention_mask",
        "negative_pooled_prompt_embeds",
    ),
}
"""What each class's `encode_prompt` gives, in its order, as its call takes it."""

_NETWORKS = {
    "StableDiffusionXLPipeline": ("text_encoder", "text_encoder_2", "unet", "vae", "image_encoder"),
    "StableDiffusionPipeline": ("text_encoder", "unet", "vae", "safety_checker", "image_encoder"),
    "UNetPipeline": ("text_encoder", "unet", "vae"),
}
_TEXT = ("text_encoder", "text_encoder_2")
_DECODE = ("vae", "safety_checker")

_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
_LARGE = 2**20

Tell = Callable[[str], object]


@dataclass(frozen=True)
class _Batch:
    """Pictures made at once, and what the stages so far have made of them, on the CPU."""

    prompts: list[str]
    seeds: list[int]
    made: Any = None


class StagedPipeline:
    """A pipeline with a U-Net, opened without its weights: each stage loads what it runs and lets it go.

    `path_or_id` is a run, a pipeline's folder or a hub id; `scheduler` and `tiny_decoder` are those of
    `use_scheduler` and `use_tiny_decoder`. Raises `CheckpointError` where there is no pipeline or not all of
    it as safetensors, and `RecipeError` for one of another kind.
    """

    def __init__(
        self, path_or_id: str | Path, *, scheduler: str | None = None, tiny_decoder: str | None = None
    ) -> None:
        name, index = open_index(path_or_id, None)
        self.kind = str(index["_class_name"])
        check_kind(self.kind, path_or_id)
        self.folder = Path(name) if Path(name).is_dir() else _download(name)
        self._scheduler, self._tiny = scheduler, tiny_decoder
        opened = self._load(())
        self.sampling: Sampling = sampling_of(opened)
        self.scheduler: SchedulerMixin = scheduler_of(opened)

    @cached_property
    def parts(self) -> Parts:
        """Shapes of its networks, with the tiny decoder in place of its own where one is given."""
        if self._tiny is None:
            return read_parts(self.folder)
        checked = self._load(("vae",))
        return read_parts(self.folder, checked.vae)

    def guided(self, guidance: float) -> bool:
        """Whether guidance of this scale takes two evaluations: some networks are told the scale."""
        return guidance > 1 and self.parts.unet.config.time_cond_proj_dim is None

    def plan(
        self,
        budget: int,
        *,
        device: str = "cpu",
        batch: int = 1,
        guidance: float | None = None,
        size: tuple[int, int] | None = None,
    ) -> MemoryPlan:
        """`plan_memory` for this pipeline; guidance not given is its own."""
        guided = self.guided(self.sampling.guidance if guidance is None else guidance)
        return plan_memory(self.parts, budget, device=device, size=size, batch=batch, guided=guided)

    def generate(
        self,
        plan: MemoryPlan,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        steps: int | None = None,
        guidance: float | None = None,
        tell: Tell = lambda line: None,
    ) -> Iterator[Picture]:
        """One picture for each (prompt, seed), in order, as `generate` draws them from a loaded pipeline.

        Equal to it bit for bit where the plan keeps the number type, the pictures at once and a whole decode.
        All batches go through one stage before the next is loaded. `tell` gets a line for each cut prompt.
        Raises `RecipeError` at once for more steps than its scheduler has times.
        """
        steps = self.sampling.steps if steps is None else steps
        guidance = self.sampling.guidance if guidance is None else guidance
        check_steps(self.scheduler, steps)
        return self._drawn(plan, prompts, seeds, steps, guidance, tell)

    def _drawn(
        self,
        plan: MemoryPlan,
        prompts: Sequence[str],
        seeds: Sequence[int],
        steps: int,
        guidance: float,
        tell: Tell,
    ) -> Iterator[Picture]:
        """Pictures by one stage after the other."""
        if torch.device(plan.device).type == "cpu":
            return_large_blocks()
        size = plan.denoise.batch
        batches = [
            _Batch(list(prompts[start : start + size]), list(seeds[start : start + size]))
            for start in range(0, len(prompts), size)
        ]
        batches = self._encode(plan.text, batches, guided=self.guided(guidance), tell=tell)
        batches = self._denoise(plan, batches, steps, guidance)
        scheduler = type(self.scheduler).__name__
        for batch, images in self._decode(plan, batches):
            for image, prompt, seed in zip(images, batch.prompts, batch.seeds, strict=True):
                yield Picture(image, prompt, seed, steps, guidance, scheduler)

    @torch.no_grad()
    def _encode(self, stage: Stage, batches: list[_Batch], *, guided: bool, tell: Tell) -> list[_Batch]:
        """Embeddings of each batch's prompts, by the names of a call's arguments."""
        pipeline = self._load(_TEXT, stage).to(stage.device)
        prompts = dict.fromkeys(prompt for batch in batches for prompt in batch.prompts)
        for line in warn_cut_prompts(pipeline, list(prompts)):
            tell(line)
        made = []
        for batch in batches:
            with cuts_untold(pipeline):
                encoded = pipeline.encode_prompt(
                    prompt=batch.prompts,
                    device=torch.device(stage.device),
                    num_images_per_prompt=1,
                    do_classifier_free_guidance=guided,
                )
            embeds = zip(_EMBEDS[self.kind], encoded, strict=True)
            here = {name: value.cpu() for name, value in embeds if value is not None}
            made.append(_Batch(batch.prompts, batch.seeds, here))
        del pipeline, encoded
        _release(stage.device)
        return made

    def _denoise(self, plan: MemoryPlan, batches: list[_Batch], steps: int, guidance: float) -> list[_Batch]:
        """Latents of each batch."""
        stage = plan.denoise
        kept = ("vae",) if self.kind == UNetPipeline.__name__ else ()  # whose call asks it for sizes
        pipeline = self._load(kept, stage, unet=self._unet(stage))
        if not kept:
            pipeline.vae_scale_factor = spatial_factor(self.parts.vae)
        pipeline.to(stage.device)
        pipeline.set_progress_bar_config(disable=True)
        made = []
        for batch in batches:
            latents = pipeline(
                **{name: _cast(value, stage) for name, value in batch.made.items()},
                height=plan.height,
                width=plan.width,
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=[torch.Generator("cpu").manual_seed(seed) for seed in batch.seeds],
                output_type="latent",
            ).images
            made.append(_Batch(batch.prompts, batch.seeds, latents.cpu()))
        del pipeline, latents
        _release(stage.device)
        return made

    def _unet(self, stage: Stage) -> UNet2DConditionModel:
        """The U-Net on the CPU, in 8-bit by diffusers' quantiser where the stage says so."""
        if not stage.int8:
            return load_unet(self.folder, dtype=stage.dtype)
        require_int8()
        from diffusers.quantizers.quantization_config import TorchAoConfig
        from torchao.quantization import Int8WeightOnlyConfig

        with no_bars():
            unet: UNet2DConditionModel = UNet2DConditionModel.from_pretrained(
                self.folder / "unet",
                quantization_config=TorchAoConfig(Int8WeightOnlyConfig()),
                torch_dtype=stage.dtype,
                use_safetensors=True,
            )
        return unet.eval().requires_grad_(False)

    @torch.no_grad()
    def _decode(self, plan: MemoryPlan, batches: list[_Batch]) -> Iterator[tuple[_Batch, list[Image.Image]]]:
        """Pictures of each batch's latents, as many at once as the plan says."""
        stage = plan.decode
        pipeline = self._load(_DECODE, stage)
        set_tile(pipeline.vae, stage.tile)
        pipeline.to(stage.device)
        for batch in batches:
            images: list[Image.Image] = []
            for latents in batch.made.split(stage.batch):
                images += _pictures(pipeline, latents.to(stage.device))
            yield batch, images

    def _load(self, wanted: Sequence[str], stage: Stage | None = None, **given: nn.Module) -> Any:
        """The pipeline with these networks alone, in a stage's number type, and all that has no weights."""
        absent = {name: None for name in _NETWORKS[self.kind] if name not in wanted}
        dtype = torch.float32 if stage is None else stage.dtype
        with muted("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion", about="safety checker"):
            pipeline = load(self.folder, dtype=dtype, **(absent | given))
        if self._scheduler is not None:
            use_scheduler(pipeline, self._scheduler)
        if self._tiny is not None and "vae" in wanted:
            use_tiny_decoder(pipeline, self._tiny)
        return pipeline


def _download(name: str) -> Path:
    """A repository's folder in the hub's cache; raises `CheckpointError` where parts are no safetensors."""
    with no_bars(), muted(*IMPORTS), whole(name):
        return Path(DiffusionPipeline.download(name, use_safetensors=True))


def _pictures(pipeline: Any, latents: Tensor) -> list[Image.Image]:
    """The end of the pipeline's call: latents (B, C, h, w) -> pictures."""
    vae = pipeline.vae
    if isinstance(pipeline, UNetPipeline):
        decoded = decode_latents(vae, as_decoded(pipeline.config, vae, latents))
        return list(pipeline.image_processor.postprocess(decoded, output_type="pil"))
    config, flagged = vae.config, None
    latents = latents.to(vae.dtype)
    mean, std = (config.get(name) for name in ("latents_mean", "latents_std"))
    if mean is None or std is None:
        latents = latents / config.scaling_factor
    else:
        mean, std = (latents.new_tensor(each).view(1, -1, 1, 1) for each in (mean, std))
        latents = latents * std / config.scaling_factor + mean
    images = vae.decode(latents, return_dict=False)[0]
    if hasattr(pipeline, "run_safety_checker"):
        images, flagged = pipeline.run_safety_checker(images, latents.device, vae.dtype)
    if getattr(pipeline, "watermark", None) is not None:
        images = pipeline.watermark.apply_watermark(images)
    shown = [not each for each in flagged] if flagged is not None else [True] * len(images)
    return list(pipeline.image_processor.postprocess(images, output_type="pil", do_denormalize=shown))


def _cast(value: Tensor, stage: Stage) -> Tensor:
    """On the stage's device, in its number type unless it is a mask."""
    return value.to(stage.device, stage.dtype if value.is_floating_point() else None)


def _release(device: str) -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.empty_cache()
    elif kind == "mps":
        torch.mps.empty_cache()


def return_large_blocks() -> None:
    """Let glibc return every freed block of a megabyte or more to the system at once.

    Left alone, it raises that threshold to 32 MiB as blocks are freed, and a stage's weights and tensors then
    leave holes that the next one does not fill: up to 1.9 times what is in use (measured), against 1.1.
    Elsewhere than on glibc nothing happens.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(_M_MMAP_THRESHOLD, _LARGE)
