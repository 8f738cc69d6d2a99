"""A recipe's phases, ready to run: data, rate, cost."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch

from shoestring.build.systems import AnySystem, Part
from shoestring.cost.flops import training_flops_per_image
from shoestring.cost.ledger import Ledger
from shoestring.data.loader import Loader
from shoestring.interfaces import Batch
from shoestring.processes import ALONE, World
from shoestring.recipes.schema import Phase
from shoestring.training.loop import PhasePlan
from shoestring.training.optimizers import lr_factor


def plan_phases(
    system: AnySystem, parts: Sequence[Part], ledger: Ledger, world: World = ALONE
) -> list[PhasePlan]:
    """Each phase with its data, rate and cost."""
    return [plan_phase(system, phase, parts, ledger, world) for phase in system.recipe.phases]


def plan_phase(
    system: AnySystem, phase: Phase, parts: Sequence[Part], ledger: Ledger, world: World = ALONE
) -> PhasePlan:
    """A phase of the system's recipe."""
    recipe, start = system.recipe, system.start_of(phase)
    on_gpu = next(parts[0].objective.parameters()).device.type == "cuda"
    loader = Loader(
        system.store,
        size=phase.size,
        batch_size=phase.batch,
        seed=recipe.seed,
        rank=world.rank,
        world=world.size,
        captions=False,
        extra=system.extra,
        window=recipe.data.window,
        pin_memory=on_gpu,
    )

    def batches(images: int) -> Generator[Batch, None, None]:
        return loader.batches(start + images, start + phase.images)

    def lr(images: int) -> float:
        return phase.lr * lr_factor(phase.schedule, images, phase.images, phase.warmup, phase.final or 0.0)

    ema = recipe.ema_in(phase)
    flops = phase_flops(system, phase)
    return PhasePlan(
        name=phase.name,
        images=phase.images,
        batch=phase.batch,
        enter=lambda: system.enter(phase, parts),
        advance=lambda images: system.advance(phase, parts, images),
        batches=batches,
        lr=lr,
        cost=lambda: ledger.phase(phase.name, phase.size, *phase.mask_ends),
        mask=phase.mask_at,
        flops_per_image=lambda images: _last(flops, images),
        microbatch=recipe.microbatch_in(phase),
        fresh_optimizer=phase.optimizer == "fresh",
        grad_clip=recipe.grad_clip_in(phase),
        ema_decays=ema.decays if ema else (),
        ema_start=ema.start if ema else 0,
    )


def phase_flops(system: AnySystem, phase: Phase) -> dict[int, float]:
    """Operations of training on one image, from so many images of a phase on, counted on shapes alone."""
    with torch.device("meta"):
        networks = system.networks(phase)
    parts = system.parts(networks)
    for part in parts:
        part.objective.to("meta")
    system.enter(phase, parts)
    recipe, start = system.recipe, system.start_of(phase)
    window = recipe.data.window and 1  # 8 images of one chunk, which is all of a remote store that is fetched
    loader = Loader(
        system.store, size=phase.size, batch_size=8, seed=recipe.seed, extra=system.extra, window=window
    )
    batch = loader.batch(0, 8)
    flops = {}
    for begin, _ in system.states(phase):
        system.advance(phase, parts, begin)
        taken = [part for part in parts if start + begin >= part.start]
        flops[begin] = sum(training_flops_per_image(part.objective, batch) for part in taken)
    return flops


def _last(values: dict[int, float], images: int) -> float:
    """The value from so many images on."""
    return next(value for begin, value in reversed(values.items()) if begin <= images)


def accumulated(system: AnySystem, phase: Phase) -> float:
    """Operations of a whole phase."""
    flops = phase_flops(system, phase)
    return sum(flops[begin] * count for begin, count in system.states(phase))
