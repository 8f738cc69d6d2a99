"""Denoising on the discrete schedules of Stable Diffusion and SDXL (DDPM, arXiv 2006.11239).

    z_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps,   t in 0 .. T-1         SNR_t = abar_t / (1 - abar_t)
    sigma_t = sqrt((1 - abar_t) / abar_t) = SNR_t^(-1/2), infinite where abar_t = 0
    loss = w_t ||F(z_t, t, c) - target||^2, the mean over an image

    prediction      F is       target
    epsilon         the noise  eps
    v_prediction    velocity   sqrt(abar_t) eps - sqrt(1 - abar_t) x_0               (arXiv 2202.00512)
    sample          the image  x_0

    weight   w_t for epsilon         for v_prediction              for sample
    none     1                       1                             1
    min_snr  min(1, cap / SNR)       min(SNR, cap) / (SNR + 1)     min(SNR, cap)     (arXiv 2303.09556; cap 5)
    x0       min(1 / SNR, cap)       min(1 - abar_t, cap)          min(1, cap)       error of the implied x_0
    edm      w / SNR                 w / (SNR + 1)                 w                 (2206.00364, table 1)
                                      w = min(1 + sigma_data^2 SNR, cap), of the implied x_0

The network is a diffusers `UNet2DConditionModel`; what it takes beside z_t and t, `Conditioning` makes of a
batch. All arithmetic is float32.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from shoestring.errors import CheckpointError, RecipeError
from shoestring.interfaces import Batch, Loss, Objective
from shoestring.objectives.denoising import held_out_noise, in_eval_mode, of_any_length, replace_captions
from shoestring.runtime import full_precision, keyed_generator, keyed_normal, keyed_uniform

PREDICTIONS = ("epsilon", "v_prediction", "sample")
WEIGHTS = ("none", "min_snr", "x0", "edm")
MIN_SNR_CAP = 5.0
NULLS = ("zeros", "empty")
TIME_IDS = 6
"""Numbers that SDXL's kind is told of a picture: see `Conditioning`."""

_FAR = 20.0  # log sigma beyond any float32 schedule's, in place of infinity where distances are taken


