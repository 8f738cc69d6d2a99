"""Checks between a recipe's keys: what does not fit together, and settings that would have no effect."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pydantic import ValidationError

from shoestring.recipes import stage_checks, unet_checks
from shoestring.recipes.messages import did_you_mean, requirement, shown

if TYPE_CHECKING:
    from shoestring.recipes.architectures import MicroDiTModel
    from shoestring.recipes.schema import Phase, Recipe

SCHEDULERS = {
    "edm": ("edm_heun", "edm_euler", "edm_dpm"),
    "flow": ("flow_euler", "flow_heun"),
    "decoder": ("cosine_ddpm",),
    "prior": ("cosine_ddpm",),
    "noise": ("euler", "ddim", "dpm++"),
    "distillation": ("euler", "ddim", "dpm++"),
    "lcm": ("lcm", "tcd"),
}
"""Samplers by the kind of objective that trains for them; reconstruction needs none."""

OBJECTIVES = {
    "microdit": ("edm", "flow"),
    "wuerstchen_vqgan": ("reconstruction",),
    "wuerstchen_decoder": ("decoder",),
    "wuerstchen_prior": ("prior",),
    "unet": ("noise",),
    "unet_student": ("distillation", "lcm"),
}
"""Objectives by the kind of model that they train."""

Problems = Iterator[tuple[str, str]]
"""(dotted key, what is wrong with it and what to do)."""


def problems(recipe: Recipe) -> Problems:
    """What is wrong between the keys of a recipe whose every key is right by itself."""
    kinds = OBJECTIVES[recipe.model.kind]
    if recipe.objective.kind not in kinds:
        what = f"{recipe.objective.kind} does not train a {recipe.model.kind}"
        yield "objective.kind", f"{what}. Allowed: {', '.join(kinds)}."
        return
    yield from _data_problems(recipe)
    if recipe.model.kind == "microdit":
        yield from _model_problems(recipe.model)
        yield from _mask_problems(recipe, recipe.model)
    elif recipe.model.kind in {"unet", "unet_student"}:
        yield from unet_checks.problems(recipe)
    else:
        yield from stage_checks.problems(recipe)
    if recipe.teacher is not None and recipe.system != "koala":
        yield "teacher", "is for students of a U-Net (system koala). Leave it out."
    yield from _objective_problems(recipe)
    yield from _sampling_problems(recipe)
    yield from _phase_problems(recipe)
    yield from _setting_problems(recipe)


def mask_problem(model: MicroDiTModel, phase: Phase, num_patches: int) -> str | None:
    """Why a phase's mask cannot be, for pictures of so many patches; None where it can."""
    for ratio, _ in phase.masks:
        kept = int(num_patches * (1 - ratio)) if ratio else num_patches
        told = f"{ratio:g} leaves {kept or 'none'} of the {num_patches} patches of {phase.size} px"
        if kept < 1:
            return f"{told}. Choose {1 - 1 / num_patches:.4g} at most."
        share = model.expert_capacity * kept / max(model.num_experts, 1)
        if model.num_experts and has_experts(model.expert_blocks, model.depth) and share < 1:
            return (
                f"{told}, of which each of {model.num_experts} experts would take {share:.2g}, "
                "less than one. Choose a lower mask, fewer experts or more capacity."
            )
    return None


def has_experts(blocks: int | tuple[int, ...], depth: int) -> bool:
    """Whether some block of the backbone has experts: every n-th, but never the last; or those listed."""
    return bool(range(blocks - 1, depth - 1, blocks)) if isinstance(blocks, int) and blocks else bool(blocks)


def _data_problems(recipe: Recipe) -> Problems:
    data = recipe.data
    if (data.store is None) == (data.scenes is None):
        yield "data", "needs either `store` (a folder made by `shoestring encode`) or `scenes`, and not both."
    if data.scenes is None:
        return
    if recipe.sampling is not None and recipe.evaluation.prompts > data.scenes.held_out:
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


