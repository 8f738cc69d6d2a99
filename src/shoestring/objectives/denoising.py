"""What the denoising losses share: caption drop, patches to keep, the error over kept patches.

Every draw is keyed by (seed, stream, position of the image in the run), so it does not depend on how images
are grouped into batches and processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shoestring.interfaces import Batch
from shoestring.runtime import keyed_normal, keyed_uniform


class Draws(NamedTuple):
    """What is random in one training batch: captions dropped, log sigma (B,), noise, patches to keep."""

    batch: Batch
    log_sigma: Tensor
    noise: Tensor
    keep: Tensor | None


def draw(
    batch: Batch,
    seed: int,
    *,
    mean: float,
    deviation: float,
    mask: float,
    patch_size: int,
    caption_drop: float,
) -> Draws:
    """All draws of a training batch; log sigma ~ Normal(mean, deviation)."""
    return Draws(
        batch=drop_captions(batch, caption_drop, seed),
        log_sigma=mean + deviation * keyed_normal(seed, "noise_level", batch.index),
        noise=keyed_normal(seed, "noise", batch.index, batch.latents.shape[1:]),
        keep=draw_keep(batch, patch_size, mask, seed),
    )


def held_out_noise(batch: Batch, shape: Sequence[int] | None = None) -> Tensor:
    """Noise for losses on held-out images: the same in every run, whatever its seed.

    (B, *shape), of the batch's latents where no shape is given.
    """
    return keyed_normal(0, "held_out_noise", batch.index, shape or batch.latents.shape[1:])


def of_any_length(text: Tensor | None) -> Tensor | None:
    """Text (B, L, C) or its mask (B, L), marked so that a compiled network takes any number of tokens L >= 2.

    Batches differ in L where padding is left out. Without the mark `torch.compile` makes one graph for each
    length, or one that depends on the lengths it happened to see first, which a resumed run would not repeat.
    """
    if text is not None:
        torch._dynamo.maybe_mark_dynamic(text, 1)
    return text


def drop_captions(batch: Batch, share: float, seed: int) -> Batch:
    """Replace `share` of the captions by the null caption: a zero embedding (paper, section 3).

    With a mask one zero token is left; without one, all L tokens are zero: the same to the network.
    """
    if share == 0:
        return batch
    dropped = keyed_uniform(seed, "caption_drop", batch.index) < share  # (B,)
    text = batch.text.masked_fill(dropped[:, None, None], 0.0)
    mask = batch.text_mask
    if mask is not None:
        first = torch.arange(mask.shape[1], device=mask.device) == 0
        mask = torch.where(dropped[:, None], first[None], mask)
    return replace(batch, text=text, text_mask=mask)


def replace_captions(batch: Batch, dropped: Tensor, null_text: Tensor) -> Batch:
    """The captions of the images where `dropped` (B,) is True become `null_text` (L0, C).

    With a mask, texts shorter than L0 tokens are lengthened by masked zeros, whether or not any caption is
    dropped, so that no shape depends on a coin. Without one (padded text) L0 is the length of every text.
    """
    text, mask = batch.text, batch.text_mask
    null = null_text.to(text)
    length = max(text.shape[1], len(null))
    if mask is None:
        assert text.shape[1] == len(null), "without a mask the empty caption is as long as every other"
    else:
        mask = F.pad(mask, (0, length - mask.shape[1]))
        real = torch.arange(length, device=mask.device) < len(null)
        mask = torch.where(dropped[:, None], real, mask)
    text = F.pad(text, (0, 0, 0, length - text.shape[1]))
    null = F.pad(null, (0, 0, 0, length - len(null)))
    return replace(batch, text=torch.where(dropped[:, None, None], null, text), text_mask=mask)


def batch_starts(index: Tensor, size: int, start: int = 0) -> Tensor:
    """Position (B,) of the first image of each image's batch, for batches of `size` that begin at `start`.

    A key that all images of a global batch share on every process, in every microbatch and after a resume.
    """
    return index - (index - start) % size


@contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """The module and all below it in eval mode, and afterwards each as it was."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def draw_keep(batch: Batch, patch_size: int, mask_ratio: float, seed: int) -> Tensor | None:
    """Indices (B, K) of the K = int(N (1 - mask_ratio)) patches each image keeps; None keeps all."""
    if mask_ratio == 0:
        return None
    num_patches = batch.latents.shape[-2] // patch_size * (batch.latents.shape[-1] // patch_size)
    scores = keyed_uniform(seed, "mask", batch.index, (num_patches,))
    return kept_patches(scores, mask_ratio)


def kept_patches(scores: Tensor, mask_ratio: float) -> Tensor:
    """The int(N (1 - mask_ratio)) smallest scores of each row, in the patches' order: (B, N) -> (B, K)."""
    count = max(1, int(scores.shape[1] * (1 - mask_ratio)))
    return scores.argsort(dim=1, stable=True)[:, :count].sort(dim=1).values


def mean_over_patches(error: Tensor, keep: Tensor | None, patch_size: int) -> Tensor:
    """Mean of (B, C, H, W) over the pixels of the kept patches: (B,)."""
    if keep is None:
        return error.flatten(1).mean(dim=1)
    batch, channels, height, width = error.shape
    rows, columns = height // patch_size, width // patch_size
    kept = error.new_zeros(batch, rows * columns).scatter(1, keep, 1.0).view(batch, 1, rows, columns)
    kept = kept.repeat_interleave(patch_size, 2).repeat_interleave(patch_size, 3)
    return (error * kept).flatten(1).sum(dim=1) / (keep.shape[1] * channels * patch_size**2)
