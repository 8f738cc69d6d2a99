"""What a recipe trains: networks, the turns that train them, what becomes of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor, nn

from shoestring.data.loader import Loader
from shoestring.data.store import Store
from shoestring.errors import RecipeError
from shoestring.evaluation.run import held_out_loss
from shoestring.interfaces import MetricRow, Objective
from shoestring.recipes.architectures import Model
from shoestring.recipes.schema import Phase, Recipe
from shoestring.runtime import keyed_seed
from shoestring.storage import RunFolder

Networks = Mapping[str, Any]
"""A system's networks (modules) by the names of their parts in objectives, checkpoints and exports."""

Kind = TypeVar("Kind", bound=Model)

LOSS_BATCH = 64


@dataclass(frozen=True)
class Part:
    """A turn of the loop to be: its objective, and when it is taken.

    start     images of the run after which it is first taken
    averaged  whether averages of its weights are kept where the recipe asks for averages
    """

    name: str
    objective: Objective
    start: int = 0
    averaged: bool = True


class Product(Protocol):
    """What a run makes: a pipeline or an autoencoder around the system's networks (shared, not copied)."""

    def export(self, run: RunFolder) -> None:
        """Write it into the run, or bring what was written up to date."""

    def preview(self, run: RunFolder, images: int, device: torch.device) -> str:
        """Write pictures that show where the run stands; the file's name within the run."""


class Opened(NamedTuple):
    """What a run has exported, read back; `pipeline` is None where it draws no prompts."""

    networks: Networks
    autoencoder: nn.Module
    pipeline: DiffusionPipeline | None


class System(Generic[Kind]):
    """What a kind of model makes of a recipe and its store; there is a subclass for each kind."""

    def __init__(self, recipe: Recipe, store: Store, model: Kind) -> None:
        self.recipe, self.store, self.model = recipe, store, model

    def check(self) -> None:
        """Raise `RecipeError` where the store's pictures do not fit the networks."""

    def facts(self) -> dict[str, str]:
        """Fingerprints of networks that keys of the recipe name: a resumed run needs the same ones."""
        return {}

    @property
    def extra(self) -> tuple[str, ...]:
        """What batches hold beside latents and text: names of `Loader`'s `extra`."""
        return ()

    def networks(self, phase: Phase) -> dict[str, nn.Module]:
        """Networks with fresh weights drawn from the recipe's seed, at a phase's resolution."""
        raise NotImplementedError

    def begin(self, networks: Networks) -> None:
        """Give the networks of a new run the weights that they begin with, where the recipe names any."""
        raise NotImplementedError

    def parts(self, networks: Networks) -> list[Part]:
        """The turns that train the networks, set to the first phase; the first one's loss is the run's."""
        raise NotImplementedError

    def enter(self, phase: Phase, parts: Sequence[Part]) -> None:
        """Set the objectives to a phase's resolution and numbers."""

    def advance(self, phase: Phase, parts: Sequence[Part], images: int) -> None:
        """Set what changes within a phase, after `images` of it."""

    def states(self, phase: Phase) -> list[tuple[int, int]]:
        """(images of the phase after which a state begins, images in it): stretches of one cost an image."""
        return [(0, phase.images)]

    def references(self) -> Iterator[tuple[str, DiffusionPipeline]]:
        """Pipelines that a run's is measured beside, by name."""
        return iter(())

    def network_rows(self, networks: Networks, device: torch.device) -> list[MetricRow]:
        """Figures of the networks themselves, where others stand beside them."""
        return []

    def product(self, networks: Networks) -> Product:
        """What is exported and looked at."""
        raise NotImplementedError

    def opened(self, run: RunFolder) -> Opened:
        """What a run of this recipe has exported."""
        raise NotImplementedError

    def held_out_rows(
        self, parts: Sequence[Part], split: str, size: int, device: torch.device
    ) -> list[MetricRow]:
        """The loss at the recipe's fixed noise levels over the first images of a held-out split."""
        objective: Any = parts[0].objective
        settings = self.recipe.evaluation
        batches = (batch.to(device) for batch in self.held_out(split, size, settings.loss_images))
        return held_out_loss(objective.loss_at, batches, settings.loss_levels, split=split)

    def held_out(self, split: str, size: int, count: int) -> Any:
        """Batches of the first `count` images of a held-out split."""
        loader = Loader(
            self.store,
            size=size,
            split=split,
            batch_size=LOSS_BATCH,
            seed=0,
            captions=False,
            extra=self.extra,
            window=self.recipe.data.window,
        )
        return loader.batches(0, min(count, len(self.store.splits[split])))

    @contextmanager
    def initialising(self) -> Iterator[None]:
        """Initial weights made inside follow from the recipe's seed; the global generator is left alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(keyed_seed(self.recipe.seed, "initialisation"))
            yield

    def start_of(self, phase: Phase) -> int:
        """Images of the run before a phase."""
        names = [each.name for each in self.recipe.phases]
        return sum(each.images for each in self.recipe.phases[: names.index(phase.name)])

    @property
    def held_out_split(self) -> str | None:
        """The first split that is not trained on."""
        return next((name for name in self.store.splits if name != "train"), None)


AnySystem = System[Any]


def take_weights(parts: Sequence[Part], weights: Mapping[str, Tensor]) -> None:
    """Have the parts' networks hold these very tensors; no two turns train networks of one name."""
    for part in parts:
        names = part.objective.trained.state_dict()
        part.objective.trained.load_state_dict({name: weights[name] for name in names}, assign=True)


def mismatch(recipe: Recipe, key: str, message: str) -> RecipeError:
    """The error for a key of the recipe that does not go with the store."""
    return RecipeError(f"recipe {recipe.name}, {key}: {message}")
