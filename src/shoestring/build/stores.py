"""A recipe's data become an open store."""

from __future__ import annotations

from pathlib import Path

import torch

from shoestring.build.kinds import system_of
from shoestring.data.encode import EncodeSettings, encode
from shoestring.data.manifest import MANIFEST
from shoestring.data.sources import open_source
from shoestring.data.store import Store, split_revision
from shoestring.interfaces import Log
from shoestring.models.autoencoders import PIXELS, load_autoencoder, weights_fingerprint
from shoestring.processes import ALONE, World
from shoestring.recipes.schema import Recipe, Scenes
from shoestring.storage import fingerprint


def open_store(recipe: Recipe, *, device: torch.device, log: Log, world: World = ALONE) -> Store:
    """The recipe's store; scenes are made and encoded where they are not there yet, by one process a machine.

    Raises `StoreError` where it is missing or was made with other encoders or sizes than the recipe asks,
    `RecipeError` where patches or masks do not fit its pictures.
    """
    if recipe.data.scenes is None:
        store = Store.open(str(recipe.data.store))
    else:
        with world.first_on_machine():
            store = scenes_store(recipe, recipe.data.scenes, Path("stores"), device, log)
    if recipe.data.captions:
        store = store.drawing(recipe.data.captions)
    for size in sorted({phase.size for phase in recipe.phases}):
        store.check(
            size=size,
            autoencoder=recipe.data.autoencoder,
            text_encoder=recipe.data.text_encoder,
            pad=recipe.data.pad,
            max_tokens=recipe.data.max_tokens,
        )
    store = store.normalised(recipe.data.normalise, recipe.phases[-1].size)
    system_of(recipe, store).check()
    return store


def scenes_store(recipe: Recipe, scenes: Scenes, folder: Path, device: torch.device, log: Log) -> Store:
    """The store of a recipe's scenes below `folder`, named by all that it depends on."""
    data = recipe.data
    source = open_source("scenes", scenes=scenes.model_dump())
    settings = EncodeSettings(
        autoencoder=data.autoencoder,
        text_encoder=data.text_encoder,
        sizes=(scenes.size,),
        pad=data.pad,
        max_tokens=data.max_tokens,
    )
    made_by = [data.autoencoder, data.text_encoder]
    if data.autoencoder != PIXELS:  # a run of this name may be trained anew
        made_by.append(weights_fingerprint(load_autoencoder(*split_revision(data.autoencoder))))
    key = fingerprint([source.describe(), *made_by, data.pad, data.max_tokens])
    path = folder / f"scenes-{key}"
    if not (path / MANIFEST).is_file():
        log(f"Making {scenes.images:,} scenes of {scenes.size} px into {path}")
    store = encode(source, path, settings, device=device, log=log)
    assert store is not None, "one worker encodes every chunk"
    return store
