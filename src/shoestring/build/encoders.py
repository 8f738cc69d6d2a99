"""The encoders of a store, loaded again for pictures: text, and from latents back to pixels."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from shoestring.data.store import Store, split_revision
from shoestring.errors import StoreError
from shoestring.models.autoencoders import encoder_fingerprint, load_autoencoder, weights_fingerprint
from shoestring.models.text_encoders import EncodedText, TextEncoder, load_text_encoder
from shoestring.models.text_encoders import null_caption as encoded_nothing
from shoestring.recipes.schema import Recipe


def text_encoder(recipe: Recipe, store: Store) -> TextEncoder:
    """The text encoder that the store was made with; raises `StoreError` where it has other weights now."""
    words, _ = split_revision(recipe.data.text_encoder)
    revision = store.manifest["text_encoder"]["revision"]
    text = load_text_encoder(words, max_tokens=store.max_tokens, pad=store.pad, revision=revision)
    _check_encoder(store, "text_encoder", words, text.model)
    return text


def null_text(recipe: Recipe, store: Store) -> Tensor:
    """The encoded empty caption (L0, C) float32: what a dropped caption is replaced by."""
    return null_caption(recipe, store).tokens[0]


def null_caption(recipe: Recipe, store: Store) -> EncodedText:
    """The encoded empty caption, with its pooled vector where the text encoder gives one."""
    words, _ = split_revision(recipe.data.text_encoder)
    revision = store.manifest["text_encoder"]["revision"]
    return _null_caption(words, revision, store.max_tokens, store.pad)


@cache
def _null_caption(words: str, revision: str | None, max_tokens: int, pad: str) -> EncodedText:
    return encoded_nothing(load_text_encoder(words, max_tokens=max_tokens, pad=pad, revision=revision))


def image_decoder(recipe: Recipe, store: Store) -> nn.Module:
    """The autoencoder that the store was made with; raises `StoreError` where it has other weights now."""
    image, _ = split_revision(recipe.data.autoencoder)
    vae = load_autoencoder(image, revision=store.manifest["autoencoder"]["revision"])
    _check_encoder(store, "autoencoder", image, vae)
    return vae


def scaling_of(recipe: Recipe, store: Store, *, always: bool = False) -> dict[str, Any]:
    """`latents_mean` and `latents_std` for a pipeline, where the recipe says other than the autoencoder.

    A pipeline that does not ask the autoencoder for its scaling wants them `always`.
    """
    if recipe.data.normalise == "autoencoder" and not always:
        return {}
    shift, factor = store.scaling.shift, store.scaling.factor
    return {"latents_mean": list(shift), "latents_std": [1 / each for each in factor]}


def latents_of(store: Store) -> str:
    """The fingerprint of what made the store's latents: that of the encoding part, where it is told apart."""
    made_by = store.manifest["autoencoder"]
    return str(made_by.get("encoder_weights") or made_by["weights"])


def _check_encoder(store: Store, kind: str, name: str, network: torch.nn.Module) -> None:
    """Raise where the encoder of this name is not the one that the store was made with.

    Of an autoencoder the encoding part alone counts: another decoder may read the same latents.
    """
    made = store.manifest[kind]
    then = made.get("encoder_weights") or made["weights"]
    now = encoder_fingerprint(network) if kind == "autoencoder" else weights_fingerprint(network)
    if then != now:
        words = kind.replace("_", " ")
        raise StoreError(
            f"{store.place}: was made with other weights of the {words} {name} (fingerprint {then}) than are "
            f"there now ({now}). Put the old ones back, or make another store with these."
        )