def _model_problems(model: MicroDiTModel) -> Problems:
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
    changes = objective.kind in {"edm", "flow"}  # noise levels may change from phase to phase
    numbers = [key for key in type(objective).model_fields if changes and key not in {"kind", "prediction"}]
    for i, phase in enumerate(recipe.phases):
        where = f"phases.{i}.objective"
        for key in phase.objective:
            if not changes:
                yield f"{where}.{key}", f"objective {objective.kind} is the same in all phases. Leave it out."
            elif key not in numbers:
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
        if objective.kind == "flow" and objective.prediction == "velocity":
            if objective.weight_cap is not None:
                yield "objective.weight_cap", "has no effect with prediction velocity. Set it to null."
            if phase.objective.get("weight_cap") is not None:
                yield f"{where}.weight_cap", "has no effect with prediction velocity. Leave it out."


def _sampling_problems(recipe: Recipe) -> Problems:
    sampling, kind = recipe.sampling, recipe.objective.kind
    fitting = SCHEDULERS.get(kind, ())
    if not fitting:
        if sampling is not None:
            yield "sampling", f"has no effect with objective {kind}. Leave it out."
        return
    if sampling is None:
        yield "sampling", f"missing. Add a scheduler: {', '.join(fitting)}."
        return
    if sampling.scheduler not in fitting:
        yield (
            "sampling.scheduler",
            f"{sampling.scheduler!r} does not fit objective {kind}. Allowed: {', '.join(fitting)}.",
        )
    if sampling.shift != 1 and kind != "flow":
        words = "an EDM" if kind == "edm" else "this"
        yield "sampling.shift", f"has no effect with {words} scheduler. Leave it out."


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


def _mask_problems(recipe: Recipe, model: MicroDiTModel) -> Problems:
    for i, phase in enumerate(recipe.phases):
        where, ramp, batches = f"phases.{i}.mask", phase.mask, -(-phase.images // phase.batch)
        if not isinstance(ramp, float):
            if ramp.start == ramp.end:
                yield where, f"goes from {ramp.start:g} to {ramp.end:g}. Write `mask: {ramp.start:g}`."
            if ramp.steps > batches:
                few, cure = f"only {batches} batches", f"Choose {batches} at most."
                if batches == 1:
                    few, cure = "one batch", "Give one number."
                yield f"{where}.steps", f"{ramp.steps} ratios, but the phase has {few}. {cure}"
        if recipe.data.autoencoder == "pixels":
            patch, size = model.patch_size, phase.size
            if size % patch:
                told = f"{patch} does not divide the {size} x {size} latents of {size} px"
                yield "model.patch_size", f"{told}. Use a size that is a multiple."
                continue
            num_patches = (phase.size // patch) ** 2
            if problem := mask_problem(model, phase, num_patches):
                yield where, problem


def _setting_problems(recipe: Recipe) -> Problems:
    train = recipe.train
    if recipe.optimizer.expert_lr_ratio != 1 and not _any_experts(recipe):
        yield "optimizer.expert_lr_ratio", "has no effect on a model without experts. Set it to 1."
    if recipe.ema is not None and all(phase.ema != "same" for phase in recipe.phases):
        yield "ema", "has no effect: every phase has its own. Set it to null."
    if train.grad_clip is not None and all(phase.grad_clip != "same" for phase in recipe.phases):
        yield "train.grad_clip", "has no effect: every phase has its own. Set it to null."
    if train.microbatch is not None and all(phase.microbatch != "same" for phase in recipe.phases):
        yield "train.microbatch", "has no effect: every phase has its own. Set it to null."
    if recipe.phases[0].optimizer == "fresh":
        yield "phases.0.optimizer", "has no effect: a run begins with a fresh one. Leave it out."
    if train.keep_every is not None and train.keep_every < train.checkpoint_every:
        yield (
            "train.keep_every",
            f"{train.keep_every} images, but checkpoints are {train.checkpoint_every} images apart "
            "(train.checkpoint_every). Give that many at least.",
        )
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


def _any_experts(recipe: Recipe) -> bool:
    model = recipe.model
    if model.kind != "microdit":
        return False
    places = [model.expert_blocks, model.mixer_expert_blocks if model.mixer_depth else 0]
    return bool(model.num_experts and any(places))
