"""Checks between the keys of a recipe that trains a U-Net or a student of one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shoestring.recipes.architectures import StudentModel, UNetModel
    from shoestring.recipes.losses import DistillationObjective, LcmObjective
    from shoestring.recipes.schema import Recipe

Problems = Iterator[tuple[str, str]]


def problems(recipe: Recipe) -> Problems:
    """What does not fit together in a recipe of a U-Net."""
    model, objective = recipe.model, recipe.objective
    if recipe.system != "koala":
        yield "system", f"{recipe.system!r} does not have a {model.kind}. Set it to koala."
    for i, phase in enumerate(recipe.phases):
        if phase.mask != 0:
            yield f"phases.{i}.mask", "a U-Net trains on whole pictures. Leave it out."
        if phase.position_scale != 1:
            yield f"phases.{i}.position_scale", "has no effect on a U-Net. Leave it out."
    if model.kind == "unet":
        yield from _unet_problems(recipe, model)
    elif model.kind == "unet_student":
        yield from _student_problems(recipe, model)
    if objective.kind == "distillation":
        yield from _distillation_problems(objective)
    if objective.kind == "lcm":
        yield from _lcm_problems(recipe, objective)
    elif objective.kind in {"noise", "distillation"}:
        weight, cap = objective.weight, objective.weight_cap
        if weight == "none" and cap is not None:
            yield "objective.weight_cap", "has no effect with weight none. Set it to null."
        if weight != "edm" and objective.sigma_data != 1:
            yield "objective.sigma_data", f"has no effect with weight {weight}. Leave it out."


def _unet_problems(recipe: Recipe, model: UNetModel) -> Problems:
    if recipe.teacher is not None:
        yield "teacher", "has no effect on a U-Net that is trained by itself. Leave it out."
    stages = len(model.block_out_channels)
    if len(model.transformer_depth) != stages:
        yield (
            "model.transformer_depth",
            f"has {len(model.transformer_depth)} stages, block_out_channels has {stages}. "
            "Give each stage its depth, 0 for one without attention.",
        )
        return
    if not model.transformer_depth[-1]:
        yield "model.transformer_depth", "the last stage needs attention (1 or more): the middle has it too."
    for width, depth in zip(model.block_out_channels, model.transformer_depth, strict=True):
        if width % model.norm_groups:
            yield "model.block_out_channels", f"{width} must be divisible by norm_groups {model.norm_groups}."
        if depth and width % model.head_dim:
            yield "model.block_out_channels", f"{width} must be divisible by head_dim {model.head_dim}."


def _student_problems(recipe: Recipe, model: StudentModel) -> Problems:
    if recipe.teacher is None:
        yield (
            "teacher",
            "missing: the U-Net to cut and learn from. Add `--set teacher=PATH_OR_ID`: a pipeline folder, a "
            "run, a hub id, or an SDXL checkpoint (.safetensors).",
        )
    if model.preset is not None:
        for key in ("layers_per_block", "depth", "mid", "depth_map"):
            if getattr(model, key) != type(model).model_fields[key].default:
                yield f"model.{key}", f"has no effect with preset {model.preset}. Leave one of them out."
    if model.lora_rank and recipe.objective.kind != "lcm":
        yield "model.lora_rank", "trains with objective lcm alone. Set it to 0."
    if model.lora_rank and recipe.parallel.kind == "fsdp2":
        yield "parallel.kind", "fsdp2 does not shard an adapter. Use ddp."


def _distillation_problems(objective: DistillationObjective) -> Problems:
    if not objective.task_weight + objective.output_weight + objective.feature_weight:
        yield "objective.task_weight", "all three weights are 0: nothing is learned. Set one of them."
    if objective.feature_weight and not objective.taps:
        yield "objective.taps", "none, so feature_weight has no effect. Set feature_weight to 0."
    if not objective.feature_weight and objective.taps:
        yield "objective.taps", "have no effect with feature_weight 0. Set them to []."
    if len(set(objective.taps)) < len(objective.taps):
        yield "objective.taps", "names an item twice."
    if not objective.taps and objective.feature_scale != "none":
        yield "objective.feature_scale", "has no effect without taps. Leave it out."
    if objective.timesteps == "uniform" and objective.teacher_steps != 4:
        yield "objective.teacher_steps", "has no effect with timesteps uniform. Leave it out."


def _lcm_problems(recipe: Recipe, objective: LcmObjective) -> Problems:
    low, high = objective.guidance
    if low > high:
        yield "objective.guidance", f"from {low:g} to {high:g}: give the smaller one first."
    if objective.loss == "l2" and objective.huber_c != type(objective).model_fields["huber_c"].default:
        yield "objective.huber_c", "has no effect with loss l2. Leave it out."
    sampling, times = recipe.sampling, objective.solver_steps
    steps = 1 if sampling is None else sampling.steps
    for key, count in (("objective.phases", objective.phases), ("sampling.steps", steps)):
        if count > times:
            yield key, f"{count}, but the student learns {times} times alone: choose {times} at most."
    if sampling is not None and (sampling.scheduler == "tcd") != (objective.phases > 1):
        fitting = "tcd" if objective.phases > 1 else "lcm"
        yield "sampling.scheduler", f"objective.phases {objective.phases} is sampled with {fitting}."
    elif sampling is not None and objective.phases not in {1, sampling.steps}:
        yield "sampling.steps", f"{sampling.steps}, but each phase is one step: {objective.phases}."
    if sampling is not None:
        least, most = (low + 1, high + 1) if objective.embed_guidance else (1, 1)
        if not least <= sampling.guidance <= most:
            allowed = f"{least:g} to {most:g}" if most > least else f"{least:g}"
            yield (
                "sampling.guidance",
                f"{sampling.guidance:g} was not trained. Allowed: {allowed} (objective.guidance plus 1).",
            )
    lora = getattr(recipe.model, "lora_rank", 0)
    if lora and objective.embed_guidance:
        yield "objective.embed_guidance", "an adapter has no place for it. Set it to false with lora_rank."
    if lora and objective.target_decay:
        yield "objective.target_decay", "an adapter is its own target. Set it to 0 with lora_rank."
    if not objective.embed_guidance and low != high:
        yield (
            "objective.guidance",
            f"from {low:g} to {high:g} needs embed_guidance. Give one number twice, such as [8, 8].",
        )
