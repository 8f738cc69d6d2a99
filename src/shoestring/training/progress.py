"""Where a run stands, and the figures of its steps between two log lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

LEVELS = range(-6, 7)
"""Noise levels that losses are told apart by: log sigma, rounded and held within these."""


@dataclass
class Window:
    """Sums since the last log line; `by_noise` holds [sum of losses, images] of each noise level."""

    loss: float = 0.0
    grad_norm: float = 0.0
    images: int = 0
    steps: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    by_noise: dict[str, list[float]] = field(default_factory=dict)

    def add(self, figures: Sequence[float], grad_norm: float, images: int) -> None:
        """Take in a step: what `step_figures` gave, summed over all processes."""
        self.loss += figures[0]
        self.grad_norm += grad_norm
        self.images += images
        self.steps += 1
        sums, counts = figures[1 : 1 + len(LEVELS)], figures[1 + len(LEVELS) :]
        for level, total, count in zip(LEVELS, sums, counts, strict=True):
            if count:
                entry = self.by_noise.setdefault(str(level), [0.0, 0.0])
                entry[0] += total
                entry[1] += count

    def mean_by_noise(self) -> dict[str, float]:
        """The mean loss of each noise level that was met, lowest level first."""
        return {level: total / count for level, (total, count) in sorted(self.by_noise.items(), key=_level)}


@dataclass
class Progress:
    """Where a run stands; saved in every checkpoint."""

    phase: int = 0
    phase_images: int = 0
    images: int = 0
    step: int = 0
    reference_loss: float | None = None
    windows: int = 0
    window: Window = field(default_factory=Window)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Progress:
        """What `asdict` gave."""
        return cls(**{**value, "window": Window(**value["window"])})


def step_figures(per_sample: Tensor, noise_level: Tensor | None) -> Tensor:
    """The sum of losses, then their sums and the images by noise level: (1 + 2 levels,) on the same device.

    Sums are taken over a mask and not scattered: a scattered sum has no fixed order on a GPU.
    """
    losses = per_sample.detach().double() if per_sample.device.type != "mps" else per_sample.detach()
    if noise_level is None:
        return torch.cat([losses.sum()[None], losses.new_zeros(2 * len(LEVELS))])
    levels = torch.arange(LEVELS.start, LEVELS.stop, device=losses.device)
    nearest = noise_level.detach().round().clamp(levels[0], levels[-1])
    here = (nearest[:, None] == levels).to(losses)  # (B, levels)
    return torch.cat([losses.sum()[None], losses @ here, here.sum(dim=0)])


def _level(item: tuple[str, list[float]]) -> int:
    return int(item[0])
