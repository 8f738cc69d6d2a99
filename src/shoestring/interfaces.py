"""The shapes where parts meet: what the loader yields, what an objective returns, what the loop runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypedDict

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Batch:
    """Captioned images on their way to an objective. B rows, L text tokens of width C_text.

    index         (B,) int64     position of each image in the run (0 = the first image trained on);
                                 every random draw is keyed by it, never by the place in the batch
    latents       (B, C, H, W)   float32, scaled as the model sees them (autoencoder's scaling applied)
    text          (B, L, C_text) float32 token embeddings, zero where `text_mask` is False
    text_mask     (B, L) bool    True for real tokens; None when every token counts (padded text)
    captions      B strings      the caption drawn for each image
    extra         named (B, ...) tensors some objectives need (pooled text, size and crop ids, pixels)
    """

    index: Tensor
    latents: Tensor
    text: Tensor
    text_mask: Tensor | None
    captions: tuple[str, ...] = ()
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.index.shape[0]

    def to(self, device: torch.device) -> Batch:
        """The same batch with every tensor on `device`."""

        def move(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.to(device, non_blocking=True)
            if isinstance(value, Mapping):
                return {name: move(tensor) for name, tensor in value.items()}
            return value

        return replace(self, **{f.name: move(getattr(self, f.name)) for f in fields(self)})

    def parts(self, number: int) -> Iterator[Batch]:
        """`number` consecutive parts whose sizes differ by one at most (gradient accumulation)."""
        for part in range(number):
            rows = slice(len(self) * part // number, len(self) * (part + 1) // number)
            yield Batch(
                index=self.index[rows],
                latents=self.latents[rows],
                text=self.text[rows],
                text_mask=None if self.text_mask is None else self.text_mask[rows],
                captions=self.captions[rows],
                extra={name: tensor[rows] for name, tensor in self.extra.items()},
            )


@dataclass(frozen=True)
class Loss:
    """What an objective returns for one batch.

    per_sample    (B,)   the loss of each image; the loop minimises its mean
    noise_level   (B,)   log sigma of each image (for curves by noise level), or None
    """

    per_sample: Tensor
    noise_level: Tensor | None = None


class Objective(nn.Module):
    """Turns a batch into a loss. The loop knows nothing else of models.

    `trained` parts are optimised, averaged, saved and sharded; `frozen` parts (teachers, encoders) are
    never saved. Subclasses set both in their constructor, implement `forward`, and
    may override `after_step`, which the loop calls after each optimiser step.
    """

    trained: nn.ModuleDict
    frozen: nn.ModuleDict

    def __init__(
        self, trained: Mapping[str, nn.Module], frozen: Mapping[str, nn.Module] | None = None
    ) -> None:
        super().__init__()
        self.trained = nn.ModuleDict(dict(trained))
        self.frozen = nn.ModuleDict(dict(frozen or {}))
        self.frozen.requires_grad_(False)

    def forward(self, batch: Batch) -> Loss:
        raise NotImplementedError

    def after_step(self) -> None:
        """Called once after each optimiser step; does nothing by default."""


class MetricRow(TypedDict):
    """One measured figure. `status` is `exact`, `real`, `proxy`, or `unavailable: <reason>`.

    `value`, `low` and `high` (a 95 % interval) are None where the figure is unavailable or has none.
    """

    metric: str
    split: str
    facet: str
    value: float | None
    low: float | None
    high: float | None
    n: int
    status: str


Log = Callable[[str], None]
"""Where a part says something to the user in one line; the command line passes its console."""
