"""What a recipe will cost, and a recipe fitted into minutes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from shoestring import build, estimate
from shoestring.build.systems import Part
from shoestring.recipes.load import load_recipe, load_stages
from shoestring.recipes.losses import ReconstructionObjective
from shoestring.recipes.schema import Phase, Recipe

STAGES = Path(__file__).parent / "cli/stages.yaml"
CPU = torch.device("cpu")
SMALL = (
    *("model.hidden_size=32", "model.mixer_size=32", "model.depth=1", "model.head_dim=16"),
    *("data.scenes.images=64", "data.scenes.held_out=8", "evaluation.prompts=8"),
)


def test_scaling_keeps_whole_batches_and_every_proportion() -> None:
    recipe = load_recipe("demo", ["phases.0.images=9600", "phases.1.images=4800", "phases.0.warmup=960"])
    half = estimate.scaled(recipe, 0.5)
    assert [phase.images for phase in half.phases] == [4800, 2400]
    assert half.phases[0].warmup == 480
    for key in ("checkpoint_every", "preview_every"):
        assert getattr(half.train, key) == getattr(recipe.train, key) / 2
    assert estimate.scaled(recipe, 1.0) == recipe


def test_scaling_keeps_no_more_checkpoints_and_mask_ratios_than_there_are_batches() -> None:
    sets = ["phases.0.mask={start: 0.75, steps: 6}", "train.checkpoint_every=10k", "train.keep_every=20k"]
    recipe = load_recipe("demo", sets)  # batches of 48, of which the first phase has 500
    for factor, steps in ((1.0, 6), (0.02, 6), (0.008, 4)):
        small = estimate.scaled(recipe, factor)
        assert len(small.phases[0].masks) == steps
        assert small.phases[0].mask_ends == (0.75, 0.0)
        assert (small.train.checkpoint_every, small.train.keep_every) == (10_000 * factor, 20_000 * factor)
    assert estimate.scaled(recipe, 0.002).phases[0].mask == 0.0


@pytest.mark.parametrize("factor", [1e-6, 0.001, 0.013, 0.7])
def test_however_small_the_result_is_a_valid_recipe(factor: float) -> None:
    sets = ["phases.0.images=100", "phases.0.warmup=99", "phases.1.images=48", "ema.start=40"]
    small = estimate.scaled(load_recipe("demo", sets), factor)
    assert all(phase.images >= phase.batch for phase in small.phases)


@pytest.mark.parametrize("factor", [1e-6, 0.01, 0.5])
def test_a_discriminator_begins_after_the_same_share_of_a_shorter_run(factor: float) -> None:
    stage = load_stages("wuerstchen-demo")["a"]
    assert isinstance(stage.objective, ReconstructionObjective)
    small = estimate.scaled(stage, factor)
    assert isinstance(small.objective, ReconstructionObjective)
    share = stage.objective.adversarial_start / stage.images
    assert 0 <= share * small.images - small.objective.adversarial_start < 1


def test_speed_is_that_of_the_turns_taken_at_that_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stage A before its discriminator has begun, and afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(estimate, "MEASURED_SECONDS", 0.05)
    recipe = load_stages(STAGES)["a"]
    store = build.open_store(recipe, device=CPU, log=lambda text: None)
    taken = []
    made = build.make_turns

    def noted(recipe: Recipe, parts: Sequence[Part], **more: Any) -> Any:
        taken.append([part.name for part in parts])
        return made(recipe, parts, **more)

    monkeypatch.setattr(build, "make_turns", noted)
    assert estimate.phase_seconds(recipe, recipe.phases[0], store, CPU) > 0
    assert taken == [["generator"], ["generator", "discriminator"]]


def test_a_phase_of_one_batch_has_a_speed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(estimate, "MEASURED_SECONDS", 0.05)
    recipe = load_recipe("demo", [*SMALL, "phases.0.images=1", "phases.0.warmup=0"])
    store = build.open_store(recipe, device=CPU, log=lambda text: None)
    assert estimate.images_per_second(recipe, recipe.phases[0], store, CPU) > 0
    assert not (tmp_path / "runs").exists()


def test_cost_lines_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("demo", [*SMALL, "phases.0.images=960", "phases.1.images=960"])
    parameters, masked, dense, total = estimate.cost_lines(recipe, CPU)
    store = build.scenes_store(
        recipe,
        recipe.data.scenes,
        tmp_path,
        CPU,
        lambda text: None,  # type: ignore[arg-type]
    )
    system = build.system_of(recipe, store)
    network = system.networks(recipe.phases[0])["transformer"]
    assert parameters == f"parameters: {sum(p.numel() for p in network.parameters()):,}"
    (costs_masked,), (costs_dense,) = (build.phase_flops(system, phase).values() for phase in recipe.phases)
    costs = [costs_masked * 960, costs_dense * 960]
    assert f"960 images of 32 px, mask 0.5: {costs[0] / 960e6:.3g} MFLOP an image" in masked
    assert f"{costs[1] / 1e9:.3g} GFLOP" in dense
    assert total == f"all phases: 1,920 images, {sum(costs) / 1e9:.3g} GFLOP"
    assert not (tmp_path / "stores").exists()


def test_a_phase_with_an_annealed_mask_costs_the_sum_over_its_ratios(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ramp = "phases.0.mask={start: 0.75, end: 0.25, steps: 2}"
    recipe = load_recipe("demo", [*SMALL, ramp, "phases.0.images=912", "phases.1.images=960"])
    _, annealed, *_ = estimate.cost_lines(recipe, CPU)
    levels = [
        estimate.cost_lines(load_recipe("demo", [*SMALL, f"phases.0.mask={ratio}"]), CPU)[1]
        for ratio in (0.75, 0.25)
    ]
    per_image = [float(line.split(": ")[2].split(" MFLOP")[0]) for line in levels]
    # 19 batches of 48: the half of 912 images falls into the tenth, which has the ratio of its first image
    mean = (per_image[0] * 480 + per_image[1] * 432) / 912
    assert f"912 images of 32 px, mask 0.75 to 0.25: {mean:.3g} MFLOP an image" in annealed


def test_the_time_of_an_annealed_phase_is_that_of_its_ratios(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(estimate, "MEASURED_SECONDS", 0.05)
    recipe = load_recipe("demo", [*SMALL, "phases.0.mask={start: 0.75, steps: 2}"])
    store = build.open_store(recipe, device=CPU, log=lambda text: None)
    asked = []
    measured = estimate.images_per_second

    def noted(recipe: object, phase: Phase, *more: object, after: int) -> float:
        asked.append(phase.mask_at(after))
        return measured(recipe, phase, *more, after=after)  # type: ignore[arg-type]

    monkeypatch.setattr(estimate, "images_per_second", noted)
    assert estimate.phase_seconds(recipe, recipe.phases[0], store, CPU) > 0
    assert asked == [0.75, 0.0]
