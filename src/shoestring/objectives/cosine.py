"""Denoising on Würstchen's cosine schedule (arXiv 2306.00637, section 3; Nichol and Dhariwal 2102.09672).

abar(t) = cos^2((t + s) / (1 + s) pi / 2) / cos^2(s / (1 + s) pi / 2), t in [0, 1], within [1e-4, 0.9999]
x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps          sigma = sqrt((1 - abar) / abar)
loss = w(abar) ||eps_hat(x_t, t) - eps||^2, the mean over a latent

    weight    w(abar)                             what it is
    p2        1 - abar = 1 / (1 + SNR)            the published code, and what published weights saw
    paper     (1 - abar) / (1 + abar)             as the paper prints it
    none      1                                   diffusers' fine-tuning example
    x0        min((1 - abar) / abar, weight_cap)  the squared error of the implied x_0, capped

The network is called as `network(x, t, text, text_mask=mask)` with t in [0, 1] and puts out eps_hat.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from shoestring.errors import RecipeError
from shoestring.interfaces import Batch, Loss, Objective
from shoestring.objectives.denoising import (
    batch_starts,
    held_out_noise,
    in_eval_mode,
    of_any_length,
    replace_captions,
)
from shoestring.runtime import keyed_generator, keyed_normal, keyed_uniform

S = 0.008
ABAR_MIN, ABAR_MAX = 1e-4, 0.9999
TIME_SCALE, TIME_SHIFT = 1.08, 0.001
"""The published draw of t: with 1.08, a share of 1 - 0.999 / 1.08 = 7.5 % of the images is at t = 1."""

WEIGHTS = ("p2", "paper", "none", "x0")


def alpha_bar(t: Tensor, s: float = S) -> Tensor:
    """Signal variance abar of time t in [0, 1], in [1e-4, 0.9999], any shape."""
    start = math.cos(s / (1 + s) * math.pi / 2) ** 2
    abar = ((t + s) / (1 + s) * (math.pi / 2)).cos() ** 2 / start
    return abar.clamp(ABAR_MIN, ABAR_MAX)


def log_sigma_of(abar: Tensor) -> Tensor:
    """log sigma = -logit(abar) / 2, within [-4.6, 4.6]."""
    return -abar.logit() / 2


def time_of(log_sigma: Tensor, s: float = S) -> Tensor:
    """t of a noise level, the inverse of `log_sigma_of(alpha_bar(t))`.

    Levels beyond the clamp give the times at which it sets in: 0.0022 and 0.9936.
    """
    start = math.cos(s / (1 + s) * math.pi / 2) ** 2
    abar = (-2 * log_sigma).sigmoid().clamp(ABAR_MIN, ABAR_MAX)
    return (abar * start).sqrt().acos() * (2 / math.pi) * (1 + s) - s


def draw_time(uniform: Tensor, scale: float = TIME_SCALE) -> Tensor:
    """t = clamp((1 - U) scale + 0.001, 0.001, 1) for U in [0, 1); Stable Cascade's scale is 1."""
    return ((1 - uniform) * scale + TIME_SHIFT).clamp(TIME_SHIFT, 1.0)


def loss_weight(abar: Tensor, weight: str = "p2", cap: float | None = None) -> Tensor:
    """w(abar), as in the table above; `cap` is read by `x0` alone."""
    if weight == "p2":
        return 1 - abar
    if weight == "paper":
        return (1 - abar) / (1 + abar)
    if weight == "x0":
        return ((1 - abar) / abar).clamp(max=math.inf if cap is None else cap)
    return torch.ones_like(abar)


def check_weight(weight: str, cap: float | None) -> None:
    """Raise `RecipeError` for a weight there is not, or a cap that nothing reads."""
    if weight not in WEIGHTS:
        raise RecipeError(f"objective.weight {weight!r}: unknown. Use {', '.join(WEIGHTS)}.")
    if cap is not None and weight != "x0":
        raise RecipeError(f"objective.weight_cap {cap:g}: has no effect with weight {weight}. Leave it out.")


def diffuse(x: Tensor, noise: Tensor, abar: Tensor) -> Tensor:
    """x_t: (B, ...), (B, ...) and abar (B,) -> (B, ...)."""
    abar = abar.view(-1, *[1] * (x.ndim - 1))
    return abar.sqrt() * x + (1 - abar).sqrt() * noise


