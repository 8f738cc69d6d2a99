"""U-Nets on SDXL's noise schedule: one trained by itself, and students that are cut from a teacher."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, TypeVar

import torch
from diffusers import UNet2DConditionModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor, nn

from shoestring.build.average import begin_with, read_part
from shoestring.build.encoders import image_decoder, null_caption, scaling_of, text_encoder
from shoestring.build.looks import Drawn
from shoestring.build.student_cuts import student_spec
from shoestring.build.systems import Networks, Opened, Part, Product, System, mismatch
from shoestring.distill.few_step import LcmObjective
from shoestring.distill.objective import DistillationObjective
from shoestring.distill.taps import tap_pairs
from shoestring.evaluation.networks import network_rows
from shoestring.evaluation.run import held_out_loss
from shoestring.interfaces import MetricRow
from shoestring.models.network_files import INDEX, find_network, index_parts, read_config
from shoestring.models.unet_guidance import with_guidance_embedding
from shoestring.models.unet_lora_training import add_lora, lora_state, merged
from shoestring.models.unet_students import StudentSpec, copy_weights, student_config
from shoestring.models.unet_teachers import (
    STABLE_DIFFUSION_SCHEDULE,
    Teacher,
    load_unet,
    open_teacher,
)
from shoestring.objectives.noise import TIME_IDS, Conditioning, NoiseObjective, NoiseSchedule
from shoestring.pipelines.defaults import attach_sampling, sampling_of
from shoestring.pipelines.load import load
from shoestring.pipelines.unet import make_unet_pipeline
from shoestring.recipes.architectures import StudentModel, UNetModel
from shoestring.recipes.losses import LcmObjective as LcmSection
from shoestring.recipes.losses import NoiseObjective as NoiseSection
from shoestring.recipes.schema import Phase
from shoestring.runtime import pick_dtype
from shoestring.sampling.schedulers import make_noise_scheduler
from shoestring.storage import RunFolder, atomic_path

ADAPTER = "lora"
"""Folder of a run that holds the adapter alone, where one is trained."""

WALKS = 16
"""Images whose whole way a few-step student's teacher walks: a walk is up to twice `solver_steps` passes."""

Kind = TypeVar("Kind", UNetModel, StudentModel)


class _UNets(System[Kind]):
    """What both kinds share: conditions from the store, a pipeline with the store's encoders."""

    @cached_property
    def schedule(self) -> NoiseSchedule:
        return NoiseSchedule.from_config(self.scheduler_config)

    @property
    def scheduler_config(self) -> Mapping[str, Any]:
        raise NotImplementedError

    @property
    def config(self) -> dict[str, Any]:
        """The trained U-Net's configuration."""
        raise NotImplementedError

    @property
    def extra(self) -> tuple[str, ...]:
        if self.config.get("addition_embed_type") != "text_time":
            return ()
        return (
            ("size_crop", "pooled") if self.store.manifest["text_encoder"].get("pooled") else ("size_crop",)
        )

    def check(self) -> None:
        config, recipe, store = self.config, self.recipe, self.store
        if store.text_width != config["cross_attention_dim"]:
            raise mismatch(
                recipe,
                "data.text_encoder",
                f"its text is {store.text_width} wide, the U-Net reads {config['cross_attention_dim']}. "
                "Encode the store with the teacher's own text encoders.",
            )
        multiple = 2 ** (len(config["block_out_channels"]) - 1)
        for number, phase in enumerate(recipe.phases):
            channels, height, width = store.latent_shape(phase.size)
            if channels != config["in_channels"]:
                raise mismatch(
                    recipe,
                    "data.autoencoder",
                    f"latents have {channels} channels, the U-Net {config['in_channels']}. "
                    "Encode the store with the teacher's own autoencoder.",
                )
            if height % multiple or width % multiple:
                raise mismatch(
                    recipe,
                    f"phases.{number}.size",
                    f"{phase.size} px are {height} x {width} latents, which the U-Net halves "
                    f"{len(config['block_out_channels']) - 1} times: they must be multiples of {multiple}.",
                )

    def networks(self, phase: Phase) -> dict[str, nn.Module]:
        unet = self.unet()
        unet.boundary = (unet.conv_in, unet.conv_out)  # for the optimiser
        return {"unet": unet}

    def unet(self) -> Any:
        """The network to be trained, with fresh weights."""
        with self.initialising():
            return UNet2DConditionModel.from_config(self.config)

    def product(self, networks: Networks) -> Product:
        return Drawn(self, self.pipeline(networks), ("unet",))

    def opened(self, run: RunFolder) -> Opened:
        pipeline: Any = load(run.root)
        return Opened({"unet": pipeline.unet}, pipeline.vae, pipeline)

    def conditioning(self) -> Conditioning:
        """What the U-Net is told beside z and t, with the null caption that sampling uses."""
        null = self.recipe.objective.null_caption  # type: ignore[union-attr]
        empty = null_caption(self.recipe, self.store) if null == "empty" else None
        return Conditioning(
            self.config,
            null=null,
            null_text=None if empty is None else empty.tokens[0],
            null_pooled=None if empty is None or empty.pooled is None else empty.pooled[0],
            caption_drop=self.recipe.data.caption_drop,
            seed=self.recipe.seed,
        )

    def pipeline(self, networks: Networks) -> DiffusionPipeline:
        """A pipeline around the network: a stock one where the store's encoders are stock ones."""
        recipe, sampling = self.recipe, self.recipe.sampling
        assert sampling is not None, "checked by the recipe"
        scheduler: Any = make_noise_scheduler(
            sampling.scheduler, self.scheduler_config, prediction=self.schedule.prediction
        )
        if isinstance(recipe.objective, LcmSection):
            scheduler.register_to_config(original_inference_steps=recipe.objective.solver_steps)
        return make_unet_pipeline(
            networks["unet"],
            text=text_encoder(recipe, self.store),
            vae=image_decoder(recipe, self.store),
            scheduler=scheduler,
            null=recipe.objective.null_caption,  # type: ignore[union-attr]
            steps=sampling.steps,
            guidance=sampling.guidance,
            size=recipe.phases[-1].size,
            max_tokens=self.store.max_tokens,
            pad=self.store.pad,
            **scaling_of(recipe, self.store),
        )


