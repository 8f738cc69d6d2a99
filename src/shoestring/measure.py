"""Evaluation of a run, put together: its pipeline, its store's held-out rows, the metrics."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from PIL import Image

from shoestring import build
from shoestring.data.scenes import Scene, render_many
from shoestring.data.store import Store
from shoestring.errors import CheckpointError, RecipeError
from shoestring.evaluation import run as metrics
from shoestring.evaluation.reconstruction import compression, reconstruction_rows
from shoestring.interfaces import Log, MetricRow
from shoestring.models.autoencoders import (
    PIXELS,
    PixelAutoencoder,
    decode_latents,
    encode_images,
    scale_latents,
)
from shoestring.pipelines.generate import Picture, generate, save_png
from shoestring.recipes.load import load_recipe
from shoestring.recipes.schema import Recipe
from shoestring.runtime import keyed_seed
from shoestring.storage import RunFolder, atomic_path, read_json, write_json

GALLERY = 48
RECONSTRUCTED_AT_ONCE = 64


def measure_run(
    run: RunFolder,
    *,
    device: torch.device,
    log: Log,
    prompts: int | None = None,
    seeds: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
) -> list[MetricRow]:
    """Measure a run and write `evaluation.json` and `samples/`; numbers not given are the recipe's.

    Scene accuracy, chance and the parser's ceiling on every held-out split that has scenes; how near pictures
    come back from latents, where there are latents; the loss on every held-out split, or a row that says why
    it is unavailable.
    """
    started = time.perf_counter()
    recipe = load_recipe(run.recipe)
    if not run.pipeline.is_dir():
        raise CheckpointError(
            f"{run.root}: no pipeline yet, so nothing to measure. "
            f"Let it reach a checkpoint: shoestring train {run.root} --resume"
        )
    store = build.open_store(recipe, device=device, log=log)
    system = build.system_of(recipe, store)
    opened = system.opened(run)
    for network in (*opened.networks.values(), opened.autoencoder, *filter(None, [opened.pipeline])):
        network.to(device)
    for name, given in (("seeds", seeds), ("steps", steps), ("guidance", guidance)):
        if opened.pipeline is None and given is not None:
            raise RecipeError(f"--{name}: has no effect on {run.root}, which draws no prompts. Leave it out.")
    settings: dict[str, Any] = {"prompts": prompts or recipe.evaluation.prompts}
    if opened.pipeline is not None:
        assert recipe.sampling is not None, "checked by the recipe"
        settings |= {
            "seeds": seeds or recipe.evaluation.seeds,
            "steps": steps or recipe.sampling.steps,
            "guidance": recipe.sampling.guidance if guidance is None else guidance,
        }
    rows: list[MetricRow] = []
    held_out = [name for name in store.splits if name != "train"]
    for split in held_out:
        scenes = _scenes(store, split, settings["prompts"])
        if scenes and opened.pipeline is not None:
            log(f"{split}: {len(scenes)} prompts x {settings['seeds']} seeds")
            rows += _scene_rows(recipe, run, opened.pipeline, store, split, scenes, settings)
        if not isinstance(opened.autoencoder, PixelAutoencoder):
            rows += _reconstruction_rows(recipe, run, opened, system, split, scenes)
    if opened.pipeline is not None:
        rows += _reference_rows(system, held_out, settings, device)
    rows += system.network_rows(opened.networks, device)
    for split in held_out:
        rows += _loss_rows(system, opened, split, device)
    if not held_out:
        rows.append(_unavailable("the store has no held-out images; encode with --held-out N"))
    write_json(run.evaluation, {"rows": rows, "settings": settings})
    _note_seconds(run, time.perf_counter() - started)
    return rows


def _scenes(store: Store, split: str, count: int) -> list[Scene]:
    """The scenes of a split's first rows; empty where the data are no scenes."""
    held_out = store.splits[split]
    records = [store.record(int(row)) for row in held_out.rows(np.arange(min(count, len(held_out))))]
    return [Scene.from_json(record["scene"]) for record in records if "scene" in record]


def _scene_rows(
    recipe: Recipe,
    run: RunFolder,
    pipeline: DiffusionPipeline,
    store: Store,
    split: str,
    scenes: Sequence[Scene],
    settings: dict[str, Any],
) -> list[MetricRow]:
    pictures = _drawn(recipe, pipeline, store, split, len(scenes), settings)
    images = [np.asarray(picture.image.convert("RGB")) for picture in pictures]
    asked = list(scenes) * settings["seeds"]
    rows, facets = metrics.scene_accuracy(images, asked, split)
    _save_gallery(run, split, pictures[:GALLERY], facets)
    size = images[0].shape[0]
    return [
        *rows,
        *metrics.parser_ceiling(scenes, size, split),
        *metrics.shuffled_accuracy(images, asked, split),
    ]


