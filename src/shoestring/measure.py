"""Evaluation of a run, put together: its pipeline, its store's held-out rows, the metrics."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from shoestring import build
from shoestring.data.scenes import Scene
from shoestring.data.store import Store
from shoestring.errors import CheckpointError
from shoestring.evaluation import run as metrics
from shoestring.interfaces import Log, MetricRow
from shoestring.pipelines.generate import Picture, generate, save_png
from shoestring.pipelines.load import load
from shoestring.recipes.load import load_recipe
from shoestring.recipes.schema import Recipe
from shoestring.runtime import keyed_seed
from shoestring.storage import RunFolder, atomic_path, read_json, write_json

GALLERY = 48


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

    Scene accuracy, chance and the parser's ceiling on every held-out split that has scenes; the loss at
    fixed noise levels on every held-out split, or a row that says why it is unavailable.
    """
    started = time.perf_counter()
    recipe = load_recipe(run.recipe)
    if not run.pipeline.is_dir():
        raise CheckpointError(
            f"{run.root}: no pipeline yet, so nothing to measure. "
            f"Let it reach a checkpoint: shoestring train {run.root} --resume"
        )
    pipeline = load(run.root).to(device)
    store = build.open_store(recipe, device=device, log=log)
    settings: dict[str, Any] = {
        "prompts": prompts or recipe.evaluation.prompts,
        "seeds": seeds or recipe.evaluation.seeds,
        "steps": steps or recipe.sampling.steps,
        "guidance": recipe.sampling.guidance if guidance is None else guidance,
    }
    rows: list[MetricRow] = []
    held_out = [name for name in store.splits if name != "train"]
    for split in held_out:
        if scenes := _scenes(store, split, settings["prompts"]):
            log(f"{split}: {len(scenes)} prompts x {settings['seeds']} seeds")
            rows += _scene_rows(recipe, run, pipeline, store, split, scenes, settings)
    for split in held_out:
        rows += _loss_rows(recipe, pipeline, store, split, device)
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
    captions = [store.captions(int(row))[0] for row in store.splits[split].rows(np.arange(len(scenes)))]
    repeats = settings["seeds"]
    first = keyed_seed(recipe.seed, f"evaluate {split}")
    pictures = list(
        generate(
            pipeline,
            captions * repeats,
            [first + i for i in range(len(captions) * repeats)],
            steps=settings["steps"],
            guidance=settings["guidance"],
            batch_size=128,
        )
    )
    images = [np.asarray(picture.image.convert("RGB")) for picture in pictures]
    asked = list(scenes) * repeats
    rows, facets = metrics.scene_accuracy(images, asked, split)
    _save_gallery(run, split, pictures[:GALLERY], facets)
    size = images[0].shape[0]
    return [
        *rows,
        *metrics.parser_ceiling(scenes, size, split),
        *metrics.shuffled_accuracy(images, asked, split),
    ]


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


def _loss_rows(
    recipe: Recipe, pipeline: DiffusionPipeline, store: Store, split: str, device: torch.device
) -> list[MetricRow]:
    side = pipeline.transformer.config.sample_size
    trained_at = [phase for phase in recipe.phases if store.latent_shape(phase.size)[1] == side]
    phase = trained_at[-1]
    objective = build.make_objective(recipe, pipeline.transformer)
    build.enter_phase(recipe, phase, store, objective)
    return build.held_out_rows(recipe, objective, store, split, phase.size, device)


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
