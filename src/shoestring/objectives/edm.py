"""EDM denoising loss (Karras et al. 2022, arXiv 2206.00364; constants of MicroDiT, arXiv 2407.15811).

log sigma ~ Normal(p_mean, p_std)        x = x_0 + sigma eps
D(x; sigma) = c_skip x + c_out F(c_in x; c_noise)                                 (equation 7)
loss = (sigma^2 + sd^2) / (sigma sd)^2  ||D - x_0||^2, mean over kept patches
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from shoestring.interfaces import Batch, Loss, Objective
from shoestring.objectives.denoising import draw, held_out_noise, mean_over_patches, of_any_length


class Preconditioning(NamedTuple):
    """EDM table 1, "ours": each a tensor of the shape of sigma."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


def preconditioning(sigma: Tensor, sigma_data: float) -> Preconditioning:
    """c_skip, c_out, c_in, c_noise for noise level sigma > 0."""
    variance = sigma**2 + sigma_data**2
    return Preconditioning(
        c_skip=sigma_data**2 / variance,
        c_out=sigma * sigma_data * variance.rsqrt(),
        c_in=variance.rsqrt(),
        c_noise=sigma.log() / 4,
    )


def loss_weight(sigma: Tensor, sigma_data: float) -> Tensor:
    """lambda(sigma) = 1 / c_out^2."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


class EDMObjective(Objective):
    """The MicroDiT training loss. `transformer` is any network with MicroDiT's forward arguments."""

    def __init__(
        self,
        transformer: nn.Module,
        *,
        seed: int,
        sigma_data: float = 0.9,
        p_mean: float = -0.6,
        p_std: float = 1.2,
        mask: float = 0.0,
        caption_drop: float = 0.1,
    ) -> None:
        super().__init__({"transformer": transformer})
        self.patch_size: int = transformer.config.patch_size  # type: ignore[union-attr,assignment]
        self.seed, self.mask, self.caption_drop = seed, mask, caption_drop
        self.set_numbers(sigma_data=sigma_data, p_mean=p_mean, p_std=p_std)

    def set_numbers(self, *, sigma_data: float, p_mean: float, p_std: float) -> None:
        """Change the constants, as a phase does."""
        self.sigma_data, self.p_mean, self.p_std = sigma_data, p_mean, p_std

    def forward(self, batch: Batch) -> Loss:
        draws = draw(
            batch,
            self.seed,
            mean=self.p_mean,
            deviation=self.p_std,
            mask=self.mask,
            patch_size=self.patch_size,
            caption_drop=self.caption_drop,
        )
        return Loss(self.error(*draws), noise_level=draws.log_sigma)

    def loss_at(self, batch: Batch, log_sigma: Tensor) -> Tensor:
        """The loss (B,) at given noise levels (B,), dense, captions kept, the same noise in every run."""
        return self.error(batch, log_sigma, held_out_noise(batch), keep=None)

    def error(self, batch: Batch, log_sigma: Tensor, noise: Tensor, keep: Tensor | None) -> Tensor:
        """Weighted squared error of each image (B,), for given noise (B, C, H, W)."""
        sigma = log_sigma.exp()[:, None, None, None]
        denoised = self.denoise(batch.latents + sigma * noise, sigma, batch.text, batch.text_mask, keep)
        error = loss_weight(sigma, self.sigma_data) * (denoised - batch.latents) ** 2
        return mean_over_patches(error, keep, self.patch_size)

    def denoise(
        self,
        x: Tensor,
        sigma: Tensor,
        text: Tensor,
        text_mask: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """D(x; sigma): (B, C, H, W) and sigma (B, 1, 1, 1) -> (B, C, H, W) float32."""
        c_skip, c_out, c_in, c_noise = preconditioning(sigma, self.sigma_data)
        output = self.trained["transformer"](
            hidden_states=c_in * x,
            timestep=c_noise.flatten(),
            encoder_hidden_states=of_any_length(text),
            encoder_attention_mask=of_any_length(text_mask),
            keep=keep,
            return_dict=False,
        )[0]
        return torch.addcmul(c_skip * x, c_out, output.float())
