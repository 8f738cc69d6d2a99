"""Flow matching with a velocity or a clean-image network (arXiv 2209.03003, 2210.02747; x_0: 2511.13720).

    t = sigmoid(u), u ~ Normal(shift, scale)      z = (1 - t) x_0 + t eps      log sigma = logit t = u
    velocity:  F = v,     loss = ||F - (eps - x_0)||^2
    x0:        F = x_0,   loss = min(1 / t^2, weight_cap) ||F - x_0||^2,  the same velocity error, capped
The network's timestep is 1000 t, as in diffusers' flow-matching schedulers. A positive `shift` draws more
noise. All means are over kept patches.
"""

from __future__ import annotations

from torch import Tensor, nn

from shoestring.interfaces import Batch, Loss, Objective
from shoestring.objectives.denoising import draw, held_out_noise, mean_over_patches, of_any_length

TIMESTEPS = 1000


def velocity_from_x0(x0: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """v = (z - x_0) / t, for t > 0."""
    return (z - x0) / t


class FlowObjective(Objective):
    """Flow-matching loss; `prediction` says what the network puts out: "velocity" or "x0"."""

    def __init__(
        self,
        transformer: nn.Module,
        *,
        seed: int,
        prediction: str = "velocity",
        weight_cap: float | None = None,
        shift: float = 0.0,
        scale: float = 1.0,
        mask: float = 0.0,
        caption_drop: float = 0.1,
    ) -> None:
        super().__init__({"transformer": transformer})
        self.patch_size: int = transformer.config.patch_size  # type: ignore[union-attr,assignment]
        self.prediction = prediction
        self.seed, self.mask, self.caption_drop = seed, mask, caption_drop
        self.set_numbers(weight_cap=weight_cap, shift=shift, scale=scale)

    def set_numbers(self, *, weight_cap: float | None, shift: float, scale: float) -> None:
        """Change the constants, as a phase does."""
        self.weight_cap = float("inf") if weight_cap is None else weight_cap
        self.shift, self.scale = shift, scale

    def forward(self, batch: Batch) -> Loss:
        draws = draw(
            batch,
            self.seed,
            mean=self.shift,
            deviation=self.scale,
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
        t = log_sigma.sigmoid()[:, None, None, None]
        output = self.predict(batch.latents.lerp(noise, t), t.flatten(), batch.text, batch.text_mask, keep)
        if self.prediction == "x0":
            error = (t**-2).clamp(max=self.weight_cap) * (output - batch.latents) ** 2
        else:
            error = (output - (noise - batch.latents)) ** 2
        return mean_over_patches(error, keep, self.patch_size)

    def predict(
        self,
        z: Tensor,
        t: Tensor,
        text: Tensor,
        text_mask: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """The network's output F(z; 1000 t): (B, C, H, W) and t (B,) -> (B, C, H, W) float32."""
        output: Tensor = self.trained["transformer"](
            hidden_states=z,
            timestep=t * TIMESTEPS,
            encoder_hidden_states=of_any_length(text),
            encoder_attention_mask=of_any_length(text_mask),
            keep=keep,
            return_dict=False,
        )[0]
        return output.float()
