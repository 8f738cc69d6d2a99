"""The composition root: a recipe becomes objects here, and only here."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import torch

from shoestring.cost.flops import training_flops_per_image
from shoestring.cost.ledger import Ledger
from shoestring.data.encode import EncodeSettings, encode
from shoestring.data.loader import Loader
from shoestring.data.sources import open_source
from shoestring.data.store import MANIFEST, Store, split_revision
from shoestring.errors import CheckpointError, RecipeError
from shoestring.evaluation.run import held_out_loss
from shoestring.interfaces import Batch, Log, MetricRow
from shoestring.models.autoencoders import load_autoencoder
from shoestring.models.microdit import MicroDiT, load_strictly
from shoestring.models.text_encoders import load_text_encoder
from shoestring.objectives.edm import EDMObjective
from shoestring.objectives.flow import FlowObjective
from shoestring.pipelines.export import export
from shoestring.pipelines.generate import generate, save_grid
from shoestring.pipelines.load import load
from shoestring.pipelines.microdit import MicroDiTPipeline
from shoestring.recipes.load import changed_keys, dump, load_recipe
from shoestring.recipes.schema import EdmObjective, Phase, Recipe, Scenes
from shoestring.runtime import cpu_name, keyed_seed, pick_dtype, set_threads
from shoestring.sampling.schedulers import make_scheduler
from shoestring.storage import RunFolder, fingerprint, remove_leftovers, write_json, write_text
from shoestring.training import checkpoint
from shoestring.training.loop import LoopSettings, PhasePlan, Training, Turn
from shoestring.training.optimizers import OptimizerSettings, lr_factor, make_optimizers
from shoestring.training.tracking import Console, JsonLines, TensorBoard, Tracker, Trackers, Wandb

AnyObjective = EDMObjective | FlowObjective

PREVIEWS = 8
LOSS_BATCH = 64


# --- data ------------------------------------------------------------------------------------------------


def open_store(recipe: Recipe, *, device: torch.device, log: Log) -> Store:
    """The recipe's store; scenes are made and encoded where they are not there yet.

    Raises `StoreError` where it is missing or was made with other encoders or sizes than the recipe asks.
    """
    if recipe.data.scenes is None:
        store = Store.open(str(recipe.data.store))
    else:
        store = scenes_store(recipe, recipe.data.scenes, Path("stores"), device, log)
    for size in sorted({phase.size for phase in recipe.phases}):
        store.check(
            size=size,
            autoencoder=recipe.data.autoencoder,
            text_encoder=recipe.data.text_encoder,
            pad=recipe.data.pad,
            max_tokens=recipe.data.max_tokens,
        )
        side, patch = store.latent_shape(size)[1], recipe.model.patch_size
        if side % patch:
            raise RecipeError(
                f"model.patch_size: {patch} does not divide the {side} x {side} latents of {size} px. "
                f"Use a size that is a multiple of {size // side * patch}, or another patch size."
            )
    return store


def scenes_store(recipe: Recipe, scenes: Scenes, folder: Path, device: torch.device, log: Log) -> Store:
    """The store of a recipe's scenes below `folder`, named by all that it depends on."""
    data = recipe.data
    source = open_source("scenes", scenes=scenes.model_dump())
    settings = EncodeSettings(
        autoencoder=data.autoencoder,
        text_encoder=data.text_encoder,
        sizes=(scenes.size,),
        pad=data.pad,
        max_tokens=data.max_tokens,
    )
    key = fingerprint([source.describe(), data.autoencoder, data.text_encoder, data.pad, data.max_tokens])
    path = folder / f"scenes-{key}"
    if not (path / MANIFEST).is_file():
        log(f"Making {scenes.images:,} scenes of {scenes.size} px into {path}")
    store = encode(source, path, settings, device=device, log=log)
    assert store is not None, "one worker encodes every chunk"
    return store


# --- model and objective ---------------------------------------------------------------------------------


