"""MicroDiT: a transformer on an autoencoder's latents (pixels, a VAE's, or a cascade's codes)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from shoestring.build.encoders import image_decoder, scaling_of, text_encoder
from shoestring.build.looks import Drawn
from shoestring.build.systems import Networks, Opened, Part, Product, System, mismatch
from shoestring.errors import CheckpointError
from shoestring.models.microdit import MicroDiT, load_strictly
from shoestring.objectives.edm import EDMObjective
from shoestring.objectives.flow import FlowObjective
from shoestring.pipelines.load import load
from shoestring.pipelines.microdit import MicroDiTPipeline
from shoestring.pipelines.transformer import load_transformer
from shoestring.recipes.architectures import MicroDiTModel
from shoestring.recipes.checks import mask_problem
from shoestring.recipes.losses import EdmObjective
from shoestring.recipes.schema import Phase
from shoestring.sampling.schedulers import make_scheduler
from shoestring.storage import RunFolder

_INDIFFERENT = {"sample_size", "pos_interp_scale", "expert_capacity"}
"""Arguments of the network that any weights serve."""

_SHAPELESS = {"head_dim", "positions", "text_positions"}
"""Arguments that change what a network computes but not the shapes of its weights."""

_ARGUMENTS = {
    "in_channels": "the number of latent channels (the autoencoder)",
    "caption_channels": "the width of text (the text encoder)",
}
"""Arguments that come from the data, in words."""


class MicroDiTSystem(System[MicroDiTModel]):
    """One network, one turn; the mask is a matter of the phase."""

    def check(self) -> None:
        patch = self.model.patch_size
        for number, phase in enumerate(self.recipe.phases):
            _, height, width = self.store.latent_shape(phase.size)
            if height % patch or width % patch:
                raise mismatch(
                    self.recipe,
                    "model.patch_size",
                    f"{patch} does not divide the {height} x {width} latents of {phase.size} px. Use a size "
                    f"that is a multiple of {phase.size // height * patch}, or another patch size.",
                )
            if problem := mask_problem(self.model, phase, height // patch * (width // patch)):
                raise mismatch(self.recipe, f"phases.{number}.mask", problem)

    def networks(self, phase: Phase) -> dict[str, nn.Module]:
        channels, side, _ = self.store.latent_shape(phase.size)
        with self.initialising():
            network = MicroDiT(
                **self.model.model_dump(exclude={"kind"}),
                in_channels=channels,
                caption_channels=self.store.text_width,
                sample_size=side,
                pos_interp_scale=phase.position_scale,
            )
        return {"transformer": network}

    def begin(self, networks: Networks) -> None:
        if self.recipe.init:
            load_weights(networks["transformer"], self.recipe.init)

    def parts(self, networks: Networks) -> list[Part]:
        kind: Callable[..., EDMObjective | FlowObjective] = (
            EDMObjective if isinstance(self.recipe.objective, EdmObjective) else FlowObjective
        )
        numbers = self.recipe.objective.model_dump(exclude={"kind"})
        drop = self.recipe.data.caption_drop
        objective = kind(networks["transformer"], seed=self.recipe.seed, caption_drop=drop, **numbers)
        return [Part("denoiser", objective)]

    def enter(self, phase: Phase, parts: Sequence[Part]) -> None:
        objective: Any = parts[0].objective
        network: Any = objective.trained["transformer"]
        side = self.store.latent_shape(phase.size)[1]
        network.register_to_config(sample_size=side, pos_interp_scale=phase.position_scale)
        self.advance(phase, parts, 0)
        numbers = self.recipe.objective_in(phase).model_dump(exclude={"kind", "prediction"})
        objective.set_numbers(**numbers)

    def advance(self, phase: Phase, parts: Sequence[Part], images: int) -> None:
        objective: Any = parts[0].objective
        objective.mask = phase.mask_at(images)

    def states(self, phase: Phase) -> list[tuple[int, int]]:
        found, start = [], 0
        for _, count in phase.masks:
            found.append((start, count))
            start += count
        return found

    def product(self, networks: Networks) -> Product:
        return Drawn(self, self.pipeline(networks), ("transformer",))

    def opened(self, run: RunFolder) -> Opened:
        pipeline: Any = load(run.root)
        return Opened({"transformer": pipeline.transformer}, pipeline.vae, pipeline)

    def pipeline(self, networks: Networks) -> MicroDiTPipeline:
        """A pipeline around the network: the store's encoders, the recipe's sampling.

        Raises `StoreError` where an encoder's weights are no longer those that the store was made with.
        """
        objective, sampling = self.recipe.objective, self.recipe.sampling
        assert sampling is not None, "checked by the recipe"
        prediction = "edm" if objective.kind == "edm" else getattr(objective, "prediction", "velocity")
        text = text_encoder(self.recipe, self.store)
        scheduler = make_scheduler(
            sampling.scheduler,
            prediction=prediction,
            sigma_data=getattr(objective, "sigma_data", None),
            shift=sampling.shift,
        )
        return MicroDiTPipeline(
            transformer=networks["transformer"],
            vae=image_decoder(self.recipe, self.store),
            text_encoder=text.model,
            tokenizer=text.tokenizer,
            scheduler=scheduler,
            prediction=prediction,
            text_pad=self.store.pad,
            max_tokens=self.store.max_tokens,
            default_steps=sampling.steps,
            default_guidance=sampling.guidance,
            **scaling_of(self.recipe, self.store),
        )


def load_weights(network: nn.Module, path_or_id: str) -> None:
    """Start from the network of a run, a pipeline folder or a hub id: what it exported, averaged or not.

    Resolution, position scale and expert capacity may be others; positions are computed for any. Raises
    `CheckpointError` naming each argument in which the two networks differ otherwise, with both values.
    """
    try:
        other = load_transformer(path_or_id)
    except CheckpointError as error:
        raise CheckpointError(f"init {error}") from error
    assert isinstance(network, MicroDiT), "this system's network"
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