class NoiseSchedule:
    """A schedule's abar (T,) float32 and what the network predicts; maths on images (B, C, H, W), t (B,).

    `t` is int64, on any device. Raises `CheckpointError` for an unknown prediction, and for `epsilon` where
    abar reaches 0: the noise there says nothing of the image.
    """

    def __init__(self, alphas_cumprod: Tensor, prediction: str = "epsilon") -> None:
        if prediction not in PREDICTIONS:
            raise CheckpointError(
                f"scheduler: prediction_type {prediction!r} is unknown. Use {', '.join(PREDICTIONS)}."
            )
        if prediction == "epsilon" and alphas_cumprod[-1] == 0:
            raise CheckpointError(
                "scheduler: prediction_type 'epsilon' cannot go with rescale_betas_zero_snr: at the last "
                "step the noise says nothing of the image. Use v_prediction or sample."
            )
        self.prediction = prediction
        self.alphas_cumprod = alphas_cumprod.float()
        self._copies: dict[torch.device, Tensor] = {}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], prediction: str | None = None) -> NoiseSchedule:
        """The schedule of a diffusers scheduler's config, whatever its class (Euler, DDIM, DPM++, ...).

        `prediction` None takes the config's. Raises `CheckpointError` for a schedule of betas that diffusers'
        `DDPMScheduler` does not know.
        """
        known = inspect.signature(DDPMScheduler.__init__).parameters
        options = {name: value for name, value in config.items() if name in known}
        try:
            with torch.device("cpu"):  # also where networks are being made on `meta`
                alphas_cumprod = DDPMScheduler(**options).alphas_cumprod
        except NotImplementedError as error:
            raise CheckpointError(
                f"scheduler: beta_schedule {config.get('beta_schedule')!r} is unknown. Use linear, "
                "scaled_linear, squaredcos_cap_v2, laplace or sigmoid."
            ) from error
        return cls(alphas_cumprod, prediction or config.get("prediction_type", "epsilon"))

    @property
    def num_timesteps(self) -> int:
        """T."""
        return len(self.alphas_cumprod)

    def draw(self, uniform: Tensor) -> Tensor:
        """t = floor(U T), each as likely, of U (B,) in [0, 1)."""
        return (uniform * self.num_timesteps).long()

    def trailing(self, steps: int) -> Tensor:
        """The times (steps,) that `steps` evaluations see: 999, 749, 499, 249 for 4 of 1000; on the CPU.

        (Trailing spacing, arXiv 2305.08891, table 2; diffusers' `timestep_spacing="trailing"`.)
        """
        total = self.num_timesteps
        if not 1 <= steps <= total:
            raise RecipeError(f"teacher_steps {steps}: the schedule has {total} steps. Use 1 to {total}.")
        times = [round(total - k * total / steps) - 1 for k in range(steps)]
        return torch.tensor(times, device="cpu")

    def abar(self, t: Tensor) -> Tensor:
        """abar_t (B,), on the device of t."""
        if t.device not in self._copies:
            self._copies[t.device] = self.alphas_cumprod.to(t.device)
        return self._copies[t.device][t]

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """z_t."""
        signal, spread = self._scales(t)
        return signal * x0 + spread * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should put out."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "sample":
            return x0
        signal, spread = self._scales(t)
        return signal * noise - spread * x0

    def x0_of(self, output: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """The image that an output at z_t implies."""
        signal, spread = self._scales(t)
        if self.prediction == "epsilon":
            return (z - spread * output) / signal
        return signal * z - spread * output if self.prediction == "v_prediction" else output

    def noise_of(self, output: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """The noise that an output at z_t implies."""
        signal, spread = self._scales(t)
        if self.prediction == "sample":
            return (z - signal * output) / spread
        return signal * output + spread * z if self.prediction == "v_prediction" else output

    def snr(self, t: Tensor) -> Tensor:
        """SNR_t (B,)."""
        abar = self.abar(t)
        return abar / (1 - abar)

    def sigma(self, t: Tensor) -> Tensor:
        """sigma_t (B,), infinite where abar_t = 0."""
        return self.snr(t).rsqrt()

    def log_sigma(self, t: Tensor) -> Tensor:
        """log sigma_t (B,), infinite where abar_t = 0."""
        return self.sigma(t).log()

    def nearest(self, log_sigma: Tensor) -> Tensor:
        """t (B,) of the level nearest to each log sigma (B,); the last one for levels beyond it."""
        levels = self.log_sigma(torch.arange(self.num_timesteps, device=log_sigma.device))
        distance = log_sigma.clamp(-_FAR, _FAR)[:, None] - levels.clamp(-_FAR, _FAR)
        return distance.abs().argmin(dim=1)

    def weight(
        self, t: Tensor, kind: str = "none", cap: float | None = None, sigma_data: float = 1.0
    ) -> Tensor:
        """w_t (B,), as in the table above; `cap` None is 5 for `min_snr` and none for the others."""
        snr = self.snr(t)
        if kind == "none":
            return torch.ones_like(snr)
        if kind == "min_snr":
            cap = MIN_SNR_CAP if cap is None else cap
            if self.prediction == "epsilon":
                return (cap / snr).clamp(max=1.0)
            capped = snr.clamp(max=cap)
            return capped / (snr + 1) if self.prediction == "v_prediction" else capped
        most = math.inf if cap is None else cap
        of_x0 = {
            "epsilon": 1 / snr,
            "v_prediction": 1 - self.abar(t),
            "sample": torch.ones_like(snr),
        }[self.prediction]
        if kind == "edm":
            return of_x0 * (1 + sigma_data**2 * snr).clamp(max=most)
        return of_x0.clamp(max=most)

    def _scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(abar_t) and sqrt(1 - abar_t), each (B, 1, 1, 1)."""
        abar = self.abar(t)[:, None, None, None]
        return abar.sqrt(), (1 - abar).sqrt()


def check_weight(kind: str, cap: float | None) -> None:
    """Raise `RecipeError` for a weight there is not, or a cap that nothing reads."""
    if kind not in WEIGHTS:
        raise RecipeError(f"objective.weight {kind!r}: unknown. Use {', '.join(WEIGHTS)}.")
    if cap is not None and kind == "none":
        raise RecipeError(f"objective.weight_cap {cap:g}: has no effect with weight none. Leave it out.")


class Conditioning(nn.Module):
    """What a U-Net takes beside z and t, of a batch: text and, for SDXL's kind, pooled text and time ids.

    config        the U-Net's; `addition_embed_type` must be None (SD 1, 2) or "text_time" (SDXL)
    null          what a dropped caption becomes: "zeros", as SDXL's pipelines do without a negative prompt,
                  or "empty", the encoded empty string: `null_text` (L0, C) and, where captions have a pooled
                  state, `null_pooled` (P,)
    caption_drop  the share of captions that are dropped in training, keyed by (seed, position in the run)

    Pooled text is `batch.extra["pooled"]` (B, P) or, where the text encoder gives none, `pool_tokens`; it
    is dropped with the text. Time ids are `batch.extra["size_crop"]` (B, 6): original height and width, crop
    top and left, target height and width. Without a mask every token counts, zero or not.
    Raises `RecipeError` for a U-Net that wants more than that, and for text of another width than it takes.
    """

    null_text: Tensor | None
    null_pooled: Tensor | None

    def __init__(
        self,
        config: Mapping[str, Any],
        *,
        null: str = "zeros",
        null_text: Tensor | None = None,
        null_pooled: Tensor | None = None,
        caption_drop: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if null not in NULLS:
            raise RecipeError(f"objective.null_caption {null!r}: unknown. Use {' or '.join(NULLS)}.")
        assert (null == "empty") == (null_text is not None), "null_text is the encoded empty caption"
        added = config.get("addition_embed_type")
        if added not in (None, "text_time") or config.get("class_embed_type") is not None:
            raise RecipeError(
                f"the U-Net wants more than text (addition_embed_type {added!r}, class_embed_type "
                f"{config.get('class_embed_type')!r}). Use one of Stable Diffusion's or SDXL's kind."
            )
        self.seed, self.caption_drop, self.null = seed, caption_drop, null
        self.text_time = added == "text_time"
        self.text_width = _text_width(config)
        self.pooled_width = None
        if self.text_time:
            ids = TIME_IDS * config["addition_time_embed_dim"]
            self.pooled_width = config["projection_class_embeddings_input_dim"] - ids
        self.register_buffer("null_text", null_text, persistent=False)
        self.register_buffer("null_pooled", null_pooled, persistent=False)

    def forward(self, batch: Batch, train: bool = True) -> dict[str, Any]:
        """Keyword arguments for `UNet2DConditionModel.forward`; captions are dropped in training alone."""
        if not train or self.caption_drop == 0:
            return self._given(batch, batch.extra.get("pooled"))
        return self._without(batch, keyed_uniform(self.seed, "caption_drop", batch.index) < self.caption_drop)

    def unconditional(self, batch: Batch) -> dict[str, Any]:
        """The same with every caption dropped: guidance's other half."""
        return self._without(batch, torch.ones_like(batch.index, dtype=torch.bool))

    def _without(self, batch: Batch, dropped: Tensor) -> dict[str, Any]:
        """With the captions dropped where `dropped` (B,) is True."""
        text = self.null_text
        if text is None:  # one zero token where there is a mask, which keeps no caption empty
            text = batch.text.new_zeros(
                batch.text.shape[1] if batch.text_mask is None else 1, self.text_width
            )
        self._check("text", batch.text, self.text_width)
        pooled = batch.extra.get("pooled")
        if pooled is not None:
            assert self.null == "zeros" or self.null_pooled is not None, "the empty caption is pooled too"
            null = pooled.new_zeros(pooled.shape[1:]) if self.null_pooled is None else self.null_pooled
            pooled = torch.where(dropped[:, None], null.to(pooled), pooled)
        return self._given(replace_captions(batch, dropped, text), pooled)

    def _given(self, batch: Batch, pooled: Tensor | None) -> dict[str, Any]:
        text, mask = batch.text, batch.text_mask
        self._check("text", text, self.text_width)
        given: dict[str, Any] = {"encoder_hidden_states": of_any_length(text)}
        if mask is not None:
            given["encoder_attention_mask"] = of_any_length(mask)
        if self.text_time:
            pooled = pool_tokens(text, mask) if pooled is None else pooled
            self._check("pooled text", pooled, self.pooled_width)
            given["added_cond_kwargs"] = {
                "text_embeds": pooled,
                "time_ids": batch.extra["size_crop"].float(),
            }
        return given

    def _check(self, what: str, tensor: Tensor, width: int | None) -> None:
        if tensor.shape[-1] != width:
            raise RecipeError(
                f"the store's {what} is {tensor.shape[-1]} wide and the U-Net takes {width}. "
                "Encode the store with the text encoders that the U-Net goes with."
            )


def pool_tokens(text: Tensor, mask: Tensor | None) -> Tensor:
    """The pooled text (B, C) of encoders that give none, from (B, L, C): the mean of the real tokens, brought
    to a root mean square of 1 (a mean of L tokens shrinks with L). Zeros stay zeros.
    """
    real = torch.ones_like(text[:, :, :1]) if mask is None else mask[:, :, None].to(text)
    mean = (text * real).sum(dim=1) / real.sum(dim=1).clamp(min=1)
    return nn.functional.rms_norm(mean, mean.shape[-1:], eps=1e-12)


def predict(unet: nn.Module, z: Tensor, t: Tensor, given: Mapping[str, Any]) -> Tensor:
    """The output F(z; t, c) of a U-Net: (B, C, H, W), t (B,) and `Conditioning`'s -> (B, C, H, W) float32."""
    output: Tensor = unet(z, t, **given, return_dict=False)[0]
    return output.float()


def mean_square(error: Tensor) -> Tensor:
    """The mean square of each image: (B, ...) -> (B,) float32, `autocast` or not."""
    with full_precision(error.device):
        return error.float().square().flatten(1).mean(dim=1)


class NoiseObjective(Objective):
    """Trains a U-Net by itself: a teacher from scratch, or any fine-tune.

    Noise, times and dropped captions are keyed by (seed, position in the run).
    """

    def __init__(
        self,
        unet: nn.Module,
        schedule: NoiseSchedule,
        conditioning: Conditioning,
        *,
        seed: int,
        weight: str = "none",
        weight_cap: float | None = None,
        sigma_data: float = 1.0,
    ) -> None:
        super().__init__({"unet": unet})
        check_weight(weight, weight_cap)
        self.schedule, self.conditioning = schedule, conditioning
        self.seed, self.weight, self.weight_cap, self.sigma_data = seed, weight, weight_cap, sigma_data
        self.drops_out = drops_out(unet)

    def forward(self, batch: Batch) -> Loss:
        t = self.schedule.draw(keyed_uniform(self.seed, "noise_level", batch.index))
        noise = keyed_normal(self.seed, "noise", batch.index, batch.latents.shape[1:])
        with keyed_generator(self.seed, "dropout", batch.index) if self.drops_out else nullcontext():
            loss = self.error(batch.latents, t, noise, self.conditioning(batch))
        return Loss(loss, noise_level=self.schedule.log_sigma(t))

    def loss_at(self, batch: Batch, log_sigma: Tensor) -> Tensor:
        """The loss (B,) at the schedule's times nearest to given noise levels (B,).

        Captions kept, no dropout, the same noise in every run.
        """
        t = self.schedule.nearest(log_sigma)
        with in_eval_mode(self.trained):
            return self.error(batch.latents, t, held_out_noise(batch), self.conditioning(batch, train=False))

    def error(self, x0: Tensor, t: Tensor, noise: Tensor, given: Mapping[str, Any]) -> Tensor:
        """Weighted squared error of each image (B,) at times t (B,), for given noise (B, C, H, W)."""
        output = predict(self.trained["unet"], self.schedule.add_noise(x0, noise, t), t, given)
        weight = self.schedule.weight(t, self.weight, self.weight_cap, self.sigma_data)
        return weight * mean_square(output - self.schedule.target(x0, noise, t))


def drops_out(network: nn.Module) -> bool:
    """Whether a network draws random numbers in training; only then is torch's generator to be keyed."""
    return any(isinstance(module, nn.Dropout) and module.p > 0 for module in network.modules())


def _text_width(config: Mapping[str, Any]) -> int:
    """Width of the text that a U-Net takes."""
    width = config["cross_attention_dim"]
    if config.get("encoder_hid_dim_type") not in (None, "text_proj"):
        raise RecipeError(
            f"the U-Net wants more than text (encoder_hid_dim_type {config['encoder_hid_dim_type']!r}). "
            "Use one of Stable Diffusion's or SDXL's kind."
        )
    if config.get("encoder_hid_dim") is not None:
        width = config["encoder_hid_dim"]
    return int(width[0] if isinstance(width, (list, tuple)) else width)