def make_network(recipe: Recipe, store: Store, phase: Phase) -> MicroDiT:
    """The recipe's network with fresh weights drawn from its seed, at a phase's resolution."""
    channels, side, _ = store.latent_shape(phase.size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(keyed_seed(recipe.seed, "initialisation"))
        return MicroDiT(
            **recipe.model.model_dump(exclude={"kind"}),
            in_channels=channels,
            caption_channels=store.text_width,
            sample_size=side,
            pos_interp_scale=phase.position_scale,
        )


def make_objective(recipe: Recipe, network: MicroDiT) -> AnyObjective:
    """The recipe's loss around a network, set to the first phase."""
    kind: Callable[..., AnyObjective] = (
        EDMObjective if isinstance(recipe.objective, EdmObjective) else FlowObjective
    )
    numbers = recipe.objective.model_dump(exclude={"kind"})
    return kind(network, seed=recipe.seed, caption_drop=recipe.data.caption_drop, **numbers)


def enter_phase(recipe: Recipe, phase: Phase, store: Store, objective: AnyObjective) -> None:
    """Set resolution, mask and noise levels to a phase's."""
    network: Any = objective.trained["transformer"]
    network.register_to_config(
        sample_size=store.latent_shape(phase.size)[1], pos_interp_scale=phase.position_scale
    )
    objective.mask = phase.mask
    objective.set_numbers(**recipe.objective_in(phase).model_dump(exclude={"kind", "prediction"}))


def load_weights(network: MicroDiT, path_or_id: str) -> None:
    """Start from the transformer of a run or pipeline; raises `CheckpointError` where it does not fit."""
    transformer = getattr(load(path_or_id), "transformer", None)
    if transformer is None:
        raise CheckpointError(f"init {path_or_id}: its pipeline has no transformer to start from.")
    try:
        load_strictly(network, transformer.state_dict())
    except CheckpointError as error:
        raise CheckpointError(
            f"init {path_or_id}: does not fit this recipe. {error} "
            "Use the `model` section and the encoders that it was trained with."
        ) from error


def make_pipeline(recipe: Recipe, network: MicroDiT, store: Store) -> MicroDiTPipeline:
    """A pipeline around a network (shared, not copied): the store's encoders, the recipe's sampling."""
    objective = recipe.objective
    prediction = "edm" if isinstance(objective, EdmObjective) else objective.prediction
    image, _ = split_revision(recipe.data.autoencoder)
    words, _ = split_revision(recipe.data.text_encoder)
    text = load_text_encoder(
        words,
        max_tokens=store.max_tokens,
        pad=store.pad,
        revision=store.manifest["text_encoder"]["revision"],
    )
    scheduler = make_scheduler(
        recipe.sampling.scheduler,
        prediction=prediction,
        sigma_data=getattr(objective, "sigma_data", None),
        shift=recipe.sampling.shift,
    )
    return MicroDiTPipeline(
        transformer=network,
        vae=load_autoencoder(image, revision=store.manifest["autoencoder"]["revision"]),
        text_encoder=text.model,
        tokenizer=text.tokenizer,
        scheduler=scheduler,
        prediction=prediction,
        text_pad=store.pad,
        max_tokens=store.max_tokens,
        default_steps=recipe.sampling.steps,
        default_guidance=recipe.sampling.guidance,
    )


# --- training --------------------------------------------------------------------------------------------


def make_training(
    recipe: Recipe,
    run: RunFolder,
    store: Store,
    *,
    device: torch.device,
    resume: bool,
    log: Log,
) -> Training:
    """A run ready to train: a new one in a fresh folder, or one that goes on from its newest checkpoint."""
    check_claim(recipe, run, resume)
    if resume:
        remove_leftovers(run.root)
    saved = _newest_checkpoint(run, log) if resume else None
    images = saved.state["progress"]["images"] if saved else 0
    checkpoint.drop_newer(run.checkpoints, images)
    network = make_network(recipe, store, recipe.phases[0])
    if recipe.init and not saved:
        load_weights(network, recipe.init)
    objective = make_objective(recipe, network.to(device))
    if recipe.train.compile:
        network.compile()
    dtype = pick_dtype(recipe.train.dtype, device)
    ledger = Ledger(
        hardware=torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        device=str(device),
        threads=set_threads(recipe.train.threads),
        dtype=str(dtype).removeprefix("torch."),
        parameters=sum(parameter.numel() for parameter in network.parameters()),
    )
    if saved:
        ledger.restore(saved.state["ledger"])
    pipeline = make_pipeline(recipe, network, store)
    train = recipe.train
    training = Training(
        turns=[make_turn(recipe, objective)],
        phases=plan_phases(recipe, store, objective, ledger),
        run=run,
        trackers=_trackers(recipe, run, images),
        settings=LoopSettings(
            device=device,
            dtype=dtype,
            **train.model_dump(
                include={"microbatch", "spike", "log_every", "checkpoint_every", "keep", "preview_every"}
            ),
        ),
        ledger=ledger,
        on_checkpoint=lambda images: _keep(pipeline, ledger, run),
    )
    training.on_preview = lambda images: _look(training, recipe, pipeline, store, images)
    if saved:
        training.restore(saved)
    write_text(run.recipe, dump(recipe))
    return training


def make_turn(recipe: Recipe, objective: AnyObjective) -> Turn:
    """The recipe's one turn: its objective with fresh optimisers."""
    settings = OptimizerSettings(**recipe.optimizer.model_dump())
    return Turn("denoiser", objective, make_optimizers(objective.trained["transformer"], settings))


def plan_phases(recipe: Recipe, store: Store, objective: AnyObjective, ledger: Ledger) -> list[PhasePlan]:
    """Each phase with its data, rate and cost."""
    starts = itertools.accumulate((phase.images for phase in recipe.phases), initial=0)
    return [
        plan_phase(recipe, phase, start, store, objective, ledger)
        for phase, start in zip(recipe.phases, starts, strict=False)
    ]


def plan_phase(
    recipe: Recipe, phase: Phase, start: int, store: Store, objective: AnyObjective, ledger: Ledger
) -> PhasePlan:
    """A phase that begins after `start` images of the run."""
    on_gpu = next(objective.parameters()).device.type == "cuda"
    loader = Loader(
        store,
        size=phase.size,
        batch_size=phase.batch,
        seed=recipe.seed,
        captions=False,
        pin_memory=on_gpu,
    )

    def batches(images: int) -> Generator[Batch, None, None]:
        return loader.batches(start + images, start + phase.images)

    def lr(images: int) -> float:
        return phase.lr * lr_factor(phase.schedule, images, phase.images, phase.warmup, phase.final or 0.0)

    ema = recipe.ema_in(phase)
    return PhasePlan(
        name=phase.name,
        images=phase.images,
        enter=lambda: enter_phase(recipe, phase, store, objective),
        batches=batches,
        lr=lr,
        cost=lambda: ledger.phase(phase.name, phase.size, phase.mask),
        flops_per_image=phase_flops(recipe, phase, store),
        grad_clip=recipe.grad_clip_in(phase),
        ema_decays=ema.decays if ema else (),
        ema_start=ema.start if ema else 0,
    )


def phase_flops(recipe: Recipe, phase: Phase, store: Store) -> float:
    """Forward and backward operations of one image in a phase, counted on shapes alone."""
    with torch.device("meta"):
        objective = make_objective(recipe, make_network(recipe, store, phase))
    enter_phase(recipe, phase, store, objective)
    loader = Loader(store, size=phase.size, batch_size=8, seed=recipe.seed)
    return training_flops_per_image(objective, loader.batch(0, 8))


def _look(training: Training, recipe: Recipe, pipeline: MicroDiTPipeline, store: Store, images: int) -> None:
    """What is looked at while a run trains: pictures, and the loss on held-out images where there are any."""
    device = training.settings.device
    preview(recipe, pipeline.to(device), store, training.run, images)
    for encoder in (pipeline.vae, pipeline.text_encoder):  # needed on the device for previews alone
        encoder.to("cpu")
    split = next((name for name in store.splits if name != "train"), None)
    if split is None:
        return
    phase = recipe.phases[training.progress.phase]
    objective: Any = training.turns[0].objective
    rows = held_out_rows(recipe, objective, store, split, phase.size, device)
    by_noise = {row["facet"].removeprefix("log_sigma="): row["value"] for row in rows}
    record = {"kind": "held_out", "images": images, "loss": by_noise.pop("all"), "by_noise": by_noise}
    training.trackers.log(record)


def held_out_rows(
    recipe: Recipe, objective: AnyObjective, store: Store, split: str, size: int, device: torch.device
) -> list[MetricRow]:
    """The loss at the recipe's fixed noise levels over the first images of a held-out split."""
    count = min(recipe.evaluation.loss_images, len(store.splits[split]))
    loader = Loader(store, size=size, split=split, batch_size=LOSS_BATCH, seed=0, captions=False)
    batches = (batch.to(device) for batch in loader.batches(0, count))
    return held_out_loss(objective.loss_at, batches, recipe.evaluation.loss_levels, split=split)


def preview(recipe: Recipe, pipeline: MicroDiTPipeline, store: Store, run: RunFolder, images: int) -> None:
    """Pictures of the same prompts and seeds every time, as one PNG and a JSON of how they were made."""
    prompts = list(recipe.train.preview_prompts or held_out_captions(store, PREVIEWS))
    seeds = [keyed_seed(recipe.seed, "preview") + i for i in range(len(prompts))]
    pictures = list(generate(pipeline, prompts, seeds))
    path = run.previews / f"{images:09d}.png"
    save_grid([picture.image for picture in pictures], path)
    settings = {"steps": pictures[0].steps, "guidance": pictures[0].guidance, "seed": seeds[0]}
    write_json(path.with_suffix(".json"), {"prompts": prompts, "images": images, **settings})


def held_out_captions(store: Store, count: int) -> list[str]:
    """The first captions of the first held-out split, or of the training images where nothing is held out."""
    name = next((split for split in store.splits if split != "train"), "train")
    split = store.splits[name]
    rows = split.rows(torch.arange(min(count, len(split))).numpy())
    return [store.captions(int(row))[0] for row in rows]


def check_claim(recipe: Recipe, run: RunFolder, resume: bool) -> None:
    """Raise where the run folder is taken, is not there to resume, or was begun with another recipe."""
    if not run.recipe.is_file():
        if resume:
            raise CheckpointError(f"{run.root}: nothing to resume, there is no run. Leave --resume out.")
        return
    if not resume:
        raise CheckpointError(
            f"{run.root}: there is a run of this name already. Add --resume to go on with it, "
            "or choose another --name."
        )
    if changed := changed_keys(load_recipe(run.recipe), recipe):
        raise RecipeError(
            f"{run.recipe}: the recipe has changed since the run began: {'; '.join(changed)}. Resume with "
            "the same recipe, or start a new run with --name (and `--set init=...` for its weights)."
        )


def _newest_checkpoint(run: RunFolder, log: Log) -> checkpoint.Checkpoint | None:
    saved = checkpoint.newest(run.checkpoints, log)
    if saved is None:
        log(f"{run.root}: no valid checkpoint yet; starting from the beginning.")
    else:
        log(f"Resuming {run.root} after {saved.state['progress']['images']:,} images.")
    return saved


def _keep(pipeline: MicroDiTPipeline, ledger: Ledger, run: RunFolder) -> None:
    export(pipeline, run.pipeline)
    ledger.write(run.ledger)


def _trackers(recipe: Recipe, run: RunFolder, images: int) -> Trackers:
    trackers: list[Tracker] = [JsonLines(run.metrics, images), Console(recipe.images)]
    for name in recipe.train.trackers:
        tensorboard = name == "tensorboard"
        folder = run.root / name
        trackers.append(TensorBoard(folder, images) if tensorboard else Wandb(folder, recipe.name))
    return Trackers(trackers)
