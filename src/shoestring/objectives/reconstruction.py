"""Stage A: an autoencoder that gives its pictures back, and a critic that tells them from real ones.

    autoencoder   mse |y - x|^2 + perceptual_weight P(y, x) + codebook
                  + adversarial_weight softplus(-D(y))                   once `adversarial` is on
    critic        (softplus(-D(x)) + softplus(D(y))) / 2

    x crop of the image in [0, 1], y its reconstruction, D the critic's logits, the mean over its patches

Published are the three weights, that the adversarial one is 0 for the first 10,000 steps, and that
quantisation is skipped for 10 % (arXiv 2306.00637, appendix E); the critic's network ends in a sigmoid. No
script is. The logistic loss, each image's own coin and the codebook learning from every image are our choice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shoestring.errors import RecipeError
from shoestring.interfaces import Batch, Loss, Objective
from shoestring.objectives.denoising import in_eval_mode
from shoestring.runtime import keyed_uniform


def to_unit(images: Tensor) -> Tensor:
    """[-1, 1] -> [0, 1]."""
    return (images + 1) / 2


def random_crop(images: Tensor, size: int | None, index: Tensor, seed: int) -> Tensor:
    """A square of `size` pixels of each image, at a place keyed by its position in the run.

    (B, C, H, W) -> (B, C, size, size); all of it for None. Raises `RecipeError` where it does not fit.
    """
    if size is None:
        return images
    down, across = room(images, size)
    places = keyed_uniform(seed, "crop", index, (2,))
    within = torch.arange(size, device=images.device)
    rows = (places[:, :1] * down).long() + within  # (B, size)
    columns = (places[:, 1:] * across).long() + within
    picked = torch.arange(len(images), device=images.device)[:, None, None]
    return images[picked, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def centre_crop(images: Tensor, size: int | None) -> Tensor:
    """The middle square of `size` pixels; all of it for None. Raises `RecipeError` where it does not fit."""
    if size is None:
        return images
    top, left = ((places - 1) // 2 for places in room(images, size))
    return images[..., top : top + size, left : left + size]


def room(images: Tensor, size: int) -> tuple[int, int]:
    """How many places a crop can have, down and across."""
    height, width = images.shape[-2:]
    if size > min(height, width):
        raise RecipeError(
            f"objective.crop {size}: images are {width} x {height} px. "
            f"Use {min(height, width)} at most, or null for all of it."
        )
    return height - size + 1, width - size + 1


def reconstruct(
    vqgan: nn.Module, images: Tensor, index: Tensor, *, seed: int, quantise_skip: float
) -> tuple[Tensor, Tensor]:
    """Reconstructions (B, 3, H, W) float32 of images in [0, 1], not clamped, and the codebook's loss (B,).

    A share `quantise_skip` of the images, keyed by their positions in the run, is decoded from its latents
    as they are.
    """
    autoencoder: Any = vqgan
    latents = autoencoder.encode(images).latents
    quantised, codebook = autoencoder.quantize(latents)
    skipped = keyed_uniform(seed, "quantise_skip", index) < quantise_skip
    chosen = torch.where(skipped[:, None, None, None], latents, quantised)
    return autoencoder.decode(chosen, force_not_quantize=True).sample.float(), codebook


class ReconstructionObjective(Objective):
    """The autoencoder's turn; trains `vqgan`, with `perceptual` (a distance, or None) frozen.

    `perceptual(y, x)` takes pictures (B, 3, H, W) in [0, 1] and gives a distance (B,). `discriminator` is the
    other turn's network: it is only read, no gradient stays in it and no state of it moves. `adversarial`
    turns its term on.
    """

    def __init__(
        self,
        vqgan: nn.Module,
        *,
        seed: int,
        perceptual: nn.Module | None = None,
        discriminator: nn.Module | None = None,
        mse: float = 1.0,
        perceptual_weight: float = 0.1,
        adversarial_weight: float = 0.01,
        quantise_skip: float = 0.1,
        crop: int | None = None,
    ) -> None:
        super().__init__({"vqgan": vqgan}, {"perceptual": perceptual} if perceptual is not None else {})
        self._discriminator = (discriminator,)  # in a tuple, which nn.Module does not look into
        self.adversarial = False
        self.seed, self.crop = seed, crop
        self.mse, self.perceptual_weight = mse, perceptual_weight
        self.adversarial_weight, self.quantise_skip = adversarial_weight, quantise_skip
        self.train(self.training)

    def train(self, mode: bool = True) -> ReconstructionObjective:
        super().train(mode)
        self.frozen.eval()
        return self

    def forward(self, batch: Batch) -> Loss:
        images = random_crop(to_unit(batch.latents), self.crop, batch.index, self.seed)
        pictures, loss = reconstruct(
            self.trained["vqgan"], images, batch.index, seed=self.seed, quantise_skip=self.quantise_skip
        )
        loss = loss + self.mse * (pictures - images).square().flatten(1).mean(dim=1)
        if self.perceptual_weight and "perceptual" in self.frozen:
            loss = loss + self.perceptual_weight * self.frozen["perceptual"](pictures, images)
        if self.adversarial and self.adversarial_weight:
            loss = loss + self.adversarial_weight * _per_image(F.softplus(-self._judge(pictures)))
        return Loss(loss)

    def _judge(self, pictures: Tensor) -> Tensor:
        """The discriminator's logits, through which gradients reach the pictures alone."""
        (discriminator,) = self._discriminator
        assert discriminator is not None, "an adversarial term needs a discriminator"
        with without_gradients(discriminator), in_eval_mode(discriminator):
            return discriminator(pictures).float()

    @torch.no_grad()
    def reconstruction_error(self, batch: Batch, *, quantise: bool = False) -> Tensor:
        """Mean squared error (B,) of held-out pictures in [0, 1], clamped as they are shown.

        Of the middle where training crops; without quantisation, as the cascade uses Stage A, unless asked
        for. PSNR in dB is -10 log10 of it.
        """
        vqgan: Any = self.trained["vqgan"]
        images = centre_crop(to_unit(batch.latents), self.crop)
        with in_eval_mode(self.trained):
            latents = vqgan.encode(images).latents
            if quantise:
                latents, _ = vqgan.quantize(latents)
            pictures = vqgan.decode(latents, force_not_quantize=True).sample.float()
        return (pictures.clamp(0, 1) - images).square().flatten(1).mean(dim=1)


