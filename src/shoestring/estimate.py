"""A recipe before it is trained: what it will cost, and how much of it fits into some minutes here."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from shoestring import build
from shoestring.cost.ledger import Ledger
from shoestring.data.store import Store
from shoestring.errors import CheckpointError, RecipeError, StoreError
from shoestring.interfaces import Log
from shoestring.recipes.losses import Objective, ReconstructionObjective
from shoestring.recipes.schema import Ema, MaskRamp, Phase, Recipe
from shoestring.runtime import pick_dtype, set_threads
from shoestring.storage import RunFolder
from shoestring.training.checkpoint import Saver
from shoestring.training.loop import LoopSettings, Training
from shoestring.training.tracking import Trackers, flops_text

WARM_UP_STEPS = 2
MEASURED_SECONDS = 2.0


def cost_lines(recipe: Recipe, device: torch.device) -> list[str]:
    """What a run will train and what it costs, for people; scenes are tried out on a few, kept nowhere.

    Raises what training would for a store that is there and does not fit.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            store = _store_to_try(recipe, Path(folder), device)
        except (StoreError, RecipeError, CheckpointError) as error:
            if recipe.data.store and Path(recipe.data.store).is_dir():  # training would refuse it too
                raise
            return [f"cost: unknown until the store is there. {error}"]
        system = build.system_of(recipe, store)
        with torch.device("meta"):
            networks = system.networks(recipe.phases[0])
        lines = [
            f"parameters: {sum(p.numel() for p in network.parameters()):,}"
            + (f" ({name})" if len(networks) > 1 else "")
            for name, network in networks.items()
        ]
        total = 0.0
        for phase in recipe.phases:
            of_phase = build.accumulated(system, phase)
            total += of_phase
            lines.append(
                f"phase {phase.name}: {phase.images:,} images of {phase.size} px, mask {_mask(phase)}: "
                f"{flops_text(of_phase / phase.images)} an image, {flops_text(of_phase)}"
            )
    return [*lines, f"all phases: {recipe.images:,} images, {flops_text(total)}"]


def fitted(recipe: Recipe, minutes: float, device: torch.device, log: Log) -> Recipe:
    """The recipe with its counts of images scaled so that its phases take about `minutes` here."""
    set_threads(recipe.train.threads)
    store = build.open_store(recipe, device=device, log=log)
    seconds = [phase_seconds(recipe, phase, store, device) for phase in recipe.phases]
    result = scaled(recipe, minutes * 60 / sum(seconds))
    speeds = ", ".join(
        f"{phase.name} {phase.images / taken:.0f}"
        for phase, taken in zip(recipe.phases, seconds, strict=True)
    )
    log(f"Measured images/s: {speeds}. {minutes:g} minutes make {result.images:,} images.")
    return result


def phase_seconds(recipe: Recipe, phase: Phase, store: Store, device: torch.device) -> float:
    """How long a phase takes on this machine, each stretch of one cost (a mask ratio, say) measured."""
    return sum(
        count / images_per_second(recipe, phase, store, device, after=begin)
        for begin, count in build.system_of(recipe, store).states(phase)
    )


def images_per_second(
    recipe: Recipe, phase: Phase, store: Store, device: torch.device, *, after: int = 0
) -> float:
    """Speed here `after` images of a phase, from a few seconds of real steps that are thrown away."""
    begun = build.system_of(recipe, store).start_of(phase) + after
    endless = phase.model_copy(update={"images": 10**12, "mask": phase.mask_at(after)})
    system = build.system_of(recipe.model_copy(update={"phases": (endless,)}), store)
    networks = {name: network.to(device) for name, network in system.networks(phase).items()}
    parts = [replace(part, start=0) for part in system.parts(networks) if part.start <= begun]
    plan = build.plan_phase(system, endless, parts, Ledger("", "", 0, "", 0))
    settings = LoopSettings(device, pick_dtype(recipe.train.dtype, device))
    ledger = Ledger("", "", 0, "", 0)
    turns = build.make_turns(recipe, parts, device=device)
    nowhere = RunFolder(Path())
    saver = Saver(nowhere.checkpoints, keep=1, keep_every=None, background=False)
    training = Training(turns, [plan], nowhere, Trackers([]), settings, ledger, saver)
    plan.enter()
    batches = plan.batches(0)
    for _ in range(WARM_UP_STEPS):
        training.step(plan, next(batches).to(device))
    images, started, seconds = 0, time.perf_counter(), 0.0
    while seconds < MEASURED_SECONDS:
        batch = next(batches)
        _, norm = training.step(plan, batch.to(device))
        norm.item()  # waits for the device
        images += len(batch)
        seconds = time.perf_counter() - started
    batches.close()
    return images / seconds


def scaled(recipe: Recipe, factor: float) -> Recipe:
    """The recipe with every count of training images multiplied, phases rounded to whole batches."""
    train: dict[str, Any] = {
        key: max(1, round(count * factor))
        for key in ("checkpoint_every", "keep_every", "preview_every")
        if (count := getattr(recipe.train, key)) is not None
    }
    phases = tuple(_scaled_phase(phase, factor) for phase in recipe.phases)
    changes = {
        "phases": phases,
        "objective": _scaled_objective(recipe, sum(phase.images for phase in phases)),
        "train": recipe.train.model_copy(update=train),
        "ema": _scaled_ema(recipe.ema, factor),
    }
    return Recipe.model_validate(recipe.model_copy(update=changes).model_dump())


def _scaled_phase(phase: Phase, factor: float) -> Phase:
    images = max(1, round(phase.images * factor / phase.batch)) * phase.batch
    ema = phase.ema if isinstance(phase.ema, str) else _scaled_ema(phase.ema, factor)
    warmup = min(int(phase.warmup * factor), images - 1)
    mask, batches = phase.mask, images // phase.batch
    if isinstance(mask, MaskRamp) and batches < mask.steps:
        mask = mask.model_copy(update={"steps": batches}) if batches > 1 else mask.end
    return phase.model_copy(update={"images": images, "warmup": warmup, "ema": ema, "mask": mask})


def _scaled_objective(recipe: Recipe, images: int) -> Objective:
    """A discriminator begins after the same share of a run that has so many images now."""
    objective = recipe.objective
    if not isinstance(objective, ReconstructionObjective):
        return objective
    start = objective.adversarial_start * images // recipe.images
    return objective.model_copy(update={"adversarial_start": start})


def _scaled_ema(ema: Ema | None, factor: float) -> Ema | None:
    return ema and ema.model_copy(update={"start": int(ema.start * factor)})


def _mask(phase: Phase) -> str:
    start, end = phase.mask_ends
    return f"{start:g}" if start == end else f"{start:g} to {end:g}"


def _store_to_try(recipe: Recipe, folder: Path, device: torch.device) -> Store:
    """The recipe's store, or a few of its scenes encoded into `folder`."""
    if recipe.data.scenes is None:
        return build.open_store(recipe, device=device, log=_nowhere)
    few = recipe.data.scenes.model_copy(update={"images": 64, "held_out": 1})
    return build.scenes_store(recipe, few, folder, device, _nowhere)


def _nowhere(text: str) -> None:
    """For lines that nobody needs."""
