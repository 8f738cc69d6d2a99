"""The objectives a recipe may name, with their numbers; defaults are the published ones."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from shoestring.recipes.fields import (
    Images,
    NotNegative,
    Number,
    Positive,
    Section,
    Share,
    Text,
    Width,
)


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


Objective = Annotated[
    EdmObjective | FlowObjective | ReconstructionObjective | DecoderObjective | PriorObjective,
    Field(discriminator="kind"),
]
