"""What a recipe may say: every key with its type, range and default; checks between keys are in `checks`.

Unknown keys are refused, and so is a setting that would have no effect. Progress is counted in images:
such counts take 512000000, "512M", "5.12M" or "50k". The reference for users is docs/recipes.md.
"""

from __future__ import annotations

import itertools
import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from shoestring.recipes.architectures import MicroDiTModel, Model
from shoestring.recipes.checks import problems
from shoestring.recipes.fields import (
    Count,
    CountOrNone,
    Decay,
    Images,
    Name,
    NotNegative,
    Number,
    Positive,
    Section,
    Share,
    SomeImages,
    Text,
    Whole,
    Width,
)
from shoestring.recipes.losses import Objective


def _one_or_section(value: Any) -> str:
    return "section" if isinstance(value, (dict, BaseModel)) else "one"


def _same_or_given(value: Any) -> str:
    return "none" if value is None else "same" if isinstance(value, str) and value == "same" else "given"


class Scenes(Section):
    """Procedural captioned pictures, made and encoded when the run starts."""

    level: Literal["cells", "free"] = "cells"
    size: Annotated[Whole, Field(ge=8, le=1024)] = 32
    images: SomeImages
    seed: CountOrNone = 0
    held_out: SomeImages = 1024
    objects: Annotated[Whole, Field(ge=1, le=3)] = 3


class Data(Section):
    """Where encoded images and text come from: a store, or scenes."""

    store: Text | None = None
    scenes: Scenes | None = None
    captions: Annotated[tuple[Text, ...], Field(min_length=1)] | None = None
    window: Count | None = None
    autoencoder: Text = "pixels"
    text_encoder: Text = "hashing"
    pad: Literal["none", "encoder", "masked"] = "none"
    max_tokens: Width | None = None
    normalise: Literal["autoencoder", "measured", "x42-1"] = "autoencoder"
    caption_drop: Share = 0.1

    @property
    def padded(self) -> bool:
        """Every caption has as many tokens as any other."""
        return self.pad != "none"


class AdamW(Section):
    """AdamW for every parameter; experts' matrices at `expert_lr_ratio` times the phase's rate."""

    kind: Literal["adamw"] = "adamw"
    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: NotNegative = 0.0
    expert_lr_ratio: Positive = 1.0


class Muon(Section):
    """Muon for hidden matrices (and `kernels`) at `lr_ratio` times the phase's rate; AdamW for the rest."""

    kind: Literal["muon"] = "muon"
    lr_ratio: Positive = 10.0
    momentum: Share = 0.95
    kernels: bool = False
    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: NotNegative = 0.0
    expert_lr_ratio: Positive = 1.0


class Ema(Section):
    """Averages of the weights, one a decay (per step), from `start` images into the phase on."""

    decays: Annotated[tuple[Decay, ...], Field(min_length=1)]
    start: Images = 0


class MaskRamp(Section):
    """A mask ratio that goes from `start` to `end` in a phase, one ratio for each of `steps` stretches."""

    start: Share
    end: Share = 0.0
    schedule: Literal["linear", "cosine"] = "linear"
    steps: Annotated[Whole, Field(ge=2, le=32)] = 8

    def ratio(self, step: int) -> float:
        """The ratio of stretch 0 (`start`) to steps - 1 (`end`)."""
        done = step / (self.steps - 1)
        if self.schedule == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return round((1 - done) * self.start + done * self.end, 12)


Optimizer = Annotated[AdamW | Muon, Field(discriminator="kind")]
PhaseEma = Annotated[
    Annotated[Ema, Tag("given")] | Annotated[None, Tag("none")] | Annotated[Literal["same"], Tag("same")],
    Discriminator(_same_or_given),
]
Mask = Annotated[
    Annotated[Share, Tag("one")] | Annotated[MaskRamp, Tag("section")], Discriminator(_one_or_section)
]
PhaseMicrobatch = Annotated[
    Annotated[Count, Tag("given")] | Annotated[None, Tag("none")] | Annotated[Literal["same"], Tag("same")],
    Discriminator(_same_or_given),
]
PhaseClip = Annotated[
    Annotated[Positive, Tag("given")]
    | Annotated[None, Tag("none")]
    | Annotated[Literal["same"], Tag("same")],
    Discriminator(_same_or_given),
]


