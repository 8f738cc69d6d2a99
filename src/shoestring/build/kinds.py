"""The system for each kind of model."""

from __future__ import annotations

from shoestring.build.koala import StudentSystem, UNetSystem
from shoestring.build.microdit import MicroDiTSystem
from shoestring.build.systems import AnySystem
from shoestring.build.wuerstchen import StageA, StageB, StageC
from shoestring.data.store import Store
from shoestring.recipes.schema import Recipe

SYSTEMS: dict[str, type[AnySystem]] = {
    "microdit": MicroDiTSystem,
    "wuerstchen_vqgan": StageA,
    "wuerstchen_decoder": StageB,
    "wuerstchen_prior": StageC,
    "unet": UNetSystem,
    "unet_student": StudentSystem,
}


def system_of(recipe: Recipe, store: Store) -> AnySystem:
    """What a recipe trains, on a store."""
    return SYSTEMS[recipe.model.kind](recipe, store, recipe.model)
