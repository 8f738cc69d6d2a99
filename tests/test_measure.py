"""What `measure_run` makes of a run: a perfect painter scores 1, the loss is the objective's own mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from shoestring import build, measure
from shoestring.data.loader import Loader
from shoestring.data.scenes import Scene, render_many
from shoestring.data.store import Store
from shoestring.errors import CheckpointError
from shoestring.interfaces import MetricRow
from shoestring.recipes.load import dump, load_recipe
from shoestring.recipes.schema import Recipe
from shoestring.storage import RunFolder, read_json, write_json, write_text

CPU = torch.device("cpu")
SMALL = (
    *("model.hidden_size=32", "model.mixer_size=32", "model.depth=1", "model.head_dim=16"),
    *("data.scenes.images=64", "data.scenes.held_out=12", "evaluation.prompts=12", "evaluation.seeds=2"),
    *("evaluation.loss_levels=[-1, 0.5]", "evaluation.loss_images=10", "sampling.steps=2"),
)


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Recipe, RunFolder, Store]:
    """An untrained run, as its first checkpoint would leave it."""
    monkeypatch.chdir(tmp_path)
    recipe, run = load_recipe("demo", SMALL), RunFolder(Path("runs/x"))
    store = build.open_store(recipe, device=CPU, log=silent)
    system = build.system_of(recipe, store)
    system.product(system.networks(recipe.phases[0])).export(run)
    write_text(run.recipe, dump(recipe))
    return recipe, run, store


def silent(text: str) -> None:
    """For what nobody needs to read."""


def value(rows: list[MetricRow], metric: str, split: str, facet: str = "all") -> float:
    (row,) = (r for r in rows if (r["metric"], r["split"], r["facet"]) == (metric, split, facet))
    assert row["value"] is not None
    return row["value"]


def test_a_perfect_painter_scores_one_and_chance_does_not(
    made: tuple[Recipe, RunFolder, Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures rendered from the very scenes behind the prompts, in place of the network's."""
    _, run, store = made
    painted = paint_scenes(store, monkeypatch)
    rows = measure.measure_run(run, device=CPU, log=silent)
    for split in ("unseen_scenes", "unseen_pairs"):
        assert value(rows, "scene_accuracy", split) == 1.0
        assert value(rows, "scene_accuracy_shuffled", split) < 0.2
        (row,) = (
            r for r in rows if (r["metric"], r["facet"], r["split"]) == ("scene_accuracy", "all", split)
        )
        assert row["n"] == 24, "12 prompts, 2 pictures each"
    index = read_json(run.samples / "unseen_pairs/index.json")
    assert len(index) == 24
    for entry in index:
        kept = np.asarray(Image.open(run.samples / "unseen_pairs" / entry["file"]))
        assert np.array_equal(kept, painted[entry["prompt"]]), "the very pixels that were scored"
    assert all(all(entry["facets"].values()) for entry in index)


def paint_scenes(store: Store, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """`generate` gives pictures of the prompts' own scenes; what it gives for each prompt."""
    scenes = [Scene.from_json(store.record(row)["scene"]) for row in range(len(store))]
    painted = {store.captions(row)[0]: render_many([scene], 32)[0] for row, scene in enumerate(scenes)}

    def generate(pipeline: Any, prompts: list[str], seeds: list[int], **settings: Any) -> Any:
        assert len(set(seeds)) == len(seeds)
        for prompt, seed in zip(prompts, seeds, strict=True):
            image = Image.fromarray(painted[prompt])
            yield measure.Picture(image, prompt, seed, settings["steps"], settings["guidance"], "none")

    monkeypatch.setattr(measure, "generate", generate)
    return painted


def test_the_held_out_loss_is_the_objectives_mean_over_the_splits_first_rows(
    made: tuple[Recipe, RunFolder, Store],
) -> None:
    recipe, run, store = made
    rows = measure.measure_run(run, device=CPU, log=silent, prompts=1, seeds=1)
    system = build.system_of(recipe, store)
    networks = system.networks(recipe.phases[-1])
    parts = system.parts({name: network.eval() for name, network in networks.items()})
    system.enter(recipe.phases[-1], parts)
    objective: Any = parts[0].objective
    assert objective.mask == 0
    loader = Loader(store, size=32, split="unseen_pairs", batch_size=10, seed=recipe.seed)
    batch = loader.batch(0, 10)
    for level in (-1.0, 0.5):
        with torch.no_grad():
            mean = objective.loss_at(batch, torch.full((10,), level)).double().mean()
        row = value(rows, "held_out_loss", "unseen_pairs", f"log_sigma={level}")
        assert row == pytest.approx(float(mean), rel=1e-5)


def test_settings_given_are_used_and_written_down(made: tuple[Recipe, RunFolder, Store]) -> None:
    _, run, _ = made
    write_json(run.ledger, {"extra": {}})
    measure.measure_run(run, device=CPU, log=silent, prompts=2, seeds=1, steps=1, guidance=0.0)
    settings = read_json(run.evaluation)["settings"]
    assert settings == {"prompts": 2, "seeds": 1, "steps": 1, "guidance": 0.0}
    first = read_json(run.samples / "unseen_scenes/index.json")[0]
    assert (first["steps"], first["guidance"]) == (1, 0.0)
    assert read_json(run.ledger)["extra"]["evaluate_seconds"] > 0


def test_a_run_without_a_pipeline_is_refused(made: tuple[Recipe, RunFolder, Store]) -> None:
    _, run, _ = made
    run.pipeline.rename(run.root / "elsewhere")
    with pytest.raises(
        CheckpointError, match=r"runs/x: no pipeline yet, .* shoestring train runs/x --resume"
    ):
        measure.measure_run(run, device=CPU, log=silent)
    assert not run.evaluation.exists()
