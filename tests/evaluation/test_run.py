"""Figures are rows with intervals; ceilings are 1, shuffled prompts are near 0, losses are exact means."""

import numpy as np
import pytest
import torch

from shoestring.data.scenes import ScenesSource, render_many
from shoestring.evaluation.run import (
    held_out_loss,
    parser_ceiling,
    scene_accuracy,
    share_rows,
    shuffled_accuracy,
    wilson,
)
from shoestring.interfaces import Batch, MetricRow

SCENES = [ScenesSource(images=256).scene(row) for row in range(256)]


def by_facet(rows: list[MetricRow]) -> dict[str, MetricRow]:
    return {row["facet"]: row for row in rows}


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605)],
)
def test_wilson_gives_published_values(successes: int, n: int, low: float, high: float) -> None:
    """The last two are Newcombe's (Statistics in Medicine 17, 1998, table I, method 3)."""
    assert wilson(successes, n) == pytest.approx((low, high), abs=6e-5)


def test_wilson_without_trials_knows_nothing() -> None:
    assert wilson(0, 0) == (0.0, 1.0)


def test_perfect_pictures_score_one_and_the_ceiling_is_one() -> None:
    rows, facets = scene_accuracy(render_many(SCENES, 32), SCENES, "unseen_scenes")
    assert all(each["all"] for each in facets)
    for row in (*rows, *parser_ceiling(SCENES, 32, "unseen_scenes")):
        assert row["value"] == 1.0
        assert row["low"] == wilson(256, 256)[0]
        assert (row["n"], row["status"], row["split"]) == (256, "exact", "unseen_scenes")


def test_shuffled_prompts_score_under_two_percent() -> None:
    rows = by_facet(shuffled_accuracy(render_many(SCENES, 32), SCENES, "train"))
    assert rows["all"]["metric"] == "scene_accuracy_shuffled"
    assert rows["all"]["value"] is not None
    assert rows["all"]["value"] < 0.02
    assert rows["background"]["value"] == pytest.approx(1 / 3, abs=0.1)


def test_pictures_of_half_the_scenes_score_a_half() -> None:
    images = render_many(SCENES[:64], 32)
    images[::2] = 255
    rows, facets = scene_accuracy(images, SCENES[:64], "train")
    assert [each["all"] for each in facets] == [False, True] * 32
    assert by_facet(rows)["all"]["value"] == 0.5


def test_no_pictures_are_unavailable_rather_than_zero() -> None:
    row = share_rows([], "scene_accuracy", "train")[0]
    assert row["value"] is None
    assert row["status"].startswith("unavailable")


def batch(index: list[int]) -> Batch:
    count = len(index)
    return Batch(torch.tensor(index), torch.zeros(count, 3, 2, 2), torch.zeros(count, 1, 4), None)


def test_held_out_loss_is_the_mean_over_images_of_each_level() -> None:
    def loss_at(batch: Batch, log_sigma: torch.Tensor) -> torch.Tensor:
        return batch.index * 10 + log_sigma

    rows = by_facet(held_out_loss(loss_at, [batch([0, 1]), batch([2])], [-1.0, 0.5]))
    assert rows["log_sigma=-1.0"]["value"] == pytest.approx(9.0)
    assert rows["log_sigma=0.5"]["value"] == pytest.approx(10.5)
    assert rows["all"]["value"] == pytest.approx(9.75)
    assert rows["all"]["n"] == 3
    reach = 1.96 * np.std([0, 10, 20], ddof=1) / np.sqrt(3)
    assert rows["all"]["high"] == pytest.approx(9.75 + reach, rel=1e-4)


def test_held_out_loss_of_one_or_no_image_has_no_interval() -> None:
    one = held_out_loss(lambda batch, log_sigma: log_sigma, [batch([4])], [0.0])
    assert one[0]["value"] == 0.0
    assert one[0]["low"] is None
    none = held_out_loss(lambda batch, log_sigma: log_sigma, [], [0.0])
    assert none[0]["value"] is None
    assert none[0]["status"].startswith("unavailable")
