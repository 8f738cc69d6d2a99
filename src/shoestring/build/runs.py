"""A run ready to train, new or resumed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from shoestring.build.compiling import compile_network
from shoestring.build.kinds import system_of
from shoestring.build.looks import Exhibit
from shoestring.build.phases import plan_phases
from shoestring.build.systems import Networks, Part
from shoestring.cost.ledger import Ledger
from shoestring.data.store import Store
from shoestring.errors import CheckpointError, RecipeError, StoreError
from shoestring.interfaces import Log
from shoestring.processes import ALONE, World
from shoestring.recipes.load import changed_keys, dump, load_recipe
from shoestring.recipes.schema import FREE_KEYS, ROUNDING_KEYS, Ddp, Recipe
from shoestring.runtime import DTYPES, cpu_name, pick_dtype, set_threads
from shoestring.storage import RunFolder, claim, remove_leftovers, write_json, write_text
from shoestring.training import checkpoint
from shoestring.training.checkpoint import Saver
from shoestring.training.loop import LoopSettings, Training, Turn
from shoestring.training.optimizers import OptimizerSettings, make_optimizers
from shoestring.training.parallel import ParallelSettings, blocks, check_batches, distribute
from shoestring.training.tracking import Console, JsonLines, TensorBoard, Tracker, Trackers, Wandb


def make_training(
    recipe: Recipe,
    run: RunFolder,
    store: Store,
    *,
    device: torch.device,
    resume: bool,
    log: Log,
    world: World = ALONE,
) -> Training:
    """A run ready to train: a new one in a fresh folder, or one that goes on from its newest checkpoint.

    With several processes each calls it and gets its part; the main one alone writes into the run's folder.
    """
    log = log if world.is_main else _silent
    system = system_of(recipe, store)
    facts = {"store": store.identity({phase.size for phase in recipe.phases}), **system.facts()}
    saved = _where_to_begin(recipe, run, store, facts, resume, log, world)
    images = saved.state["progress"]["images"] if saved else 0
    networks = system.networks(recipe.phases[0])
    if not saved:
        system.begin(networks)
    dtype = pick_dtype(recipe.train.dtype, device)
    ledger = _ledger(recipe, networks, device, dtype, world)
    if saved:
        _tell_what_moved(saved.state["ledger"], ledger, log)
        ledger.restore(saved.state["ledger"])
    parts = system.parts(networks)
    train = recipe.train
    counts = ("spike", "log_every", "checkpoint_every", "preview_every")
    training = Training(
        turns=make_turns(recipe, parts, device=device, dtype=dtype, world=world),
        phases=plan_phases(system, parts, ledger, world),
        run=run,
        trackers=Trackers([]),
        settings=LoopSettings(device, dtype, **train.model_dump(include=set(counts))),
        ledger=ledger,
        saver=Saver(
            run.checkpoints,
            keep=train.keep,
            keep_every=train.keep_every,
            background=train.async_checkpoints,
            world=world,
        ),
        world=world,
        facts=facts,
    )
    if saved:
        training.restore(saved)
    if world.is_main:
        checkpoint.drop_newer(run.checkpoints, images)
        training.saver.prune(images)
        training.trackers = _trackers(recipe, run, images)
        _show(training, Exhibit(system, run))
        write_text(run.recipe, dump(recipe))
    return training


def _where_to_begin(
    recipe: Recipe,
    run: RunFolder,
    store: Store,
    facts: dict[str, Any],
    resume: bool,
    log: Log,
    world: World,
) -> checkpoint.Checkpoint | None:
    """The checkpoint that a resumed run goes on from; None for a new run, or where there is none yet."""
    if world.is_main:
        check_claim(recipe, run, resume, log)
        if run.checkpoints.exists() and not run.checkpoints.is_dir():
            raise CheckpointError(f"{run.checkpoints}: is a file where a folder belongs. Move it away.")
        remove_leftovers(run.root)  # of a run that was killed before it had its recipe.yaml, too
    if len(set(world.gather(facts["store"]))) > 1:
        raise StoreError(f"{store.place}: changed while the processes opened it. Start again.")
    if not resume:
        return None
    saved = checkpoint.newest(run.checkpoints, log, world)
    if saved is None:
        log(f"{run.root}: no valid checkpoint yet; starting from the beginning.")
        return None
    log(f"Resuming {run.root} after {saved.state['progress']['images']:,} images.")
    then = saved.state.get("facts", {})
    changed = [name for name, fact in facts.items() if then.get(name, fact) != fact]
    if changed and changed[0] != "store":
        raise CheckpointError(
            f"{run.root}: {changed[0]} is no longer the network that the run was trained with. "
            "Put that one back, or start a new run with --name."
        )
    if changed:
        raise CheckpointError(
            f"{run.root}: was trained on other data than {store.place} holds now (other images or captions). "
            "Resume with the store as it was, or start a new run with --name and "
            f"`--set init={run.root}`."
        )
    return saved


def _ledger(
    recipe: Recipe, networks: Networks, device: torch.device, dtype: torch.dtype, world: World
) -> Ledger:
    return Ledger(
        hardware=torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        device=str(device),
        threads=set_threads(recipe.train.threads),
        dtype=str(dtype).removeprefix("torch."),
        parameters=sum(p.numel() for network in networks.values() for p in network.parameters()),
        processes=world.size,
    )


def make_turns(
    recipe: Recipe,
    parts: Sequence[Part],
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    world: World = ALONE,
) -> list[Turn]:
    """The turns of a recipe: each objective spread over the processes, with fresh optimisers.

    Raises `RecipeError` where a phase's batch cannot be shared among the processes.
    """
    for number, phase in enumerate(recipe.phases):
        counts = {phase.batch, phase.images % phase.batch or phase.batch}
        check_batches(f"phases.{number}.batch", counts, recipe.microbatch_in(phase), world)
    return [_make_turn(recipe, part, device, dtype, world) for part in parts]


def _make_turn(recipe: Recipe, part: Part, device: torch.device, dtype: torch.dtype, world: World) -> Turn:
    settings, trained = _parallel_settings(recipe, dtype), part.objective.trained
    if recipe.train.activation_checkpointing:
        for network in trained.values():
            _save_activations(network)
    caller = distribute(part.objective, settings, world, device)
    if recipe.train.compile:
        # FSDP2 gathers weights between blocks, where no compiled graph can reach.
        sharded = settings.kind == "fsdp2" and world.size > 1
        for network in trained.values():
            compile_network(recipe, network, tuple(blocks(network)) if sharded else ())
    # A lone network's parameters keep their own names, as checkpoints have them.
    alone = next(iter(trained.values())) if len(trained) == 1 else trained
    optimizers = make_optimizers(alone, OptimizerSettings(**recipe.optimizer.model_dump()), world)
    return Turn(part.name, part.objective, optimizers, caller, part.start, averaged=part.averaged)


def _save_activations(network: Any) -> None:
    """Have a network's blocks computed again in the backward pass, where it can do that."""
    if getattr(network, "_supports_gradient_checkpointing", False):
        network.enable_gradient_checkpointing()


