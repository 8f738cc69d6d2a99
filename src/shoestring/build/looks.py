"""What is looked at while a run trains: pictures, and the loss on held-out images."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from shoestring.build.networks import (
    AnyObjective,
    enter_phase,
    make_network,
    make_objective,
    make_pipeline,
)
from shoestring.data.loader import Loader
from shoestring.data.store import Store
from shoestring.evaluation.expert_load import watched_experts
from shoestring.evaluation.run import held_out_loss
from shoestring.interfaces import MetricRow
from shoestring.pipelines.export import export
from shoestring.pipelines.generate import generate, save_grid
from shoestring.pipelines.microdit import MicroDiTPipeline
from shoestring.recipes.schema import Phase, Recipe
from shoestring.runtime import keyed_seed
from shoestring.storage import RunFolder, write_json
from shoestring.training.tracking import Record

PREVIEWS = 8
LOSS_BATCH = 64


class Exhibit:
    """A copy of the network with the run's weights (or their averages), to look at and to export.

    On the main process alone, without weights between looks. It is never compiled, sharded or trained, so
    that looking leaves the training as it is. A checkpoint's thread may export while another looks: one
    of them waits.
    """

    def __init__(self, recipe: Recipe, store: Store, run: RunFolder) -> None:
        self.recipe, self.store, self.run = recipe, store, run
        self.busy = threading.Lock()
        with torch.device("meta"):
            network = make_network(recipe, store, recipe.phases[0])
        self.objective = make_objective(recipe, network.eval().requires_grad_(False))
        self.pipeline = make_pipeline(recipe, network, store)

    def export(self, images: int, weights: dict[str, Tensor]) -> None:
        """Write the pipeline into the run, with these weights, at the resolution trained at last."""
        with self.busy:
            self._take(images, weights)
            export(self.pipeline, self.run.pipeline)
            self._let_go()

    def look(self, images: int, weights: dict[str, Tensor], device: torch.device) -> list[Record]:
        """Write pictures; a record of them, and one of the loss on held-out images where there are any."""
        with self.busy:
            phase = self._take(images, weights)
            self.pipeline.to(device)
            path = preview(self.recipe, self.pipeline, self.store, self.run, images)
            for encoder in (self.pipeline.vae, self.pipeline.text_encoder):  # needed for pictures alone
                encoder.to("cpu")
            held_out = list(self._held_out(images, phase, device))
            self._let_go()
        file = path.relative_to(self.run.root).as_posix()
        return [{"kind": "preview", "images": images, "file": file}, *held_out]

    def _take(self, images: int, weights: dict[str, Tensor]) -> Phase:
        """Hold these weights, set to the phase that the run is in after so many images; that phase."""
        self.objective.trained.load_state_dict(weights, assign=True)
        phase = self.recipe.phase_after(images)
        enter_phase(self.recipe, phase, self.store, self.objective)
        return phase

    def _let_go(self) -> None:
        """Hold no weights from look to look."""
        self.objective.trained.to_empty(device="meta")

    def _held_out(self, images: int, phase: Phase, device: torch.device) -> Iterator[Record]:
        split = next((name for name in self.store.splits if name != "train"), None)
        if split is None:
            return
        with watched_experts(self.objective.trained["transformer"]) as load:
            rows = held_out_rows(self.recipe, self.objective, self.store, split, phase.size, device)
        by_noise = {row["facet"].removeprefix("log_sigma="): row["value"] for row in rows}
        record = {"kind": "held_out", "images": images, "loss": by_noise.pop("all"), "by_noise": by_noise}
        experts = load.figures()
        yield {**record, "experts": experts} if experts else record


def held_out_rows(
    recipe: Recipe, objective: AnyObjective, store: Store, split: str, size: int, device: torch.device
) -> list[MetricRow]:
    """The loss at the recipe's fixed noise levels over the first images of a held-out split."""
    count = min(recipe.evaluation.loss_images, len(store.splits[split]))
    loader = Loader(
        store,
        size=size,
        split=split,
        batch_size=LOSS_BATCH,
        seed=0,
        captions=False,
        window=recipe.data.window,
    )
    batches = (batch.to(device) for batch in loader.batches(0, count))
    return held_out_loss(objective.loss_at, batches, recipe.evaluation.loss_levels, split=split)


def preview(recipe: Recipe, pipeline: MicroDiTPipeline, store: Store, run: RunFolder, images: int) -> Path:
    """Pictures of the same prompts and seeds every time, as one PNG and a JSON of how they were made."""
    prompts = list(recipe.train.preview_prompts or held_out_captions(store, PREVIEWS))
    seeds = [keyed_seed(recipe.seed, "preview") + i for i in range(len(prompts))]
    pictures = list(generate(pipeline, prompts, seeds))
    path = run.previews / f"{images:09d}.png"
    save_grid([picture.image for picture in pictures], path)
    settings = {"steps": pictures[0].steps, "guidance": pictures[0].guidance, "seed": seeds[0]}
    write_json(path.with_suffix(".json"), {"prompts": prompts, "images": images, **settings})
    return path


def held_out_captions(store: Store, count: int) -> list[str]:
    """The first captions of the first held-out split, or of the training images where nothing is held out."""
    name = next((split for split in store.splits if split != "train"), "train")
    split = store.splits[name]
    rows = split.rows(torch.arange(min(count, len(split))).numpy())
    return [store.captions(int(row))[0] for row in rows]