def _reference_rows(
    system: build.AnySystem, splits: Sequence[str], settings: dict[str, Any], device: torch.device
) -> list[MetricRow]:
    """Scene accuracy of what the run is measured beside: same prompts, same seeds, once each.

    Each draws with its own steps and guidance, whatever was asked of the run.
    """
    found = {split: _scenes(system.store, split, settings["prompts"]) for split in splits}
    asked = {split: scenes for split, scenes in found.items() if scenes}
    rows: list[MetricRow] = []
    for name, pipeline in system.references() if asked else ():
        pipeline.to(device)
        for split, scenes in asked.items():
            once = {**settings, "seeds": 1, "steps": None, "guidance": None}
            pictures = _drawn(system.recipe, pipeline, system.store, split, len(scenes), once)
            images = [np.asarray(picture.image.convert("RGB")) for picture in pictures]
            rows += metrics.scene_accuracy(images, scenes, split, metric=f"{name}_scene_accuracy")[0]
    return rows


def _drawn(
    recipe: Recipe,
    pipeline: DiffusionPipeline,
    store: Store,
    split: str,
    count: int,
    settings: dict[str, Any],
) -> list[Picture]:
    """Pictures of the first captions of a split, each with `seeds` seeds."""
    captions = [store.captions(int(row))[0] for row in store.splits[split].rows(np.arange(count))]
    captions = captions * settings["seeds"]
    first = keyed_seed(recipe.seed, f"evaluate {split}")
    return list(
        generate(
            pipeline,
            captions,
            [first + i for i in range(len(captions))],
            steps=settings["steps"],
            guidance=settings["guidance"],
            batch_size=128,
        )
    )


def _save_gallery(
    run: RunFolder, split: str, pictures: Sequence[Picture], facets: Sequence[dict[str, bool]]
) -> None:
    """`samples/<split>/`: pictures and, in index.json, what was asked and what is right."""
    with atomic_path(run.samples / split) as aside:
        aside.mkdir(parents=True)
        index = []
        for number, picture in enumerate(pictures):
            name = f"{number:05d}.png"
            save_png(picture, aside / name)
            index.append({"file": name, **picture.settings(), "facets": facets[number]})
        write_json(aside / "index.json", index)


def _reconstruction_rows(
    recipe: Recipe,
    run: RunFolder,
    opened: build.Opened,
    system: build.AnySystem,
    split: str,
    scenes: Sequence[Scene],
) -> list[MetricRow]:
    """How near held-out pictures come back from the latents; nothing where the store has no pictures.

    Where latents are trained on, this is the ceiling of what can be drawn with them.
    """
    size = recipe.phases[-1].size
    if scenes:
        pixels = torch.from_numpy(render_many(scenes, size)).permute(0, 3, 1, 2).float() / 255
    elif recipe.data.autoencoder == PIXELS:
        count = recipe.evaluation.prompts
        batches = [batch.latents for batch in system.held_out(split, size, count)]
        pixels = (torch.cat(batches) + 1) / 2
    else:
        return []
    made: list[torch.Tensor] = []
    shape: tuple[int, ...] = ()
    for part in pixels.split(RECONSTRUCTED_AT_ONCE):
        raw, _ = encode_images(opened.autoencoder, part.to(_device(opened.autoencoder)) * 2 - 1)
        decoded = decode_latents(opened.autoencoder, scale_latents(opened.autoencoder, raw))
        made.append(((decoded + 1) / 2).cpu())
        shape = tuple(raw.shape[1:])
    pictures = torch.cat(made)
    if opened.pipeline is None:
        _save_reconstructions(run, split, pixels, pictures)
    return [
        *reconstruction_rows(pixels, pictures, split, scenes=scenes or None),
        *compression(pixels.shape[1:], shape, split),
    ]


def _save_reconstructions(run: RunFolder, split: str, originals: torch.Tensor, made: torch.Tensor) -> None:
    """`samples/<split>/`: each picture beside what became of it."""
    with atomic_path(run.samples / split) as aside:
        aside.mkdir(parents=True)
        for number, pair in enumerate(zip(originals[:GALLERY], made[:GALLERY], strict=True)):
            pixels = (torch.cat(pair, dim=2).clamp(0, 1) * 255).round().to(torch.uint8)
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(aside / f"{number:05d}.png")


def _device(module: torch.nn.Module) -> torch.device:
    return next(module.parameters()).device


def _loss_rows(
    system: build.AnySystem, opened: build.Opened, split: str, device: torch.device
) -> list[MetricRow]:
    phase = system.recipe.phases[-1]
    for network in opened.networks.values():
        network.eval().requires_grad_(False)
    parts = system.parts(opened.networks)
    for part in parts:
        part.objective.to(device)
    system.enter(phase, parts)
    return system.held_out_rows(parts, split, phase.size, device)


def _unavailable(reason: str) -> MetricRow:
    return MetricRow(
        metric="held_out_loss",
        split="held_out",
        facet="all",
        value=None,
        low=None,
        high=None,
        n=0,
        status=f"unavailable: {reason}",
    )


def _note_seconds(run: RunFolder, seconds: float) -> None:
    if run.ledger.is_file():
        ledger = read_json(run.ledger)
        ledger["extra"]["evaluate_seconds"] = seconds
        write_json(run.ledger, ledger)