class UNetSystem(_UNets[UNetModel]):
    """One U-Net, one turn, noise prediction."""

    @property
    def scheduler_config(self) -> Mapping[str, Any]:
        assert isinstance(self.recipe.objective, NoiseSection), "checked by the recipe"
        return {**STABLE_DIFFUSION_SCHEDULE, "prediction_type": self.recipe.objective.prediction}

    @cached_property
    def config(self) -> dict[str, Any]:
        """SDXL's make at the recipe's sizes: attention where a stage has a depth."""
        model, store = self.model, self.store
        channels, side, _ = store.latent_shape(self.recipe.phases[-1].size)
        pooled = store.manifest["text_encoder"].get("pooled") or store.text_width
        ids_width = min(256, model.block_out_channels[0])
        return {
            "sample_size": side,
            "in_channels": channels,
            "out_channels": channels,
            "down_block_types": [
                "CrossAttnDownBlock2D" if d else "DownBlock2D" for d in model.transformer_depth
            ],
            "up_block_types": [
                "CrossAttnUpBlock2D" if d else "UpBlock2D" for d in reversed(model.transformer_depth)
            ],
            "block_out_channels": list(model.block_out_channels),
            "layers_per_block": model.layers_per_block,
            "transformer_layers_per_block": [max(d, 1) for d in model.transformer_depth],
            "attention_head_dim": [max(1, width // model.head_dim) for width in model.block_out_channels],
            "cross_attention_dim": store.text_width,
            "use_linear_projection": True,
            "norm_num_groups": model.norm_groups,
            "resnet_time_scale_shift": "scale_shift" if model.time_scales else "default",
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": ids_width,
            "projection_class_embeddings_input_dim": pooled + TIME_IDS * ids_width,
        }

    def begin(self, networks: Networks) -> None:
        if self.recipe.init:
            begin_with(networks["unet"], self.recipe.init, "unet")

    def parts(self, networks: Networks) -> list[Part]:
        section = self.recipe.objective
        assert isinstance(section, NoiseSection), "checked by the recipe"
        objective = NoiseObjective(
            networks["unet"],
            self.schedule,
            self.conditioning(),
            seed=self.recipe.seed,
            weight=section.weight,
            weight_cap=section.weight_cap,
            sigma_data=section.sigma_data,
        )
        return [Part("unet", objective)]


class StudentSystem(_UNets[StudentModel]):
    """A U-Net that is cut from the teacher and learns from it; the teacher is read, never changed."""

    @cached_property
    def teacher(self) -> Teacher:
        return open_teacher(str(self.recipe.teacher))

    @cached_property
    def spec(self) -> StudentSpec:
        return student_spec(self.model)

    @property
    def scheduler_config(self) -> Mapping[str, Any]:
        return dict(self.teacher.scheduler.config)

    @cached_property
    def config(self) -> dict[str, Any]:
        return student_config(self.teacher.config, self.spec)

    def check(self) -> None:
        super().check()
        self._check_latents()
        if self.few_steps:
            self._check_null()

    def _check_latents(self) -> None:
        """Raise `RecipeError` where latents are scaled otherwise than the teacher learned them."""
        keys = ("latents_mean", "latents_std")
        ours, theirs = (
            None if given.get(keys[0]) is None else torch.tensor([given[key] for key in keys])
            for given in (scaling_of(self.recipe, self.store), self._around_teacher)
        )
        if ours is theirs is None:
            return
        if ours is None or theirs is None or not torch.allclose(ours, theirs, rtol=0.01, atol=0.01):
            told = "on the autoencoder's own scale. Set it to autoencoder."
            if theirs is not None:
                told = f"with the {' and '.join(keys)} of its pipeline. Use its run's store and `normalise`."
            raise mismatch(
                self.recipe,
                "data.normalise",
                f"{self.recipe.data.normalise} does not fit the teacher, which learned latents {told}",
            )

    def _check_null(self) -> None:
        """Raise `RecipeError` where the teacher would be guided against another null caption than its own."""
        null, theirs = self.recipe.objective.null_caption, _null_of(self._around_teacher)  # type: ignore[union-attr]
        if theirs is not None and theirs != null:
            raise mismatch(
                self.recipe,
                "objective.null_caption",
                f"{null}, but the teacher's pipeline is guided against {theirs}. Set it to {theirs}.",
            )

    def facts(self) -> dict[str, str]:
        return {"teacher": self.teacher.identity}

    def unet(self) -> Any:
        unet, section = super().unet(), self.recipe.objective
        if isinstance(section, LcmSection) and section.embed_guidance:
            unet = with_guidance_embedding(unet)
        if self.model.lora_rank:
            with self.initialising():
                add_lora(unet, self.model.lora_rank)
        return unet

    def begin(self, networks: Networks) -> None:
        unet, init, teacher = networks["unet"], self.recipe.init, self.teacher
        if init:  # a student of another run, plain where this one gets an adapter or an embedding
            weights = read_part(init, "unet")
            copy_weights(unet, weights, StudentSpec(), self.config, name=f"init {init}")
        else:
            named = f"teacher {self.recipe.teacher}"
            copy_weights(unet, teacher.tensors, self.spec, teacher.config, name=named)

    def parts(self, networks: Networks) -> list[Part]:
        recipe, unet = self.recipe, networks["unet"]
        numbers = recipe.objective.model_dump(
            exclude={"kind", "null_caption", "teacher_dtype", "taps", "embed_guidance"}
        )
        common = (unet, self._teacher_for(unet), self.schedule, self.conditioning())
        if isinstance(recipe.objective, LcmSection):
            return [Part("student", LcmObjective(*common, seed=recipe.seed, **numbers))]
        taps = recipe.objective.taps  # type: ignore[union-attr]
        pairs = tap_pairs(self.config, self.teacher.config, self.spec, taps) if taps else []
        return [Part("student", DistillationObjective(*common, pairs, seed=recipe.seed, **numbers))]

    def held_out_rows(
        self, parts: Sequence[Part], split: str, size: int, device: torch.device
    ) -> list[MetricRow]:
        """The task's loss, and how far the student's output is from the teacher's, where that is at hand."""
        rows = super().held_out_rows(parts, split, size, device)
        objective: Any = parts[0].objective
        if any(weight.is_meta for weight in objective.frozen.parameters()):  # the run is looked at
            return rows
        settings = self.recipe.evaluation
        images, beside = settings.loss_images, {"teacher_error": objective}
        if self.few_steps:
            images = min(images, WALKS)
        else:
            (cut,) = self.parts({"unet": self._cut})
            beside["cut_teacher_error"] = cut.objective.to(device)
        for name, each in beside.items():
            batches = (batch.to(device) for batch in self.held_out(split, size, images))
            found = held_out_loss(each.teacher_error_at, batches, settings.loss_levels, split=split)
            rows += [MetricRow(**{**row, "metric": name}) for row in found]
        return rows

    def references(self) -> Iterator[tuple[str, DiffusionPipeline]]:
        """The teacher, and the student as it is cut, before it has learned anything.

        The teacher draws with the scheduler, steps and guidance of its own pipeline; without one, as the
        student does, if that takes many steps. A few-step student was not cut, and nothing else draws as it.
        """
        if self._around_teacher or not self.few_steps:
            yield "teacher", self._teachers_pipeline()
        if not self.few_steps:
            yield "cut", self.pipeline({"unet": self._cut})

    def _teachers_pipeline(self) -> Any:
        pipeline: Any = self.pipeline({"unet": self._plain_teacher})
        if not self._around_teacher:
            return pipeline
        parts = [name for name in index_parts(self._around_teacher) if name != "scheduler"]
        own: Any = load(str(self.recipe.teacher), **dict.fromkeys(parts))  # without its networks
        pipeline.register_modules(scheduler=own.scheduler)
        attach_sampling(pipeline, sampling_of(own))
        return pipeline

    def network_rows(self, networks: Networks, device: torch.device) -> list[MetricRow]:
        phase = self.recipe.phases[-1]
        batch = next(self.held_out(self.held_out_split or "train", phase.size, 1)).to(device)
        told = self.conditioning()(batch, train=False)
        t = torch.full((1,), self.schedule.alphas_cumprod.numel() // 2, device=device)
        beside = {"teacher": self._plain_teacher.to(device), "student": networks["unet"]}
        return network_rows(beside, lambda network: network(batch.latents, t, **told), device)

    def product(self, networks: Networks) -> Product:
        return _Adapted(self, networks) if self.model.lora_rank else super().product(networks)

    @property
    def few_steps(self) -> bool:
        """Whether the student learns to sample in few steps."""
        return isinstance(self.recipe.objective, LcmSection)

    @cached_property
    def _around_teacher(self) -> dict[str, Any]:
        """The index (`model_index.json`) of the pipeline around the teacher; empty where there is none."""
        teacher = str(self.recipe.teacher)
        if teacher.endswith(".safetensors"):
            return {}
        found = find_network(teacher, ["unet"])
        return read_config(found.root / INDEX) if found.in_pipeline else {}

    def _teacher_for(self, student: nn.Module) -> nn.Module:
        """The teacher's network; on shapes alone where the student is, plain where that is measured."""
        weights = list(student.parameters())
        if weights[0].is_meta:
            with torch.device("meta"):
                teacher: nn.Module = UNet2DConditionModel.from_config(self.teacher.config)
            return teacher.eval()
        learns = any(weight.requires_grad for weight in weights)
        return self._loaded_teacher if learns else self._plain_teacher

    @cached_property
    def _loaded_teacher(self) -> nn.Module:
        """The teacher in the number type that the recipe trains with."""
        section: Any = self.recipe.objective
        where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        own = section.teacher_dtype in {"auto", "int8"}
        dtype = pick_dtype(self.recipe.train.dtype if own else section.teacher_dtype, where)
        return load_unet(str(self.recipe.teacher), dtype=dtype, int8=section.teacher_dtype == "int8")

    @cached_property
    def _plain_teacher(self) -> Any:
        """The teacher in float32, to be measured: read once, and held as long as this system."""
        return load_unet(str(self.recipe.teacher))

    @cached_property
    def _cut(self) -> nn.Module:
        """A student that has learned nothing, to be measured: made once, and held as long as this system."""
        networks = self.networks(self.recipe.phases[0])
        self.begin(networks)
        return networks["unet"].eval().requires_grad_(False)


def _null_of(index: Mapping[str, Any]) -> str | None:
    """What a pipeline guides against without a negative prompt, by its index; None where it does not say."""
    kind = str(index.get("_class_name"))
    if kind.startswith("StableDiffusionXL"):
        return "zeros" if index.get("force_zeros_for_empty_prompt", True) else "empty"
    return "empty" if kind.startswith("StableDiffusion") else index.get("null")


class _Adapted:
    """A student with an adapter: its pipeline has the adapter folded in, and the adapter lies beside it."""

    def __init__(self, system: StudentSystem, networks: Networks) -> None:
        self.unet = networks["unet"]
        self.drawn = Drawn(system, system.pipeline({"unet": merged(self.unet)}), ("unet",))

    def export(self, run: RunFolder) -> None:
        with self._folded():
            self.drawn.export(run)
        state: dict[str, Tensor] = lora_state(self.unet)
        with atomic_path(run.root / ADAPTER / "pytorch_lora_weights.safetensors") as aside:
            save_file({name: tensor.contiguous() for name, tensor in state.items()}, aside)

    def preview(self, run: RunFolder, images: int, device: torch.device) -> str:
        with self._folded():
            return self.drawn.preview(run, images, device)

    @contextmanager
    def _folded(self) -> Iterator[None]:
        """Within: the pipeline has the adapter of the moment folded in; it holds no weights otherwise."""
        unet: Any = self.drawn.pipeline.unet
        unet.load_state_dict(merged(self.unet).state_dict(), assign=True)
        yield
        unet.to_empty(device="meta")
