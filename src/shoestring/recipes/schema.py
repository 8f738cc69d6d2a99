"""What a recipe may say: every key with its type, range and default, then the checks between keys.

Unknown keys are refused, and so is a setting that would have no effect. Progress is counted in images:
such counts take 512000000, "512M", "5.12M" or "50k". The reference for users is docs/recipes.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from shoestring.recipes.messages import did_you_mean, requirement, shown

SCHEDULERS = {"edm": ("edm_heun", "edm_euler", "edm_dpm"), "flow": ("flow_euler", "flow_heun")}
"""Samplers by the kind of objective that trains for them."""

_COUNT = re.compile(r"(\d[\d_]*(?:\.\d+)?(?:e\+?\d+)?)\s*([kmb]?)", re.IGNORECASE)
_FACTOR = {"": 1, "k": 1_000, "m": 1_000_000, "b": 1_000_000_000}


def parse_images(value: Any) -> int:
    """A count of images: 50000, "50k", "5.12M" or "1B" -> int; raises `ValueError` for anything else."""
    match = (
        _COUNT.fullmatch(str(value).strip()) if isinstance(value, (int, float, str)) else None
    )  # "True" is no match
    count = Decimal(match[1]) * _FACTOR[match[2].lower()] if match else Decimal("0.5")
    if count != int(count):
        raise ValueError("must be a whole number of images, such as 50000, 50k or 5.12M")
    return int(count)


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


def _one_or_list(value: Any) -> str:
    return "list" if isinstance(value, (list, tuple)) else "one"


def _same_or_given(value: Any) -> str:
    return "none" if value is None else "same" if isinstance(value, str) and value == "same" else "given"


Whole = Annotated[int, BeforeValidator(_no_bool)]
Number = Annotated[float, BeforeValidator(_no_bool)]
Images = Annotated[int, BeforeValidator(parse_images)]
SomeImages = Annotated[Images, Field(ge=1)]
Count = Annotated[Whole, Field(ge=1)]
CountOrNone = Annotated[Whole, Field(ge=0)]
Positive = Annotated[Number, Field(gt=0)]
NotNegative = Annotated[Number, Field(ge=0)]
Share = Annotated[Number, Field(ge=0, lt=1)]
Decay = Annotated[Number, Field(gt=0, lt=1)]
Ratios = Annotated[
    Annotated[Positive, Tag("one")] | Annotated[tuple[Positive, ...], Tag("list")],
    Discriminator(_one_or_list),
]
Blocks = Annotated[
    Annotated[CountOrNone, Tag("one")] | Annotated[tuple[CountOrNone, ...], Tag("list")],
    Discriminator(_one_or_list),
]
Text = Annotated[str, Field(min_length=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


class Section(BaseModel):
    """A part of a recipe: immutable, no unknown keys, finite numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Scenes(Section):
    """Procedural captioned pictures, made and encoded when the run starts."""

    level: Literal["cells", "free"] = "cells"
    size: Annotated[Whole, Field(ge=8, le=1024)] = 32
    images: SomeImages
    seed: CountOrNone = 0
    held_out: SomeImages = 1024


class Data(Section):
    """Where encoded images and text come from: a store, or scenes."""

    store: Text | None = None
    scenes: Scenes | None = None
    autoencoder: Text = "pixels"
    text_encoder: Text = "hashing"
    pad: Literal["none", "encoder"] = "none"
    max_tokens: Count | None = None
    caption_drop: Share = 0.1


