"""Exponential moving averages of weights, several decays at once.

Running statistics of normalisations are averaged too: those of the weights as they are now do not go with
averaged weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class EMA:
    """`average <- decay * average + (1 - decay) * weights` after each step, in float32, for each decay."""

    def __init__(self, model: nn.Module, decays: Sequence[float]) -> None:
        self.decays = tuple(decays)
        kept = model.state_dict(keep_vars=True)
        moving = {
            name: tensor
            for name, tensor in kept.items()
            if tensor.requires_grad or (tensor.is_floating_point() and not isinstance(tensor, nn.Parameter))
        }
        self.names, self.weights = list(moving), list(moving.values())
        self.averages = [[w.detach().float().clone() for w in self.weights] for _ in self.decays]

    @torch.no_grad()
    def update(self) -> None:
        """Move every average towards the weights as they are now."""
        weights = [w.detach().float() for w in self.weights]
        for decay, average in zip(self.decays, self.averages, strict=True):
            torch._foreach_lerp_(average, weights, 1 - decay)

    def average(self, number: int) -> dict[str, Tensor]:
        """The averages of one decay, by the name of parameter or buffer."""
        return dict(zip(self.names, self.averages[number], strict=True))

    def state(self) -> dict[str, Tensor]:
        """The averages under `<decay>/<parameter>`."""
        return {
            f"{decay}/{name}": tensor
            for number, decay in enumerate(self.decays)
            for name, tensor in self.average(number).items()
        }
