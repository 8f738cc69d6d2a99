"""The objectives a recipe may name, with their numbers; defaults are the published ones."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from shoestring.recipes.fields import (
    Count,
    Images,
    NotNegative,
    Number,
    Positive,
    Section,
    Share,
    Text,
    Width,
)

Tap = Literal["self_attention", "cross_attention", "feed_forward", "resnet", "block", "outer_blocks"]


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


class ReconstructionObjective(Section):
    """Stage A: squared error, perceptual distance, and from `adversarial_start` images on a discriminator."""

    kind: Literal["reconstruction"] = "reconstruction"
    mse: Positive = 1.0
    perceptual: Text = "laplacian"
    perceptual_weight: NotNegative = 0.1
    adversarial_weight: NotNegative = 0.01
    adversarial_start: Images = 0
    quantise_skip: Annotated[Number, Field(ge=0, le=1)] = 0.1
    crop: Width | None = None


class _Cosine(Section):
    """What the objectives on the cosine schedule share: the loss's weight and how times are drawn."""

    weight: Literal["p2", "paper", "none", "x0"] = "p2"
    weight_cap: Positive | None = None
    time_scale: Annotated[Positive, Field(ge=1)] = 1.08


class DecoderObjective(_Cosine):
    """Stage B: noise prediction on Stage A's latents, given the compressor's code of the picture."""

    kind: Literal["decoder"] = "decoder"
    code_drop: Share = 0.05
    code_noise: Share = 0.3
    code_weight: NotNegative = 0.0


class PriorObjective(_Cosine):
    """Stage C: noise prediction on the compressor's codes, given text."""

    kind: Literal["prior"] = "prior"
    drop: Literal["sample", "batch"] = "sample"


class _Noise(Section):
    """What the objectives on a U-Net's noise schedule share: the loss's weight and the null caption."""

    weight: Literal["none", "min_snr", "x0", "edm"] = "none"
    weight_cap: Positive | None = None
    sigma_data: Positive = 1.0
    null_caption: Literal["zeros", "empty"] = "zeros"


class NoiseObjective(_Noise):
    """A U-Net by itself, on SDXL's noise schedule."""

    kind: Literal["noise"] = "noise"
    prediction: Literal["epsilon", "v_prediction", "sample"] = "epsilon"


class DistillationObjective(_Noise):
    """A student of the recipe's teacher: its task, the teacher's output, the teacher's features."""

    kind: Literal["distillation"] = "distillation"
    task_weight: NotNegative = 1.0
    output_weight: NotNegative = 1.0
    feature_weight: NotNegative = 1.0
    taps: tuple[Tap, ...] = ("self_attention", "outer_blocks")
    feature_scale: Literal["none", "teacher_power", "per_layer_mean"] = "none"
    timesteps: Literal["uniform", "teacher_grid", "mixed"] = "uniform"
    teacher_steps: Annotated[Count, Field(le=1000)] = 4
    teacher_dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"


class LcmObjective(Section):
    """Latent consistency: a student that needs few steps, of the recipe's teacher."""

    kind: Literal["lcm"] = "lcm"
    null_caption: Literal["zeros", "empty"] = "zeros"
    solver_steps: Annotated[Count, Field(le=1000)] = 50
    guidance: tuple[NotNegative, NotNegative] = (3.0, 15.0)
    embed_guidance: bool = True
    loss: Literal["huber", "l2"] = "huber"
    huber_c: Positive = 0.001
    target_decay: Share = 0.95
    phases: Annotated[Count, Field(le=1000)] = 1
    teacher_dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"


Objective = Annotated[
    EdmObjective
    | FlowObjective
    | ReconstructionObjective
    | DecoderObjective
    | PriorObjective
    | NoiseObjective
    | DistillationObjective
    | LcmObjective,
    Field(discriminator="kind"),
]