class MicroDiTModel(Section):
    """MicroDiT's constructor arguments, but for those that follow from the data and the phase."""

    kind: Literal["microdit"] = "microdit"
    patch_size: Count = 2
    hidden_size: Count = 1024
    depth: Count = 28
    head_dim: Count = 64
    multiple_of: Count = 256
    qkv_ratio: Ratios = (0.5, 1.0)
    mlp_ratio: Ratios = (0.5, 4.0)
    use_bias: bool = False
    mixer_depth: CountOrNone = 6
    mixer_size: Count = 768
    mixer_qkv_ratio: Ratios = 1.0
    mixer_mlp_ratio: Ratios = 4.0
    num_experts: CountOrNone = 8
    expert_capacity: Positive = 2.0
    expert_blocks: Blocks = 2
    mixer_expert_blocks: Blocks = 2
    text_depth: CountOrNone = 1
    positions: Literal["sincos", "sincos+rope"] = "sincos"
    text_positions: Literal["none", "rope"] = "none"
    qk_norm: Literal["hidden", "head"] = "hidden"


class EdmObjective(Section):
    """EDM's preconditioned denoising: log sigma ~ Normal(p_mean, p_std)."""

    kind: Literal["edm"] = "edm"
    sigma_data: Positive = 0.9
    p_mean: Number = -0.6
    p_std: Positive = 1.2


class FlowObjective(Section):
    """Flow matching: logit of time ~ Normal(shift, scale); a positive shift draws more noise."""

    kind: Literal["flow"] = "flow"
    prediction: Literal["velocity", "x0"] = "velocity"
    weight_cap: Positive | None = None
    shift: Number = 0.0
    scale: Positive = 1.0


class AdamW(Section):
    """AdamW for every parameter; experts' matrices at `expert_lr_ratio` times the phase's rate."""

    kind: Literal["adamw"] = "adamw"
    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: NotNegative = 0.0
    expert_lr_ratio: Positive = 1.0


class Muon(Section):
    """Muon for hidden matrices at `lr_ratio` times the phase's rate; AdamW for the rest."""

    kind: Literal["muon"] = "muon"
    lr_ratio: Positive = 10.0
    momentum: Share = 0.95
    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: NotNegative = 0.0
    expert_lr_ratio: Positive = 1.0


class Ema(Section):
    """Averages of the weights, one a decay (per step), from `start` images into the phase on."""

    decays: Annotated[tuple[Decay, ...], Field(min_length=1)]
    start: Images = 0


