"""Stage B: from a code back to Stage A's latents, the compressor trained with it (arXiv 2306.00637, 3.1).

    image -> vqgan.encode / scale_factor -> x_0 -> x_t, t ---.
    image -> compressor -> z -> dropped or noised ------------> decoder -> eps_hat     loss as in cosine.py
                           text (if used) --------------------'

No script of v2's Stage B was published. Code drop and code noise are those of v1's, where a batch has one
coin; here each image has its own. Batches carry pixels: `Batch.latents` is (B, 3, H, W) in [-1, 1].
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shoestring.interfaces import Batch, Loss, Objective
from shoestring.objectives.cosine import (
    TIME_SCALE,
    alpha_bar,
    check_weight,
    diffuse,
    draw_time,
    log_sigma_of,
    time_of,
    weighted_error,
)
from shoestring.objectives.denoising import held_out_noise, in_eval_mode, of_any_length, replace_captions
from shoestring.objectives.reconstruction import to_unit
from shoestring.runtime import full_precision, keyed_generator, keyed_normal, keyed_uniform

CODE_NOISE_TIME = 0.5
"""Codes are noised to a time drawn from [0, 0.5] (v1's script)."""


class Compressor(Protocol):
    """What is asked of a compressor: images (B, 3, H, W) in [0, 1] -> codes (B, C, h, w)."""

    def compress(self, images: Tensor) -> Tensor: ...


class DecoderObjective(Objective):
    """Stage B's loss; trains `decoder` and `compressor`, with `vqgan` (Stage A) frozen and in eval mode.

    A share `code_drop` of the codes is set to 0, a share `code_noise` of the rest is noised as x_t is (the
    compressor's norm begins with codes of unit variance), and a share `caption_drop` of the captions becomes
    `null_text` (L0, C). Without `use_text` the decoder gets no text and neither of these two is read.

    With a `code_weight` the `previewer` is trained here too, and its error, so weighted, is added to each
    image's loss: codes then lie near what pictures look like, which a prior learns sooner. 0 as published.
    """

    null_text: Tensor | None

    def __init__(
        self,
        decoder: nn.Module,
        compressor: nn.Module,
        vqgan: nn.Module,
        *,
        seed: int,
        null_text: Tensor | None = None,
        use_text: bool = True,
        caption_drop: float = 0.05,
        code_drop: float = 0.05,
        code_noise: float = 0.3,
        weight: str = "p2",
        weight_cap: float | None = None,
        time_scale: float = TIME_SCALE,
        previewer: nn.Module | None = None,
        code_weight: float = 0.0,
    ) -> None:
        trained = {"decoder": decoder, "compressor": compressor}
        super().__init__(trained | ({"previewer": previewer} if previewer else {}), {"vqgan": vqgan})
        assert (code_weight > 0) <= (previewer is not None), "the code's own loss is the previewer's"
        self.code_weight = code_weight
        assert null_text is not None or not use_text or caption_drop == 0, "a dropped caption needs null_text"
        self.register_buffer("null_text", null_text, persistent=False)
        self.seed, self.use_text, self.caption_drop = seed, use_text, caption_drop
        self.scale_factor: float = vqgan.config.scale_factor  # type: ignore[union-attr,assignment]
        check_weight(weight, weight_cap)
        self.weight, self.weight_cap, self.time_scale = weight, weight_cap, time_scale
        self.code_drop, self.code_noise = code_drop, code_noise
        self.train(self.training)

    def train(self, mode: bool = True) -> DecoderObjective:
        super().train(mode)
        self.frozen.eval()  # batch norm: training on a batch's statistics would give other latents
        return self

    def forward(self, batch: Batch) -> Loss:
        t = draw_time(keyed_uniform(self.seed, "noise_level", batch.index), self.time_scale)
        if self.null_text is not None and self.use_text:
            dropped = keyed_uniform(self.seed, "caption_drop", batch.index) < self.caption_drop
            batch = replace_captions(batch, dropped, self.null_text)
        x = self.latents(batch.latents)
        noise = keyed_normal(self.seed, "noise", batch.index, x.shape[1:])
        with keyed_generator(self.seed, "dropout", batch.index):
            code = self.code(batch.latents)
            loss = self.error(batch, x, self.damage(code, batch.index), t, noise)
            if self.code_weight:
                loss = loss + self.code_weight * preview_error(self.trained["previewer"], code, batch.latents)
        return Loss(loss, noise_level=log_sigma_of(alpha_bar(t)))

    def loss_at(self, batch: Batch, log_sigma: Tensor) -> Tensor:
        """The loss (B,) at given noise levels (B,): whole codes, captions kept, no dropout.

        The compressor uses its running statistics, and the noise is the same in every run.
        """
        with in_eval_mode(self.trained):
            x = self.latents(batch.latents)
            noise = held_out_noise(batch, x.shape[1:])
            return self.error(batch, x, self.code(batch.latents), time_of(log_sigma), noise)

    @torch.no_grad()
    def latents(self, images: Tensor) -> Tensor:
        """Stage A's latents of images in [-1, 1], as Stage B sees them: (B, 4, H/4, W/4) float32."""
        vqgan: Any = self.frozen["vqgan"]
        with full_precision(images.device):
            latents: Tensor = vqgan.encode(to_unit(images)).latents
        return latents / self.scale_factor

    def code(self, images: Tensor) -> Tensor:
        """The compressor's code of images in [-1, 1], float32."""
        return cast(Compressor, self.trained["compressor"]).compress(to_unit(images)).float()

    def damage(self, code: Tensor, index: Tensor) -> Tensor:
        """Codes (B, C, h, w) of which some are set to 0 and some of the others noised."""
        t = CODE_NOISE_TIME * keyed_uniform(self.seed, "code_noise_level", index)
        noise = keyed_normal(self.seed, "code_noise", index, code.shape[1:])
        noised = keyed_uniform(self.seed, "code_noise_share", index) < self.code_noise
        dropped = keyed_uniform(self.seed, "code_drop", index) < self.code_drop
        code = torch.where(_rows(noised), diffuse(code, noise, alpha_bar(t)), code)
        return code.masked_fill(_rows(dropped), 0.0)

    def error(self, batch: Batch, x: Tensor, code: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Weighted squared error of each image (B,) for latents x at times t (B,) and given noise."""
        abar = alpha_bar(t)
        output = self.trained["decoder"](
            diffuse(x, noise, abar),
            t,
            effnet=code,
            clip=of_any_length(batch.text) if self.use_text else None,
            text_mask=of_any_length(batch.text_mask) if self.use_text else None,
        )
        return weighted_error(output, noise, abar, self.weight, self.weight_cap)


class PreviewObjective(Objective):
    """A small picture from a code: squared error of `previewer(z)` to the images at the previewer's size.

    A turn of its own beside Stage B's. `compressor` belongs to that turn and is only read: no gradient
    reaches it, it uses its running statistics, and it is no part of this module (nor moved with it). The
    previewer learns from codes as the compressor gives them, not from Stage C's scaled latents.
    """

    def __init__(self, previewer: nn.Module, compressor: nn.Module, *, seed: int = 0) -> None:
        super().__init__({"previewer": previewer})
        self.seed = seed
        self._compressor = (compressor,)  # in a tuple, which nn.Module does not look into

    def forward(self, batch: Batch) -> Loss:
        with keyed_generator(self.seed, "preview_dropout", batch.index):
            code = self.code(to_unit(batch.latents))
            return Loss(preview_error(self.trained["previewer"], code, batch.latents))

    @torch.no_grad()
    def code(self, images: Tensor) -> Tensor:
        """The compressor's code of images in [0, 1]."""
        (compressor,) = self._compressor
        with in_eval_mode(compressor):
            return cast(Compressor, compressor).compress(images)


def preview_error(previewer: nn.Module, code: Tensor, images: Tensor) -> Tensor:
    """Mean squared error (B,) of the previews of codes to images in [-1, 1] at the previews' size."""
    preview = previewer(code).float()
    return (preview - smaller(to_unit(images), preview)).square().flatten(1).mean(dim=1)


def smaller(images: Tensor, like: Tensor) -> Tensor:
    """Images at the height and width of `like`, smoothed first so that nothing aliases."""
    return F.interpolate(images, like.shape[-2:], mode="bilinear", antialias=True)


def _rows(chosen: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1)."""
    return chosen[:, None, None, None]
