"""The stages of a cascade.

a  pictures -> latents -> pictures      a VQGAN against a discriminator: two turns
b  codes -> Stage A's latents           a diffusion decoder, trained with the compressor that makes the codes
c  text -> codes                        a diffusion prior on a store of codes
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from shoestring.build.average import begin_with
from shoestring.build.encoders import image_decoder, latents_of, null_text, scaling_of, text_encoder
from shoestring.build.looks import Drawn, preview_reconstructions
from shoestring.build.systems import Networks, Opened, Part, Product, System, mismatch
from shoestring.evaluation.run import mean_row
from shoestring.interfaces import MetricRow
from shoestring.models.autoencoders import load_autoencoder, weights_fingerprint
from shoestring.models.latent_previewer import LatentPreviewer
from shoestring.models.patch_discriminator import PatchDiscriminator
from shoestring.models.perceptual import load_perceptual
from shoestring.models.semantic_compressor import SemanticCompressor
from shoestring.models.sizes import nearest_sides
from shoestring.models.wuerstchen_autoencoder import (
    NULL_TEXT,
    WuerstchenAutoencoder,
    resolution_multiple,
    vq_factor,
)
from shoestring.models.wuerstchen_decoder import WuerstchenDiffNeXt
from shoestring.models.wuerstchen_prior import WuerstchenPrior
from shoestring.models.wuerstchen_vqgan import PaellaVQModel
from shoestring.objectives.cosine import PriorObjective
from shoestring.objectives.decoder import DecoderObjective, PreviewObjective
from shoestring.objectives.reconstruction import DiscriminatorObjective, ReconstructionObjective
from shoestring.pipelines import wuerstchen_published as published
from shoestring.pipelines.export import export
from shoestring.pipelines.load import load
from shoestring.pipelines.wuerstchen import WuerstchenCombinedPipeline
from shoestring.pipelines.wuerstchen_decoder import WuerstchenDecoderPipeline
from shoestring.recipes.architectures import DecoderModel, PriorModel, VqganModel
from shoestring.recipes.losses import DecoderObjective as DecoderSection
from shoestring.recipes.losses import ReconstructionObjective as ReconstructionSection
from shoestring.recipes.schema import Phase
from shoestring.sampling.schedulers import COSINE
from shoestring.storage import RunFolder, atomic_path, exported


class StageA(System[VqganModel]):
    """Turns: the generator; from `adversarial_start` on the discriminator too."""

    @property
    def section(self) -> ReconstructionSection:
        section = self.recipe.objective
        assert isinstance(section, ReconstructionSection), "checked by the recipe"
        return section

    def networks(self, phase: Phase) -> dict[str, nn.Module]:
        arguments = self.model.model_dump(exclude={"kind", "discriminator_hidden", "discriminator_depth"})
        networks: dict[str, nn.Module] = {}
        with self.initialising():
            networks["vqgan"] = PaellaVQModel(**arguments)
            if self.section.adversarial_weight:
                networks["discriminator"] = PatchDiscriminator(
                    c_hidden=self.model.discriminator_hidden, depth=self.model.discriminator_depth
                )
        return networks

    def begin(self, networks: Networks) -> None:
        if self.recipe.init:
            begin_with(networks["vqgan"], self.recipe.init, "vqgan")

    def parts(self, networks: Networks) -> list[Part]:
        section, discriminator = self.section, networks.get("discriminator")
        weights = section.model_dump(exclude={"kind", "perceptual", "adversarial_start", "crop"})
        objective = ReconstructionObjective(
            networks["vqgan"],
            seed=self.recipe.seed,
            perceptual=load_perceptual(section.perceptual) if section.perceptual_weight else None,
            discriminator=discriminator,
            crop=section.crop,
            **weights,
        )
        parts = [Part("generator", objective)]
        if discriminator is not None:
            other = DiscriminatorObjective(
                discriminator,
                networks["vqgan"],
                seed=self.recipe.seed,
                quantise_skip=section.quantise_skip,
                crop=section.crop,
            )
            start = section.adversarial_start
            parts.append(Part("discriminator", other, start=start, averaged=False))
        return parts

    def enter(self, phase: Phase, parts: Sequence[Part]) -> None:
        self.advance(phase, parts, 0)

    def advance(self, phase: Phase, parts: Sequence[Part], images: int) -> None:
        generator: Any = parts[0].objective
        generator.adversarial = len(parts) > 1 and self.start_of(phase) + images >= parts[1].start

    def states(self, phase: Phase) -> list[tuple[int, int]]:
        if not self.section.adversarial_weight:
            return super().states(phase)
        before = min(max(0, self.section.adversarial_start - self.start_of(phase)), phase.images)
        return [(start, count) for start, count in ((0, before), (before, phase.images - before)) if count]

    def product(self, networks: Networks) -> Product:
        return _StageAProduct(self, networks)

    def opened(self, run: RunFolder) -> Opened:
        vqgan = load_vqgan(str(run.root))
        return Opened({"vqgan": vqgan}, vqgan, None)

    def held_out_rows(
        self, parts: Sequence[Part], split: str, size: int, device: torch.device
    ) -> list[MetricRow]:
        objective: Any = parts[0].objective
        batches = self.held_out(split, size, self.recipe.evaluation.loss_images)
        with torch.no_grad():
            errors = [objective.reconstruction_error(batch.to(device)).cpu().double() for batch in batches]
        return [mean_row(torch.cat(errors), split, "all")]


class _StageAProduct:
    """The VQGAN, in `pipeline/vqgan`; its scale is what its last normalisation has learned."""

    def __init__(self, system: StageA, networks: Networks) -> None:
        self.system, self.vqgan = system, networks["vqgan"]

    def export(self, run: RunFolder) -> None:
        self.vqgan.settle_scale()
        with atomic_path(run.pipeline) as aside:
            self.vqgan.save_pretrained(aside / "vqgan")

    def preview(self, run: RunFolder, images: int, device: torch.device) -> str:
        self.vqgan.settle_scale()
        return preview_reconstructions(self.system, self.vqgan, run, images, device)


class StageB(System[DecoderModel]):
    """Turns: decoder and compressor together; the previewer, on the compressor's codes."""

    @cached_property
    def vqgan(self) -> PaellaVQModel:
        """The recipe's Stage A, read once; who changes it or moves it takes a copy."""
        return load_vqgan(self.model.vqgan)

    def check(self) -> None:
        with torch.device("meta"):
            compressor = SemanticCompressor(**self._compressor())
        multiple = resolution_multiple(
            compressor.stride,
            compressor.ratio,
            vq_factor(self.vqgan.config),
            self.model.patch_size,
            len(self.model.c_hidden),
        )
        for number, phase in enumerate(self.recipe.phases):
            if phase.size % multiple:
                around = " or ".join(map(str, sorted(nearest_sides(phase.size, multiple))))
                told = f"{phase.size} px, but this Stage B needs multiples of {multiple}; nearest: {around}."
                raise mismatch(self.recipe, f"phases.{number}.size", told)

    def facts(self) -> dict[str, str]:
        return {"model.vqgan": weights_fingerprint(self.vqgan)}

    def networks(self, phase: Phase) -> dict[str, nn.Module]:
        model = self.model
        outside = {"kind", "vqgan", "compressor", "text", "previewer"}
        channels = self.vqgan.config["latent_channels"]
        arguments = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in model.model_dump(exclude=outside).items()
        }
        networks: dict[str, nn.Module] = {}
        with self.initialising():
            networks["decoder"] = WuerstchenDiffNeXt(
                **arguments,
                c_in=channels,
                c_out=channels,
                effnet_embd=model.compressor.c_latent,
                clip_embd=self.store.text_width,
            )
            networks["compressor"] = SemanticCompressor(**self._compressor())
            if model.previewer:
                networks["previewer"] = LatentPreviewer(
                    c_in=model.compressor.c_latent, c_hidden=model.previewer
                )
        return networks

    def _compressor(self) -> dict[str, Any]:
        return self.model.compressor.model_dump(exclude={"weights"})

    def begin(self, networks: Networks) -> None:
        compressor: Any = networks["compressor"]
        if self.recipe.init:
            for name in networks:
                if name != "previewer" or _previewer_of(self.recipe.init):
                    begin_with(networks[name], self.recipe.init, name)
        elif self.model.compressor.weights:
            compressor.load_imagenet(self.model.compressor.weights)

    def parts(self, networks: Networks) -> list[Part]:
        section, previewer = self.recipe.objective, networks.get("previewer")
        assert isinstance(section, DecoderSection), "checked by the recipe"
        objective = DecoderObjective(
            networks["decoder"],
            networks["compressor"],
            copy.deepcopy(self.vqgan),
            seed=self.recipe.seed,
            null_text=null_text(self.recipe, self.store) if self.model.text else None,
            use_text=self.model.text,
            caption_drop=self.recipe.data.caption_drop if self.model.text else 0.0,
            previewer=previewer if section.code_weight else None,
            **section.model_dump(exclude={"kind"}),
        )
        parts = [Part("decoder", objective)]
        if previewer is not None and not section.code_weight:
            other = PreviewObjective(previewer, networks["compressor"], seed=self.recipe.seed)
            parts.append(Part("previewer", other, averaged=False))
        return parts

    def product(self, networks: Networks) -> Product:
        return _StageBProduct(self, networks)

    def opened(self, run: RunFolder) -> Opened:
        autoencoder: Any = load_autoencoder(str(run.root))
        networks = {"decoder": autoencoder.decoder, "compressor": autoencoder.compressor}
        if previewer := _previewer_of(str(run.root)):
            networks["previewer"] = previewer
        return Opened(networks, autoencoder, None)