def weighted_error(
    output: Tensor, noise: Tensor, abar: Tensor, weight: str, cap: float | None = None
) -> Tensor:
    """w(abar) times the mean squared error of each image: (B, ...), (B, ...) and (B,) -> (B,) float32."""
    error = (output.float() - noise).square().flatten(1).mean(dim=1)
    return loss_weight(abar, weight, cap) * error


def default_timesteps() -> list[float]:
    """diffusers' `DEFAULT_STAGE_C_TIMESTEPS`: 30 times from 1 to 0, 29 steps, the first 19 of them 1/57."""
    return _line(1.0, 2 / 3, 20) + _line(2 / 3, 0.0, 11)[1:]


def published_timesteps() -> list[float]:
    """The authors' {2/3: 20, 0: 10}: 31 times from 1 to 0, 20 steps of 1/60 and 10 of 1/15."""
    return _line(1.0, 2 / 3, 21) + _line(2 / 3, 0.0, 11)[1:]


def _line(start: float, stop: float, count: int) -> list[float]:
    """`count` evenly spaced numbers, both ends exact."""
    return [start + (stop - start) * k / (count - 1) for k in range(count - 1)] + [stop]


class PriorObjective(Objective):
    """Stage C: eps of the compressed latents from their captions.

    `null_text` (L0, C) is the encoded empty string, which a dropped caption becomes. With `drop="sample"`
    each image has its own coin; with `drop="batch"`, as in the authors' scripts, all images of a batch share
    one: `set_batches` must then say where batches begin. The
    network convolves, so no patch can be left out.
    """

    null_text: Tensor

    def __init__(
        self,
        prior: nn.Module,
        *,
        seed: int,
        null_text: Tensor,
        caption_drop: float = 0.05,
        drop: str = "sample",
        weight: str = "p2",
        weight_cap: float | None = None,
        time_scale: float = TIME_SCALE,
    ) -> None:
        super().__init__({"prior": prior})
        if drop not in ("sample", "batch"):
            raise RecipeError(f"objective.drop {drop!r}: unknown. Use sample or batch.")
        self.register_buffer("null_text", null_text, persistent=False)
        self.seed, self.caption_drop, self.drop = seed, caption_drop, drop
        self.batch_size, self.batches_start = 0, 0
        check_weight(weight, weight_cap)
        self.weight, self.weight_cap, self.time_scale = weight, weight_cap, time_scale

    def set_batches(self, size: int, start: int = 0) -> None:
        """Say that batches of `size` images begin at position `start` of the run; for `drop="batch"`."""
        self.batch_size, self.batches_start = size, start

    def forward(self, batch: Batch) -> Loss:
        t = draw_time(keyed_uniform(self.seed, "noise_level", batch.index), self.time_scale)
        noise = keyed_normal(self.seed, "noise", batch.index, batch.latents.shape[1:])
        coins = batch.index
        if self.drop == "batch":
            assert self.batch_size, "batches that share a coin were set"
            coins = batch_starts(coins, self.batch_size, self.batches_start)
        dropped = keyed_uniform(self.seed, "caption_drop", coins) < self.caption_drop
        batch = replace_captions(batch, dropped, self.null_text)
        with keyed_generator(self.seed, "dropout", batch.index):
            loss = self.error(batch, t, noise)
        return Loss(loss, noise_level=log_sigma_of(alpha_bar(t)))

    def loss_at(self, batch: Batch, log_sigma: Tensor) -> Tensor:
        """The loss (B,) at given noise levels (B,): captions kept, no dropout, the same noise always."""
        with in_eval_mode(self.trained):
            return self.error(batch, time_of(log_sigma), held_out_noise(batch))

    def error(self, batch: Batch, t: Tensor, noise: Tensor) -> Tensor:
        """Weighted squared error of each image (B,) at times t (B,), for given noise (B, C, H, W)."""
        abar = alpha_bar(t)
        output = self.trained["prior"](
            diffuse(batch.latents, noise, abar),
            t,
            of_any_length(batch.text),
            text_mask=of_any_length(batch.text_mask),
        )
        return weighted_error(output, noise, abar, self.weight, self.weight_cap)
