"""Exponential moving averages of weights, several decays at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """`average <- decay * average + (1 - decay) * weights` after each step, in float32, for each decay."""

    def __init__(self, model: nn.Module, decays: Sequence[float]) -> None:
        self.decays = tuple(decays)
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]
        self.weights = [p for p in model.parameters() if p.requires_grad]
        self.averages = [[w.detach().float().clone() for w in self.weights] for _ in self.decays]

    @torch.no_grad()
    def update(self) -> None:
        """Move every average towards the weights as they are now."""
        weights = [w.detach().float() for w in self.weights]
        for decay, average in zip(self.decays, self.averages, strict=True):
            torch._foreach_lerp_(average, weights, 1 - decay)

    @contextmanager
    def applied(self, number: int = 0) -> Iterator[None]:
        """The model has the averaged weights inside, its own again afterwards, bit for bit."""
        own = [w.detach().clone() for w in self.weights]
        self._copy(self.averages[number])
        try:
            yield
        finally:
            self._copy(own)

    @torch.no_grad()
    def _copy(self, tensors: Sequence[Tensor]) -> None:
        for weight, tensor in zip(self.weights, tensors, strict=True):
            weight.copy_(tensor)

    def state(self) -> dict[str, Tensor]:
        """The averages under `<decay>/<parameter>`."""
        return {
            f"{decay}/{name}": tensor
            for decay, average in zip(self.decays, self.averages, strict=True)
            for name, tensor in zip(self.names, average, strict=True)
        }

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave."""
        for decay, average in zip(self.decays, self.averages, strict=True):
            for name, tensor in zip(self.names, average, strict=True):
                tensor.copy_(tensors[f"{decay}/{name}"])