class _StageBProduct:
    """A pipeline from codes to pictures that holds the compressor too, so that it is an autoencoder."""

    def __init__(self, system: StageB, networks: Networks) -> None:
        self.system = system
        recipe, vqgan = system.recipe, copy.deepcopy(system.vqgan)
        assert recipe.sampling is not None, "checked by the recipe"
        text = text_encoder(recipe, system.store) if system.model.text else None
        self.null_text = null_text(recipe, system.store) if system.model.text else None
        self.changing = tuple(networks)
        self.pipeline = WuerstchenDecoderPipeline(
            tokenizer=None if text is None else text.tokenizer,
            text_encoder=None if text is None else text.model,
            scheduler=COSINE[recipe.sampling.scheduler](),
            vqgan=vqgan,
            default_steps=recipe.sampling.steps,
            default_guidance=recipe.sampling.guidance,
            text_pad=system.store.pad,
            max_tokens=system.store.max_tokens,
            **networks,
        )
        decoder: Any = networks["decoder"]
        compressor: Any = networks["compressor"]
        self.autoencoder = WuerstchenAutoencoder.from_parts(
            vqgan, decoder, compressor, decode_steps=recipe.sampling.steps, null_text=self.null_text
        )

    def export(self, run: RunFolder) -> None:
        export(self.pipeline, run.pipeline, self.changing)
        if self.null_text is not None and not (run.pipeline / NULL_TEXT).is_file():
            with atomic_path(run.pipeline / NULL_TEXT) as aside:
                save_file({"null_text": self.null_text.contiguous()}, aside)

    def preview(self, run: RunFolder, images: int, device: torch.device) -> str:
        path = preview_reconstructions(self.system, self.autoencoder, run, images, device)
        self.autoencoder.vqgan.to("cpu")  # needed for pictures alone
        return path


