"""What a recipe will cost, and a recipe fitted into minutes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shoestring import build, estimate
from shoestring.recipes.load import load_recipe

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


@pytest.mark.parametrize("factor", [1e-6, 0.001, 0.013, 0.7])
def test_however_small_the_result_is_a_valid_recipe(factor: float) -> None:
    sets = ["phases.0.images=100", "phases.0.warmup=99", "phases.1.images=48", "ema.start=40"]
    small = estimate.scaled(load_recipe("demo", sets), factor)
    assert all(phase.images >= phase.batch for phase in small.phases)


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
    network = build.make_network(recipe, store, recipe.phases[0])
    assert parameters == f"parameters: {sum(p.numel() for p in network.parameters()):,}"
    costs = [build.phase_flops(recipe, phase, store) * 960 for phase in recipe.phases]
    assert f"960 images of 32 px, mask 0.5: {costs[0] / 960e6:.3g} MFLOP an image" in masked
    assert f"{costs[1] / 1e9:.3g} GFLOP" in dense
    assert total == f"all phases: 1,920 images, {sum(costs) / 1e9:.3g} GFLOP"
    assert not (tmp_path / "stores").exists()
