"""A recipe's network, loss and pipeline, and what a phase changes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from shoestring.data.store import Store, split_revision
from shoestring.errors import CheckpointError, StoreError
from shoestring.models.autoencoders import load_autoencoder, weights_fingerprint
from shoestring.models.microdit import MicroDiT, load_strictly
from shoestring.models.text_encoders import load_text_encoder
from shoestring.objectives.edm import EDMObjective
from shoestring.objectives.flow import FlowObjective
from shoestring.pipelines.microdit import MicroDiTPipeline
from shoestring.pipelines.transformer import load_transformer
from shoestring.recipes.schema import EdmObjective, Phase, Recipe
from shoestring.runtime import keyed_seed
from shoestring.sampling.schedulers import make_scheduler

AnyObjective = EDMObjective | FlowObjective

_INDIFFERENT = {"sample_size", "pos_interp_scale", "expert_capacity"}
"""Arguments of the network that any weights serve."""

_SHAPELESS = {"head_dim", "positions", "text_positions"}
"""Arguments that change what a network computes but not the shapes of its weights."""

_ARGUMENTS = {
    "in_channels": "the number of latent channels (the autoencoder)",
    "caption_channels": "the width of text (the text encoder)",
}
"""Arguments that come from the data, in words."""


def make_network(recipe: Recipe, store: Store, phase: Phase) -> MicroDiT:
    """The recipe's network with fresh weights drawn from its seed, at a phase's resolution."""
    channels, side, _ = store.latent_shape(phase.size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(keyed_seed(recipe.seed, "initialisation"))
        return MicroDiT(
            **recipe.model.model_dump(exclude={"kind"}),
            in_channels=channels,
            caption_channels=store.text_width,
            sample_size=side,
            pos_interp_scale=phase.position_scale,
        )


def make_objective(recipe: Recipe, network: MicroDiT) -> AnyObjective:
    """The recipe's loss around a network, set to the first phase."""
    kind: Callable[..., AnyObjective] = (
        EDMObjective if isinstance(recipe.objective, EdmObjective) else FlowObjective
    )
    numbers = recipe.objective.model_dump(exclude={"kind"})
    return kind(network, seed=recipe.seed, caption_drop=recipe.data.caption_drop, **numbers)


def enter_phase(recipe: Recipe, phase: Phase, store: Store, objective: AnyObjective) -> None:
    """Set resolution, mask (as the phase begins) and noise levels to a phase's."""
    network: Any = objective.trained["transformer"]
    network.register_to_config(
        sample_size=store.latent_shape(phase.size)[1], pos_interp_scale=phase.position_scale
    )
    objective.mask = phase.mask_at(0)
    objective.set_numbers(**recipe.objective_in(phase).model_dump(exclude={"kind", "prediction"}))


def load_weights(network: MicroDiT, path_or_id: str) -> None:
    """Start from the network of a run, a pipeline folder or a hub id: what it exported, averaged or not.

    Resolution, position scale and expert capacity may be others; positions are computed for any. Raises
    `CheckpointError` naming each argument in which the two networks differ otherwise, with both values.
    """
    try:
        other = load_transformer(path_or_id)
    except CheckpointError as error:
        raise CheckpointError(f"init {error}") from error
    if differences := _differences(other, network):
        raise CheckpointError(
            f"init {path_or_id}: not the recipe's network: {'; '.join(differences)}. Use the `model` section "
            "and the encoders that it was trained with; sizes and expert capacity may differ."
        )
    load_strictly(network, other.state_dict())


def _differences(other: MicroDiT, network: MicroDiT) -> list[str]:
    """Arguments for which `other`'s weights do not serve `network`: "model.depth is 1 there, 2 here"."""
    shapes, wanted = ({name: t.shape for name, t in each.state_dict().items()} for each in (other, network))
    # Weights of these shapes fit whatever these say, and would be another network.
    keys = _SHAPELESS if shapes == wanted else set(network.config) - _INDIFFERENT
    there, here = (
        {key: tuple(value) if isinstance(value, list) else value for key, value in each.config.items()}
        for each in (other, network)
    )
    return [
        f"{_ARGUMENTS.get(key, f'model.{key}')} is {there.get(key)} there, {here[key]} here"
        for key in network.config
        if key in keys and not key.startswith("_") and there.get(key) != here[key]
    ]


def compile_network(
    recipe: Recipe, network: nn.Module, parts: Sequence[nn.Module] = (), *, backend: str = "inductor"
) -> None:
    """`torch.compile` a network, or each of its `parts` alone (where FSDP2 gathers weights between them).

    Every phase, mask ratio and size of microbatch gets a graph of its own shapes: the fastest, and the same
    graphs in a resumed run. Only the length of text varies within one. dynamo's limit on graphs, beyond which
    it would run uncompiled with no more than a warning, is raised to what the recipe can need.
    """
    lengths_are_marked = not parts  # by the objective, on what it hands the whole network
    fixed = lengths_are_marked or recipe.data.pad == "encoder"
    for module in parts or (network,):
        module.compile(dynamic=False if fixed else None, backend=backend)
    limit = most_graphs(recipe) * max(1, len(parts))
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, limit)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, limit)


def most_graphs(recipe: Recipe) -> int:
    """How many graphs training can need: one for each mask ratio, number of images and kind of text length.

    A batch falls into parts of at most two sizes, and so does the last, shorter one; a text of one token is
    a graph apart from all longer ones.
    """
    return sum(len(phase.masks) * 4 * 2 for phase in recipe.phases)


def make_pipeline(recipe: Recipe, network: MicroDiT, store: Store) -> MicroDiTPipeline:
    """A pipeline around a network (shared, not copied): the store's encoders, the recipe's sampling.

    Raises `StoreError` where an encoder's weights are no longer those that the store was made with.
    """
    objective = recipe.objective
    prediction = "edm" if isinstance(objective, EdmObjective) else objective.prediction
    image, _ = split_revision(recipe.data.autoencoder)
    words, _ = split_revision(recipe.data.text_encoder)
    text = load_text_encoder(
        words,
        max_tokens=store.max_tokens,
        pad=store.pad,
        revision=store.manifest["text_encoder"]["revision"],
    )
    vae = load_autoencoder(image, revision=store.manifest["autoencoder"]["revision"])
    _check_encoder(store, "autoencoder", image, vae)
    _check_encoder(store, "text_encoder", words, text.model)
    scheduler = make_scheduler(
        recipe.sampling.scheduler,
        prediction=prediction,
        sigma_data=getattr(objective, "sigma_data", None),
        shift=recipe.sampling.shift,
    )
    return MicroDiTPipeline(
        transformer=network,
        vae=vae,
        text_encoder=text.model,
        tokenizer=text.tokenizer,
        scheduler=scheduler,
        prediction=prediction,
        text_pad=store.pad,
        max_tokens=store.max_tokens,
        default_steps=recipe.sampling.steps,
        default_guidance=recipe.sampling.guidance,
    )


def _check_encoder(store: Store, kind: str, name: str, network: torch.nn.Module) -> None:
    """Raise where the encoder of this name is not the one that the store was made with."""
    then, now = store.manifest[kind]["weights"], weights_fingerprint(network)
    if then != now:
        words = kind.replace("_", " ")
        raise StoreError(
            f"{store.place}: was made with other weights of the {words} {name} (fingerprint {then}) than are "
            f"there now ({now}). Put the old ones back, or make another store with these."
        )
