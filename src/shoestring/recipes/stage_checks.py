"""Checks between the keys of a recipe that trains a stage of a cascade."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shoestring.recipes.architectures import DecoderModel, VqganModel
    from shoestring.recipes.losses import ReconstructionObjective
    from shoestring.recipes.schema import Recipe

Problems = Iterator[tuple[str, str]]


def problems(recipe: Recipe) -> Problems:
    """What does not fit together in a recipe of Stage A, B or C."""
    if recipe.system != "wuerstchen":
        yield "system", f"{recipe.system!r} does not have a {recipe.model.kind}. Set it to wuerstchen."
    yield from _phase_problems(recipe)
    if recipe.model.kind == "wuerstchen_prior":
        yield from _head_problems("model.nhead", recipe.model.c, recipe.model.nhead)
    else:
        yield from _pixel_problems(recipe)
    if recipe.model.kind == "wuerstchen_decoder":
        yield from _decoder_problems(recipe.model)
        if getattr(recipe.objective, "code_weight", 0) and not recipe.model.previewer:
            yield "objective.code_weight", "has no effect without model.previewer. Give it a width."
        if recipe.init is not None and recipe.model.compressor.weights is not None:
            yield (
                "model.compressor.weights",
                "has no effect with init, which has a compressor. Set it to null.",
            )
    if recipe.model.kind == "wuerstchen_vqgan" and recipe.objective.kind == "reconstruction":
        yield from _vqgan_problems(recipe, recipe.model, recipe.objective)
        if recipe.train.compile:
            yield (
                "train.compile",
                "does not reach a VQGAN's encoder and decoder. Set it to false for stage A.",
            )
    if recipe.objective.kind in {"decoder", "prior"}:
        cap, weight = recipe.objective.weight_cap, recipe.objective.weight
        if cap is not None and weight != "x0":
            yield "objective.weight_cap", f"has no effect with weight {weight}. Set it to null."


def _phase_problems(recipe: Recipe) -> Problems:
    for i, phase in enumerate(recipe.phases):
        if phase.mask != 0:
            yield f"phases.{i}.mask", f"a {recipe.model.kind} trains on whole pictures. Leave it out."
        if phase.position_scale != 1:
            yield f"phases.{i}.position_scale", f"has no effect on a {recipe.model.kind}. Leave it out."


def _pixel_problems(recipe: Recipe) -> Problems:
    """Stages A and B train on pictures themselves."""
    if recipe.data.autoencoder != "pixels":
        yield (
            "data.autoencoder",
            f"{recipe.data.autoencoder}: a {recipe.model.kind} trains on pictures. Use pixels.",
        )
    if recipe.data.normalise != "autoencoder":
        yield "data.normalise", "has no effect on pixels. Leave it out."
    if recipe.train.preview_prompts is not None:
        yield (
            "train.preview_prompts",
            f"has no effect on a {recipe.model.kind}, whose previews are reconstructions. Set it to null.",
        )


def _vqgan_problems(recipe: Recipe, model: VqganModel, objective: ReconstructionObjective) -> Problems:
    if recipe.train.activation_checkpointing:
        yield "train.activation_checkpointing", f"has no effect on a {model.kind}. Leave it out."
    if recipe.parallel.kind == "fsdp2":
        yield "parallel.kind", "fsdp2 does not train a Stage A, whose two turns share networks. Use ddp."
    multiple = 2**model.levels
    if model.embed_dim % 2 ** (model.levels - 1):
        yield (
            "model.embed_dim",
            f"{model.embed_dim} must be divisible by {2 ** (model.levels - 1)} for {model.levels} levels.",
        )
    sides = {"objective.crop": objective.crop} if objective.crop else {}
    sides |= {f"phases.{i}.size": phase.size for i, phase in enumerate(recipe.phases) if not objective.crop}
    for where, side in sides.items():
        if side is not None and side % multiple:
            around = f"{max(multiple, side // multiple * multiple)} or {(side // multiple + 1) * multiple}"
            yield where, f"{side} px must be a multiple of {multiple} for {model.levels} levels: {around}."
    smallest = min(phase.size for phase in recipe.phases)
    if objective.crop and objective.crop > smallest:
        yield "objective.crop", f"{objective.crop} px is more than the pictures have ({smallest} px)."
    if objective.perceptual_weight == 0 and objective.perceptual != "laplacian":
        yield "objective.perceptual", "has no effect with perceptual_weight 0. Leave it out."
    if objective.adversarial_weight == 0 and objective.adversarial_start:
        yield "objective.adversarial_start", "has no effect with adversarial_weight 0. Leave it out."
    if objective.adversarial_weight and objective.adversarial_start >= recipe.images:
        yield (
            "objective.adversarial_start",
            f"{objective.adversarial_start} images, but the run ends after {recipe.images}. "
            "Choose fewer, or adversarial_weight 0.",
        )


def _decoder_problems(model: DecoderModel) -> Problems:
    levels = len(model.c_hidden)
    for key in ("nhead", "blocks", "level_config", "inject_effnet"):
        if len(getattr(model, key)) != levels:
            yield f"model.{key}", f"must have {levels} items, one a level, as c_hidden has."
            return
    for i, (config, heads) in enumerate(zip(model.level_config, model.nhead, strict=True)):
        if "A" in config:
            yield from _head_problems(f"model.nhead (level {i})", model.c_hidden[i], heads)
        elif heads != -1:
            yield (
                "model.nhead",
                f"level {i} has no attention ({config}), so its heads have no effect. Use -1.",
            )
    if not model.kernel_size % 2:
        yield "model.kernel_size", f"{model.kernel_size} must be odd."


def _head_problems(where: str, width: int, heads: int) -> Problems:
    if heads < 1 or width % heads:
        yield where, f"{heads} heads do not divide the width {width}. Choose a divisor."
