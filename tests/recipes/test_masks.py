"""Mask ratios over a phase: a pure function of images, and the images that each ratio is trained at."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from shoestring.errors import RecipeError
from shoestring.recipes.checks import has_experts
from shoestring.recipes.load import load_recipe
from shoestring.recipes.schema import MaskRamp, Phase

SMALL = Path(__file__).with_name("small.yaml")


def phase(images: int, batch: int, mask: Any) -> Phase:
    return Phase(name="p", size=32, images=images, batch=batch, mask=mask, lr=1e-3)


def batches(phase: Phase) -> list[tuple[int, int]]:
    """(images before, images) of each batch."""
    firsts = range(0, phase.images, phase.batch)
    return [(first, min(phase.batch, phase.images - first)) for first in firsts]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(("start", "end"), [(0.75, 0.0), (0.0, 0.5), (0.9, 0.3)])
@pytest.mark.parametrize("steps", [2, 5, 8])
def test_a_ratio_goes_from_start_to_end_and_never_back(
    schedule: str, start: float, end: float, steps: int
) -> None:
    ramp = MaskRamp(start=start, end=end, schedule=schedule, steps=steps)  # type: ignore[arg-type]
    ratios = [ramp.ratio(step) for step in range(steps)]
    assert (ratios[0], ratios[-1]) == (start, end), "exactly, so that a mask of 0 is none"
    assert ratios == sorted(ratios, reverse=start > end)
    assert len(set(ratios)) == steps


def test_linear_steps_are_equal_and_a_cosines_are_small_at_both_ends() -> None:
    linear = [MaskRamp(start=0.6, steps=4).ratio(step) for step in range(4)]
    assert linear == pytest.approx([0.6, 0.4, 0.2, 0.0])
    cosine = [MaskRamp(start=0.8, steps=4, schedule="cosine").ratio(step) for step in range(4)]
    assert cosine == pytest.approx([0.8, 0.6, 0.2, 0.0])


def test_one_number_is_the_ratio_throughout() -> None:
    constant = phase(100, 7, 0.75)
    assert {constant.mask_at(images) for images in range(101)} == {0.75}
    assert constant.masks == ((0.75, 100),)
    assert constant.mask_ends == (0.75, 0.75)


@pytest.mark.parametrize("batch", [1, 3, 8, 10])
@pytest.mark.parametrize("images", [80, 81, 97, 240])
@pytest.mark.parametrize("steps", [2, 3, 7, 8])
def test_the_images_of_each_ratio_are_those_of_its_batches(images: int, batch: int, steps: int) -> None:
    """Against counting batch by batch; every ratio is trained at, and for about as long as each other."""
    annealed = phase(images, batch, {"start": 0.75, "steps": steps})
    counted = [
        (ratio, sum(count for _, count in group))
        for ratio, group in itertools.groupby(batches(annealed), lambda each: annealed.mask_at(each[0]))
    ]
    assert list(annealed.masks) == counted
    assert len(counted) == steps
    assert all(abs(count - images / steps) < batch for _, count in counted)
    assert annealed.mask_at(images) == annealed.mask_at(images - 1), "also after the last batch"


def test_a_layer_replaces_a_number_by_a_ramp_and_a_ramps_end_alone() -> None:
    ramp = load_recipe(SMALL, ["phases.0.mask={start: 0.5, steps: 4}", "phases.0.images=48k"]).phases[0]
    assert ramp.mask_ends == (0.5, 0.0)
    other = load_recipe(SMALL, ["phases.0.mask.start=0.5", "phases.0.mask.end=0.25"]).phases[0]
    assert (other.mask_ends, len(other.masks)) == ((0.5, 0.25), 8)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (
            ["phases.0.mask={start: 0.5, end: 0.5}"],
            "phases.0.mask: goes from 0.5 to 0.5. Write `mask: 0.5`.",
        ),
        (
            ["phases.0.mask={start: 0.5}", "phases.0.images=240", "phases.0.warmup=0"],
            "phases.0.mask.steps: 8 ratios, but the phase has only 5 batches. Choose 5 at most.",
        ),
        (
            ["phases.0.mask={start: 0.5}", "phases.0.images=48", "phases.0.warmup=0"],
            "phases.0.mask.steps: 8 ratios, but the phase has one batch. Give one number.",
        ),
        (["phases.0.mask={start: 1}"], "phases.0.mask.start: 1 is not allowed: must be less than 1."),
        (
            ["phases.0.mask={start: 0.5, steps: 1}"],
            "phases.0.mask.steps: 1 is not allowed: must be at least 2.",
        ),
        (["phases.0.mask={strat: 0.5}"], "phases.0.mask.strat: unknown key. Did you mean 'start'?"),
        (["phases.0.mask={end: 0.5}"], "phases.0.mask.start: missing."),
        (["phases.0.mask=most"], "phases.0.mask: 'most' is not allowed: must be a number."),
        (["phases.0.mask=1"], "phases.0.mask: 1 is not allowed: must be less than 1."),
        (
            ["phases.0.mask={start: 0.5, schedule: sine}"],
            "phases.0.mask.schedule: 'sine' is unknown. Did you mean 'cosine'?",
        ),
    ],
)
def test_a_mask_that_cannot_be_is_named_with_its_cure(sets: list[str], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(SMALL, sets)
    assert str(caught.value).startswith(f"--set {message}")


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["phases.0.mask=0.99"], "0.99 leaves none of the 64 patches of 32 px. Choose 0.9844 at most."),
        (
            ["phases.0.mask={start: 0.25, end: 0.99}"],
            "0.99 leaves none of the 64 patches of 32 px. Choose 0.9844 at most.",
        ),
        (
            ["phases.0.mask=0.95", "model.num_experts=8", "model.expert_capacity=1"],
            "0.95 leaves 3 of the 64 patches of 32 px, of which each of 8 experts would take 0.38, less than",
        ),
    ],
)
def test_a_mask_that_leaves_too_few_patches_is_refused(sets: list[str], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(SMALL, sets)
    assert str(caught.value).startswith(f"--set phases.0.mask: {message}")


@pytest.mark.parametrize("blocks", [0, 1, 2, 3, 7, (), (0,), (4,), (1, 3)])
@pytest.mark.parametrize("depth", [5, 8])
def test_which_recipes_have_experts_is_what_the_network_says(blocks: Any, depth: int) -> None:
    from shoestring.models.microdit import expert_positions

    assert has_experts(blocks, depth) == bool(expert_positions(blocks, depth, last=False))


def test_experts_that_no_masked_patch_reaches_do_not_limit_the_mask() -> None:
    """Those of the mixer see every patch; the backbone's last block, here its only one, has none."""
    sets = ["phases.0.mask=0.95", "model.num_experts=8", "model.expert_capacity=1", "model.depth=1"]
    assert load_recipe(SMALL, sets).phases[0].mask == 0.95