class Phase(Section):
    """A stretch of training at one resolution, mask ratio, batch and learning-rate schedule."""

    name: Name
    size: Count
    images: SomeImages
    batch: Count
    mask: Mask = 0.0
    lr: Positive
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup: Images = 0
    final: Annotated[Number, Field(ge=0, le=1)] | None = None
    position_scale: Positive = 1.0
    objective: dict[str, Number | None] = {}
    ema: PhaseEma = "same"
    grad_clip: PhaseClip = "same"
    microbatch: PhaseMicrobatch = "same"
    optimizer: Literal["same", "fresh"] = "same"

    def mask_at(self, images: int) -> float:
        """The mask ratio of a batch that begins after `images` of the phase, for every image in it."""
        if not isinstance(self.mask, MaskRamp):
            return self.mask
        steps = self.mask.steps
        return self.mask.ratio(min(images * steps // self.images, steps - 1))

    @property
    def mask_ends(self) -> tuple[float, float]:
        """The first and the last mask ratio."""
        return (self.mask.start, self.mask.end) if isinstance(self.mask, MaskRamp) else (self.mask, self.mask)

    @property
    def masks(self) -> tuple[tuple[float, int], ...]:
        """The phase's mask ratios in their order, each with the count of images that are trained at it."""
        if not isinstance(self.mask, MaskRamp):
            return ((self.mask, self.images),)
        steps = self.mask.steps
        # Stretch k begins with the first batch whose first image is at or after the share k/steps of all.
        firsts = [-(-k * self.images // steps) for k in range(steps + 1)]
        firsts = [min(-(-first // self.batch) * self.batch, self.images) for first in firsts]
        counts = [stop - start for start, stop in itertools.pairwise(firsts)]
        return tuple((self.mask.ratio(k), count) for k, count in enumerate(counts))


class Ddp(Section):
    """Every process holds the whole network; gradients are averaged."""

    kind: Literal["ddp"] = "ddp"


class Fsdp2(Section):
    """Weights, gradients and optimiser state in shards, over all processes or groups of `shard` of them."""

    kind: Literal["fsdp2"] = "fsdp2"
    shard: Count | None = None
    gather_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    reshard_after_forward: bool = True


Parallel = Annotated[Ddp | Fsdp2, Field(discriminator="kind")]


class Train(Section):
    """How the loop runs and what it writes; none of it changes what is learned but grad_clip and dtype."""

    microbatch: Count | None = None
    activation_checkpointing: bool = False
    grad_clip: Positive | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    threads: Count | None = None
    compile: bool = False
    spike: Annotated[Number, Field(gt=1)] | None = 10.0
    log_every: SomeImages = 1_000
    checkpoint_every: SomeImages = 1_000_000
    keep: Count = 2
    keep_every: SomeImages | None = None
    async_checkpoints: bool = False
    preview_every: SomeImages | None = None
    preview_prompts: Annotated[tuple[Text, ...], Field(min_length=1)] | None = None
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()


class Sampling(Section):
    """How pictures are made for previews and evaluation, and by the exported pipeline.

    For Stage B these are the steps from a code to a picture.
    """

    scheduler: str
    steps: Count = 30
    guidance: NotNegative = 1.0
    shift: Positive = 1.0


class Evaluation(Section):
    """What `shoestring evaluate` measures: pictures of held-out prompts, loss at fixed log sigma."""

    prompts: SomeImages = 256
    seeds: Count = 3
    loss_levels: Annotated[tuple[Number, ...], Field(min_length=1)] = (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0)
    loss_images: SomeImages = 256


class Recipe(Section):
    """A whole recipe, resolved: no `base`, every key with its value."""

    name: Name
    system: Literal["microdit", "wuerstchen", "koala"] = "microdit"
    seed: Annotated[Whole, Field(ge=0, lt=2**63)] = 0
    init: Text | None = None
    teacher: Text | None = None
    data: Data
    model: Model = MicroDiTModel()
    objective: Objective
    optimizer: Optimizer
    ema: Ema | None = None
    phases: Annotated[tuple[Phase, ...], Field(min_length=1)]
    train: Train = Train()
    parallel: Parallel = Ddp()
    sampling: Sampling | None = None
    evaluation: Evaluation = Evaluation()

    @property
    def images(self) -> int:
        """Images of all phases together."""
        return sum(phase.images for phase in self.phases)

    def phase_after(self, images: int) -> Phase:
        """The phase that a run is in after so many images: where two meet, the one that ends."""
        for phase in self.phases:
            if images <= phase.images:
                return phase
            images -= phase.images
        return self.phases[-1]

    def objective_in(self, phase: Phase) -> Objective:
        """The objective with the phase's own numbers."""
        merged = {**self.objective.model_dump(), **phase.objective}
        return type(self.objective).model_validate(merged)

    def ema_in(self, phase: Phase) -> Ema | None:
        """The phase's own average, or the recipe's."""
        return self.ema if phase.ema == "same" else phase.ema

    def microbatch_in(self, phase: Phase) -> int | None:
        """The phase's own images of a forward pass, or the recipe's."""
        return self.train.microbatch if phase.microbatch == "same" else phase.microbatch

    def grad_clip_in(self, phase: Phase) -> float | None:
        """The phase's own limit on the gradient norm, or the recipe's."""
        return self.train.grad_clip if phase.grad_clip == "same" else phase.grad_clip

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        for path, message in problems(self):
            raise PydanticCustomError("recipe", "{message}", {"path": path, "message": message})
        return self


FREE_KEYS = (
    *("data.store", "model.vqgan", "teacher"),
    *("parallel.*", "phases.*.microbatch", "train.microbatch", "train.activation_checkpointing"),
    *("train.threads", "train.compile", "train.spike", "train.log_every", "train.trackers"),
    *("train.checkpoint_every", "train.keep", "train.keep_every", "train.async_checkpoints"),
    *("train.preview_every", "train.preview_prompts", "evaluation.*"),
)
"""Keys (patterns) that may change when a run resumes: where it computes, what it keeps and tells.

A store, a Stage A or a teacher may have moved: checkpoints know what was in it, so another one is refused.

All others say what is learned. `sampling` is not here since the run's pipeline has been written with it.
"""

ROUNDING_KEYS = (
    *("parallel.*", "phases.*.microbatch", "train.microbatch", "train.activation_checkpointing"),
    *("train.threads", "train.compile"),
)
"""Those of FREE_KEYS that change the order or grouping of sums: from there on a run agrees with one that was
never stopped up to rounding, no longer bit for bit."""