Objective = Annotated[EdmObjective | FlowObjective, Field(discriminator="kind")]
Optimizer = Annotated[AdamW | Muon, Field(discriminator="kind")]
PhaseEma = Annotated[
    Annotated[Ema, Tag("given")] | Annotated[None, Tag("none")] | Annotated[Literal["same"], Tag("same")],
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
    mask: Share = 0.0
    lr: Positive
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup: Images = 0
    final: Annotated[Number, Field(ge=0, le=1)] | None = None
    position_scale: Positive = 1.0
    objective: dict[str, Number | None] = {}
    ema: PhaseEma = "same"
    grad_clip: PhaseClip = "same"


class Train(Section):
    """How the loop runs and what it writes; none of it changes what is learned but grad_clip and dtype."""

    microbatch: Count | None = None
    grad_clip: Positive | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    threads: Count | None = None
    compile: bool = False
    spike: Annotated[Number, Field(gt=1)] | None = 10.0
    log_every: SomeImages = 1_000
    checkpoint_every: SomeImages = 1_000_000
    keep: Count = 2
    preview_every: SomeImages | None = None
    preview_prompts: Annotated[tuple[Text, ...], Field(min_length=1)] | None = None
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()


class Sampling(Section):
    """How pictures are made for previews and evaluation, and by the exported pipeline."""

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
    system: Literal["microdit"] = "microdit"
    seed: Annotated[Whole, Field(ge=0, lt=2**63)] = 0
    init: Text | None = None
    data: Data
    model: MicroDiTModel = MicroDiTModel()
    objective: Objective
    optimizer: Optimizer
    ema: Ema | None = None
    phases: Annotated[tuple[Phase, ...], Field(min_length=1)]
    train: Train = Train()
    sampling: Sampling
    evaluation: Evaluation = Evaluation()

    @property
    def images(self) -> int:
        """Images of all phases together."""
        return sum(phase.images for phase in self.phases)

    def objective_in(self, phase: Phase) -> EdmObjective | FlowObjective:
        """The objective with the phase's own numbers."""
        merged = {**self.objective.model_dump(), **phase.objective}
        return type(self.objective).model_validate(merged)

    def ema_in(self, phase: Phase) -> Ema | None:
        """The phase's own average, or the recipe's."""
        return self.ema if phase.ema == "same" else phase.ema

    def grad_clip_in(self, phase: Phase) -> float | None:
        """The phase's own limit on the gradient norm, or the recipe's."""
        return self.train.grad_clip if phase.grad_clip == "same" else phase.grad_clip

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        checks = (_data_problems, _model_problems, _objective_problems, _phase_problems, _setting_problems)
        for path, message in (problem for check in checks for problem in check(self)):
            raise PydanticCustomError("recipe", "{message}", {"path": path, "message": message})
        return self


Problems = Iterator[tuple[str, str]]
"""(dotted key, what is wrong with it and what to do)."""


def _data_problems(recipe: Recipe) -> Problems:
    data = recipe.data
    if (data.store is None) == (data.scenes is None):
        yield "data", "needs either `store` (a folder made by `shoestring encode`) or `scenes`, and not both."
    if data.scenes is None:
        return
    if recipe.evaluation.prompts > data.scenes.held_out:
        yield (
            "evaluation.prompts",
            f"{recipe.evaluation.prompts} prompts, but only {data.scenes.held_out} scenes are held out "
            "(data.scenes.held_out).",
        )
    for i, phase in enumerate(recipe.phases):
        if phase.size != data.scenes.size:
            yield (
                f"phases.{i}.size",
                f"{phase.size} px, but the scenes are made at {data.scenes.size} px (data.scenes.size).",
            )


def _model_problems(recipe: Recipe) -> Problems:
    model = recipe.model
    blocks_of = {"": model.depth, "mixer_": model.mixer_depth}
    for part, depth in blocks_of.items():
        for key in ("qkv_ratio", "mlp_ratio"):
            ratios = getattr(model, part + key)
            if isinstance(ratios, tuple) and len(ratios) not in {2, depth}:
                yield (
                    f"model.{part}{key}",
                    f"{len(ratios)} ratios for {depth} blocks: give one number, two ends or {depth}.",
                )
        positions = getattr(model, part + "expert_blocks")
        beyond = [i for i in positions if i >= depth] if isinstance(positions, tuple) else []
        if beyond:
            yield (
                f"model.{part}expert_blocks",
                f"block {beyond[0]} does not exist: there are {depth}, counted from 0.",
            )
    for key in ("hidden_size", "mixer_size"):
        size, below = getattr(model, key), getattr(model, key) // model.head_dim * model.head_dim
        if size != below:
            around = f"{max(below, model.head_dim)} or {below + model.head_dim}"
            yield (
                f"model.{key}",
                f"{size} must be divisible by head_dim {model.head_dim}; nearest: {around}.",
            )
    if "sincos" in model.positions and model.hidden_size % 4:
        yield "model.hidden_size", f"{model.hidden_size} must be divisible by 4 for sincos positions."
    pairs = 4 if "rope" in model.positions else 2 if model.text_positions == "rope" else 1
    if model.head_dim % pairs:
        yield "model.head_dim", f"{model.head_dim} must be divisible by {pairs} for rotary positions."
    idle = {
        "num_experts": ("expert_capacity", "expert_blocks", "mixer_expert_blocks"),
        "mixer_depth": ("mixer_size", "mixer_qkv_ratio", "mixer_mlp_ratio", "mixer_expert_blocks"),
    }
    for absent, keys in idle.items():
        for key in keys if getattr(model, absent) == 0 else ():
            default = type(model).model_fields[key].default
            if getattr(model, key) != default:
                yield f"model.{key}", f"has no effect with {absent} 0. Leave it at {default}."
    if model.text_positions != "none" and model.text_depth == 0:
        yield "model.text_positions", "has no effect with text_depth 0. Set it to none."


def _objective_problems(recipe: Recipe) -> Problems:
    objective = recipe.objective
    numbers = [key for key in type(objective).model_fields if key not in {"kind", "prediction"}]
    for i, phase in enumerate(recipe.phases):
        where = f"phases.{i}.objective"
        for key in phase.objective:
            if key not in numbers:
                yield (
                    f"{where}.{key}",
                    f"no number of objective {objective.kind}.{did_you_mean(key, numbers)}",
                )
        try:
            recipe.objective_in(phase)
        except ValidationError as error:
            first = error.errors()[0]
            if first["type"] != "extra_forbidden":
                yield (
                    f"{where}.{first['loc'][-1]}",
                    f"{shown(first['input'])} is not allowed: {requirement(first)}.",
                )
        if isinstance(objective, FlowObjective) and objective.prediction == "velocity":
            if objective.weight_cap is not None:
                yield "objective.weight_cap", "has no effect with prediction velocity. Set it to null."
            if phase.objective.get("weight_cap") is not None:
                yield f"{where}.weight_cap", "has no effect with prediction velocity. Leave it out."
    fitting = SCHEDULERS[objective.kind]
    if recipe.sampling.scheduler not in fitting:
        yield (
            "sampling.scheduler",
            f"{recipe.sampling.scheduler!r} does not fit objective {objective.kind}. "
            f"Allowed: {', '.join(fitting)}.",
        )
    if recipe.sampling.shift != 1 and objective.kind != "flow":
        yield "sampling.shift", "has no effect with an EDM scheduler. Leave it out."


def _phase_problems(recipe: Recipe) -> Problems:
    names = [phase.name for phase in recipe.phases]
    for i, phase in enumerate(recipe.phases):
        where = f"phases.{i}"
        if names.index(phase.name) != i:
            yield f"{where}.name", f"{phase.name!r} is the name of an earlier phase too. Choose another."
        if phase.final is not None and phase.schedule == "constant":
            yield (
                f"{where}.final",
                "has no effect with schedule constant. Use cosine or linear, or leave it out.",
            )
        if phase.warmup >= phase.images:
            yield (
                f"{where}.warmup",
                f"{phase.warmup} images, but the phase ends after {phase.images}. Choose fewer, or 0.",
            )
        ema = recipe.ema_in(phase)
        if ema is not None and ema.start >= phase.images:
            yield (
                "ema.start" if phase.ema == "same" else f"{where}.ema.start",
                f"{ema.start} images, but phase {phase.name} ends after {phase.images}: "
                "no weights would be averaged in it.",
            )


def _setting_problems(recipe: Recipe) -> Problems:
    model, train = recipe.model, recipe.train
    places = [model.expert_blocks, model.mixer_expert_blocks if model.mixer_depth else 0]
    if recipe.optimizer.expert_lr_ratio != 1 and not (model.num_experts and any(places)):
        yield "optimizer.expert_lr_ratio", "has no effect on a model without experts. Set it to 1."
    if recipe.ema is not None and all(phase.ema != "same" for phase in recipe.phases):
        yield "ema", "has no effect: every phase has its own. Set it to null."
    if train.grad_clip is not None and all(phase.grad_clip != "same" for phase in recipe.phases):
        yield "train.grad_clip", "has no effect: every phase has its own. Set it to null."
    if train.preview_prompts is not None and train.preview_every is None:
        yield "train.preview_prompts", "has no effect without preview_every. Set it to a number of images."
    emas = {f"phases.{i}.ema": recipe.ema_in(phase) for i, phase in enumerate(recipe.phases)}
    for where, ema in {"ema": recipe.ema, **emas}.items():
        if ema is not None and len(set(ema.decays)) < len(ema.decays):
            yield f"{where}.decays", "names a decay twice."
    for where, items in (
        ("train.trackers", train.trackers),
        ("evaluation.loss_levels", recipe.evaluation.loss_levels),
    ):
        if len(set(items)) < len(items):
            yield where, "names an item twice."