class StageC(System[PriorModel]):
    """One turn on a store of codes, of a cascade or of any other autoencoder."""

    def networks(self, phase: Phase) -> dict[str, nn.Module]:
        channels, _, _ = self.store.latent_shape(phase.size)
        with self.initialising():
            arguments = self.model.model_dump(exclude={"kind", "text_std"})
            prior = WuerstchenPrior(**arguments, c_in=channels, c_cond=self.store.text_width)
            prior.reset_parameters(self.model.text_std)
        return {"prior": prior}

    def begin(self, networks: Networks) -> None:
        if self.recipe.init:
            begin_with(networks["prior"], self.recipe.init, "prior")

    def parts(self, networks: Networks) -> list[Part]:
        objective = PriorObjective(
            networks["prior"],
            seed=self.recipe.seed,
            null_text=null_text(self.recipe, self.store),
            caption_drop=self.recipe.data.caption_drop,
            **self.recipe.objective.model_dump(exclude={"kind"}),
        )
        return [Part("prior", objective)]

    def enter(self, phase: Phase, parts: Sequence[Part]) -> None:
        objective: Any = parts[0].objective
        objective.set_batches(phase.batch, self.start_of(phase))

    def product(self, networks: Networks) -> Product:
        recipe, store = self.recipe, self.store
        assert recipe.sampling is not None, "checked by the recipe"
        text = text_encoder(recipe, store)
        pipeline = WuerstchenCombinedPipeline(
            tokenizer=None,
            text_encoder=None,
            decoder=None,
            scheduler=None,
            vqgan=None,
            prior_tokenizer=text.tokenizer,
            prior_text_encoder=text.model,
            prior_prior=networks["prior"],
            prior_scheduler=COSINE[recipe.sampling.scheduler](),
            vae=image_decoder(recipe, store),
            previewer=_previewer_of(recipe.data.autoencoder),
            text_pad=store.pad,
            max_tokens=store.max_tokens,
            default_steps=recipe.sampling.steps,
            default_guidance=recipe.sampling.guidance,
            sample_size=store.latent_shape(recipe.phases[-1].size)[1],
            latents_of=latents_of(store),
            **scaling_of(recipe, store, always=True),
        )
        return Drawn(self, pipeline, ("prior_prior",))

    def opened(self, run: RunFolder) -> Opened:
        pipeline: Any = load(run.root)
        return Opened({"prior": pipeline.prior_prior}, pipeline.vae, pipeline)


def load_vqgan(path_or_id: str) -> PaellaVQModel:
    """The Stage A of a run, folder, file or hub repository, frozen; raises `CheckpointError` without one."""
    folder = exported(path_or_id)
    with torch.device("cpu"):  # also where networks are being made on shapes alone
        model = published.load_vqgan(folder if folder.exists() else path_or_id)
    model.requires_grad_(False)
    return model.eval()


def _previewer_of(path: str) -> LatentPreviewer | None:
    """The previewer that was trained with a Stage B, where `path` is a run or folder that holds one."""
    for folder in (RunFolder(Path(path)).pipeline, Path(path)):
        if (folder / "previewer" / "config.json").is_file():
            return LatentPreviewer.from_pretrained(
                folder / "previewer", use_safetensors=True, low_cpu_mem_usage=False
            )
    return None