class DiscriminatorObjective(Objective):
    """The critic's turn: tells crops from their reconstructions; trains `discriminator`.

    `vqgan` is the other turn's network and only read: no gradient reaches it and its running statistics
    are used, not moved. Give `seed`, `crop` and `quantise_skip` of that turn, so that both see the same.
    """

    def __init__(
        self,
        discriminator: nn.Module,
        vqgan: nn.Module,
        *,
        seed: int,
        quantise_skip: float = 0.1,
        crop: int | None = None,
    ) -> None:
        super().__init__({"discriminator": discriminator})
        self._vqgan = (vqgan,)  # in a tuple, which nn.Module does not look into
        self.seed, self.crop, self.quantise_skip = seed, crop, quantise_skip

    def forward(self, batch: Batch) -> Loss:
        (vqgan,) = self._vqgan
        images = random_crop(to_unit(batch.latents), self.crop, batch.index, self.seed)
        with torch.no_grad(), in_eval_mode(vqgan):
            pictures, _ = reconstruct(
                vqgan, images, batch.index, seed=self.seed, quantise_skip=self.quantise_skip
            )
        # One pass for both: spectral norms take one step of their power iteration.
        real, made = self.trained["discriminator"](torch.cat([images, pictures])).float().chunk(2)
        return Loss((_per_image(F.softplus(-real)) + _per_image(F.softplus(made))) / 2)


@contextmanager
def without_gradients(network: nn.Module) -> Iterator[None]:
    """Within, the network's parameters need no gradient; gradients pass through it all the same.

    Its own turn's backward pass alone may fill them: DDP counts on that.
    """
    needed = [weight for weight in network.parameters() if weight.requires_grad]
    network.requires_grad_(False)
    try:
        yield
    finally:
        for weight in needed:
            weight.requires_grad_(True)


def _per_image(logits: Tensor) -> Tensor:
    """(B, 1, h, w) -> (B,)."""
    return logits.flatten(1).mean(dim=1)
