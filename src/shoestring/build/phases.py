"""A recipe's phases, ready to run: data, rate, cost."""

from __future__ import annotations

import itertools
from collections.abc import Generator

import torch

from shoestring.build.networks import AnyObjective, enter_phase, make_network, make_objective
from shoestring.cost.flops import training_flops_per_image
from shoestring.cost.ledger import Ledger
from shoestring.data.loader import Loader
from shoestring.data.store import Store
from shoestring.errors import RecipeError
from shoestring.interfaces import Batch
from shoestring.processes import ALONE, World
from shoestring.recipes.checks import mask_problem
from shoestring.recipes.schema import Phase, Recipe
from shoestring.training.loop import PhasePlan
from shoestring.training.optimizers import lr_factor


def plan_phases(
    recipe: Recipe, store: Store, objective: AnyObjective, ledger: Ledger, world: World = ALONE
) -> list[PhasePlan]:
    """Each phase with its data, rate and cost."""
    starts = itertools.accumulate((phase.images for phase in recipe.phases), initial=0)
    return [
        plan_phase(recipe, phase, start, store, objective, ledger, world)
        for phase, start in zip(recipe.phases, starts, strict=False)
    ]


def plan_phase(
    recipe: Recipe,
    phase: Phase,
    start: int,
    store: Store,
    objective: AnyObjective,
    ledger: Ledger,
    world: World = ALONE,
) -> PhasePlan:
    """A phase that begins after `start` images of the run."""
    on_gpu = next(objective.parameters()).device.type == "cuda"
    loader = Loader(
        store,
        size=phase.size,
        batch_size=phase.batch,
        seed=recipe.seed,
        rank=world.rank,
        world=world.size,
        captions=False,
        window=recipe.data.window,
        pin_memory=on_gpu,
    )

    def batches(images: int) -> Generator[Batch, None, None]:
        return loader.batches(start + images, start + phase.images)

    def lr(images: int) -> float:
        return phase.lr * lr_factor(phase.schedule, images, phase.images, phase.warmup, phase.final or 0.0)

    def advance(images: int) -> None:
        objective.mask = phase.mask_at(images)

    ema = recipe.ema_in(phase)
    flops = phase_flops(recipe, phase, store)
    return PhasePlan(
        name=phase.name,
        images=phase.images,
        batch=phase.batch,
        enter=lambda: enter_phase(recipe, phase, store, objective),
        advance=advance,
        batches=batches,
        lr=lr,
        cost=lambda: ledger.phase(phase.name, phase.size, *phase.mask_ends),
        mask=phase.mask_at,
        flops_per_image=lambda images: flops[phase.mask_at(images)],
        microbatch=recipe.microbatch_in(phase),
        fresh_optimizer=phase.optimizer == "fresh",
        grad_clip=recipe.grad_clip_in(phase),
        ema_decays=ema.decays if ema else (),
        ema_start=ema.start if ema else 0,
    )


def phase_flops(recipe: Recipe, phase: Phase, store: Store) -> dict[float, float]:
    """Forward and backward operations of one image at each mask ratio of a phase, counted on shapes alone."""
    with torch.device("meta"):
        objective = make_objective(recipe, make_network(recipe, store, phase))
    enter_phase(recipe, phase, store, objective)
    window = recipe.data.window and 1  # 8 images of one chunk, which is all of a remote store that is fetched
    batch = Loader(store, size=phase.size, batch_size=8, seed=recipe.seed, window=window).batch(0, 8)
    flops = {}
    for ratio, _ in phase.masks:
        objective.mask = ratio
        flops[ratio] = training_flops_per_image(objective, batch)
    return flops


def check_phases(recipe: Recipe, store: Store) -> None:
    """Raise `RecipeError` where a phase's mask leaves no patch of the store's pictures, or experts none."""
    for number, phase in enumerate(recipe.phases):
        _, height, width = store.latent_shape(phase.size)
        num_patches = height // recipe.model.patch_size * (width // recipe.model.patch_size)
        if problem := mask_problem(recipe.model, phase, num_patches):
            raise RecipeError(f"recipe {recipe.name}, phases.{number}.mask: {problem}")
