"""Figures as rows: prompt-following on scenes, its ceiling and chance level, held-out loss by noise level.

Every row is a `MetricRow`: {metric, split, facet, value, low, high, n, status}, with a 95 % interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shoestring.data.scenes import Scene, render_many
from shoestring.evaluation.scene_parser import FACETS, compare, parse
from shoestring.interfaces import Batch, MetricRow

Facets = Mapping[str, bool]
Pictures = Sequence[NDArray[np.uint8]] | NDArray[np.uint8]

Z = 1.959963984540054  # half the width of a 95 % interval, in standard deviations of a normal distribution


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval for a share of `successes` in `n` trials; (0, 1) without trials.

    (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)      (Wilson 1927)
    """
    if n == 0:
        return 0.0, 1.0
    share = successes / n
    middle = share + Z**2 / (2 * n)
    reach = Z * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    scale = 1 + Z**2 / n
    return max(0.0, (middle - reach) / scale), min(1.0, (middle + reach) / scale)


def scene_accuracy(
    images: Pictures, scenes: Sequence[Scene], split: str, *, metric: str = "scene_accuracy"
) -> tuple[list[MetricRow], list[dict[str, bool]]]:
    """How many pictures show the scene they were asked for: a row for each facet, and each picture's facets.

    `images` are uint8 (H, H, 3), one for each scene. What each facet asks is said by `scene_parser.compare`;
    the headline is facet `all`: every object's shape, colour and place and the background right.
    """
    facets = [compare(scene, parse(image, scene.level)) for image, scene in zip(images, scenes, strict=True)]
    return share_rows(facets, metric, split), facets


def parser_ceiling(scenes: Sequence[Scene], size: int, split: str) -> list[MetricRow]:
    """The same shares on the scenes' own rendered pictures: what a perfect model would score."""
    return scene_accuracy(render_many(scenes, size), scenes, split, metric="parser_ceiling")[0]


def shuffled_accuracy(images: Pictures, scenes: Sequence[Scene], split: str) -> list[MetricRow]:
    """The same shares when every picture is held against the prompt of its neighbour: chance level."""
    return scene_accuracy(images, [*scenes[1:], *scenes[:1]], split, metric="scene_accuracy_shuffled")[0]


def share_rows(facets: Sequence[Facets], metric: str, split: str) -> list[MetricRow]:
    """One row a facet from each picture's facets, with Wilson intervals; several samplings may be chained."""
    n = len(facets)
    rows = []
    for facet in FACETS:
        right = sum(each[facet] for each in facets)
        low, high = wilson(right, n)
        rows.append(
            MetricRow(
                metric=metric,
                split=split,
                facet=facet,
                value=right / n if n else None,
                low=low if n else None,
                high=high if n else None,
                n=n,
                status="exact" if n else "unavailable: no pictures",
            )
        )
    return rows


@torch.no_grad()
def held_out_loss(
    loss_at: Callable[[Batch, Tensor], Tensor],
    batches: Iterable[Batch],
    levels: Sequence[float],
    *,
    split: str = "held_out",
) -> list[MetricRow]:
    """Mean loss at fixed noise levels over some batches: a row a level, and their mean as facet `all`.

    `loss_at(batch, log_sigma (B,)) -> (B,)` draws its noise keyed by `Batch.index`, so that the figure
    depends on the model alone. Intervals are normal approximations over images.
    """
    losses = []
    for batch in batches:
        at_levels = [
            loss_at(batch, torch.full((len(batch),), level, device=batch.latents.device)) for level in levels
        ]
        losses.append(torch.stack(at_levels, dim=1).cpu().double())  # (B, levels)
    by_image = torch.cat(losses) if losses else torch.zeros(0, len(levels), dtype=torch.float64)
    rows = [mean_row(by_image[:, k], split, f"log_sigma={level}") for k, level in enumerate(levels)]
    return [*rows, mean_row(by_image.mean(dim=1), split, "all")]


def mean_row(values: Tensor, split: str, facet: str, *, metric: str = "held_out_loss") -> MetricRow:
    """The mean of (n,) figures of images, with a normal interval; none from fewer than two."""
    n = len(values)
    value = float(values.mean()) if n else None
    reach = Z * float(values.std()) / math.sqrt(n) if n > 1 else None
    return MetricRow(
        metric=metric,
        split=split,
        facet=facet,
        value=value,
        low=None if value is None or reach is None else value - reach,
        high=None if value is None or reach is None else value + reach,
        n=n,
        status="exact" if n else "unavailable: no images",
    )