def _parallel_settings(recipe: Recipe, dtype: torch.dtype) -> ParallelSettings:
    parallel = recipe.parallel
    if isinstance(parallel, Ddp):
        return ParallelSettings()
    gather = dtype if parallel.gather_dtype == "auto" else DTYPES[parallel.gather_dtype]
    if gather != torch.float32 and dtype == torch.float32:
        raise RecipeError(
            f"parallel.gather_dtype: {parallel.gather_dtype} does not go with train.dtype float32. "
            "Use auto, or train.dtype bfloat16."
        )
    return ParallelSettings(
        kind="fsdp2",
        shard=parallel.shard,
        gather_dtype=gather,
        reduce_dtype=DTYPES[parallel.reduce_dtype],
        reshard_after_forward=parallel.reshard_after_forward,
    )


def check_claim(recipe: Recipe, run: RunFolder, resume: bool, log: Log | None = None) -> None:
    """Raise where the run folder is taken, is not there to resume, or was begun with another recipe.

    Keys that do not change what is learned may differ; `log` is told of those that change roundings.
    """
    if not run.recipe.is_file():
        if resume:
            raise CheckpointError(f"{run.root}: nothing to resume, there is no run. Leave --resume out.")
        return
    if not resume:
        raise CheckpointError(
            f"{run.root}: there is a run of this name already. Add --resume to go on with it, "
            "or choose another --name."
        )
    old = load_recipe(run.recipe)
    if changed := changed_keys(old, recipe, but=FREE_KEYS):
        raise RecipeError(
            f"{run.recipe}: the recipe has changed since the run began: {'; '.join(changed)}. Resume with "
            "the same recipe, or start a new run with --name (and `--set init=...` for its weights)."
        )
    if log and (rounding := changed_keys(old, recipe, only=ROUNDING_KEYS)):
        log(f"From here on equal to rounding only, no longer bit for bit: {'; '.join(rounding)}.")


@contextmanager
def claimed(run: RunFolder, world: World = ALONE) -> Iterator[None]:
    """Keep every other training out of a run's folder while this one works in it."""
    with claim(run.root) if world.is_main else nullcontext():
        world.barrier()
        yield


def _tell_what_moved(then: dict[str, Any], now: Ledger, log: Log) -> None:
    names = ("processes", "threads", "device", "dtype", "hardware")
    moved = [
        f"{name} {then[name]} -> {getattr(now, name)}"
        for name in names
        if then.get(name, 1) != getattr(now, name)
    ]
    if moved:
        log(f"From here on equal to rounding only, no longer bit for bit: {', '.join(moved)}.")


def _silent(text: str) -> None:
    """What other processes than the main one say."""


def _show(training: Training, exhibit: Exhibit) -> None:
    """Have a training's weights exported at each checkpoint and looked at for each preview."""

    def keep(images: int, weights: dict[str, Tensor], ledger: dict[str, Any]) -> None:
        exhibit.export(images, weights)
        write_json(training.run.ledger, ledger)

    def look(images: int, weights: dict[str, Tensor]) -> None:
        for record in exhibit.look(images, weights, training.settings.device):
            training.trackers.log(record)

    training.on_checkpoint, training.on_preview = keep, look


def _trackers(recipe: Recipe, run: RunFolder, images: int) -> Trackers:
    lines = JsonLines(run.metrics, images)
    trackers: list[Tracker] = [lines, Console(recipe.images)]
    for name in recipe.train.trackers:
        folder = run.root / name
        if name == "tensorboard":
            trackers.append(TensorBoard(folder, images))
        else:
            settings = recipe.model_dump(mode="json")
            trackers.append(Wandb(folder, recipe.name, settings, lines.records()))
    return Trackers(trackers)
