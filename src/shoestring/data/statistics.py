"""Which numbers latents are normalised by: the autoencoder's own, measured ones, or those of Wuerstchen v2.

autoencoder   as the autoencoder's configuration says
measured      mean 0 and standard deviation 1 in each channel, measured on this store
x42-1         (z + 1) / 42, as Wuerstchen v2 was trained (its latents are undone by x * 42 - 1)
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shoestring.data.splits import Rows, Split
from shoestring.errors import StoreError
from shoestring.models.autoencoders import LatentScaling, PixelAutoencoder

if TYPE_CHECKING:
    from shoestring.data.store import Store

AUTOENCODER, MEASURED, PUBLISHED = "autoencoder", "measured", "x42-1"
RULES = (AUTOENCODER, MEASURED, PUBLISHED)

ROWS, RUNS = 16_384, 64  # rows that are measured, and runs of neighbours that they lie in
ROWS_AT_ONCE = 256


def scaling_by(rule: str, store: Store, size: int | None = None) -> LatentScaling:
    """The scaling of a store's raw latents by one of `RULES`, measured at `size` (the largest unless given).

    Raises `StoreError` for another rule, and for pixels, which are in [-1, 1] already.
    """
    if rule == AUTOENCODER:
        return own_scaling(store.manifest)
    if rule not in RULES:
        raise StoreError(f"latents normalised by {rule!r}: unknown. Use one of {', '.join(RULES)}.")
    if store.manifest["autoencoder"]["class"] == PixelAutoencoder.__name__:
        raise StoreError(
            f"{store.place}: holds pictures, which are in [-1, 1] already, so there is nothing to normalise "
            f"by {rule!r}. Use {AUTOENCODER!r}, or a store of latents."
        )
    if rule == PUBLISHED:
        return LatentScaling((-1.0,), (1 / 42,))
    return latent_statistics(store, max(store.sizes) if size is None else size)


def own_scaling(manifest: Mapping[str, Any]) -> LatentScaling:
    """The scaling that the autoencoder of a store asks for, as the manifest has it."""
    scaling = manifest["autoencoder"]["scaling"]
    return LatentScaling(tuple(scaling["shift"]), tuple(scaling["factor"]))


def latent_statistics(store: Store, size: int) -> LatentScaling:
    """The scaling that gives a store's raw latents mean 0 and standard deviation 1 in each channel.

    Measured in float64 on the training rows, or on 64 runs of 256 neighbours spread evenly over them: few
    shards of a large store, and no more than 16,384 images. Latents stored as distributions count with
    their variance. The rows are the same for any chunking, and numbers are rounded to six digits, which
    hides in what order they were summed. Raises `StoreError` where a channel never changes.
    """
    if not len(store.splits.get("train", ())):
        raise StoreError(f"{store.place}: has no training rows to measure latents on.")
    rows = measured_rows(store.splits["train"])
    raw = copy.copy(store)
    raw.scaling = LatentScaling()
    total = np.zeros(store.latent_shape(size)[0])
    squares = np.zeros_like(total)
    values = 0
    for part in np.split(rows, range(ROWS_AT_ONCE, len(rows), ROWS_AT_ONCE)):
        latents = raw.latents(size, part)
        total += _sums(latents)
        squares += _sums(latents, 2)
        if store.has_log_variance:  # the variance of draws: that of their means, and their own
            squares += _sums(raw.latents(size, part, noise=torch.ones_like(latents)) - latents, 2)
        values += latents[:, 0].numel()
    mean = total / values
    std = np.sqrt(np.maximum(squares / values - mean**2, 0))
    if dead := np.flatnonzero(std <= 1e-6 * (np.abs(mean) + 1e-6)).tolist():
        raise StoreError(
            f"{store.place}: channel {dead[0]} of the latents is {mean[dead[0]]:.3g} everywhere and cannot "
            f"be normalised: the autoencoder does not use it. Train that longer, or use {AUTOENCODER!r}."
        )
    shift, factor = (tuple(float(f"{each:.6g}") for each in numbers) for numbers in (mean, 1 / std))
    return LatentScaling(shift, factor)


def measured_rows(split: Split) -> Rows:
    """Rows of a split that statistics are measured on, in the order on disk."""
    if len(split) <= ROWS:
        return split.on_disk(np.arange(len(split)))
    starts = np.arange(RUNS) * (len(split) - ROWS // RUNS) // (RUNS - 1)
    return split.on_disk((starts[:, None] + np.arange(ROWS // RUNS)).ravel())


def _sums(latents: Tensor, power: int = 1) -> NDArray[np.float64]:
    """Sums of powers over images and places: (B, C, h, w) -> (C,), in an order that no thread changes."""
    values = latents.double().numpy()
    return np.asarray((values**power).sum(axis=(0, 2, 3)))
