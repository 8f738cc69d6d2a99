"""Heun's second-order sampler of EDM (arXiv 2206.00364, algorithm 1 without churn), as a diffusers scheduler.

    sigma_i = (sigma_max^(1/rho) + i / (N - 1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho,   sigma_N = 0
    d = (x - D(x; sigma_i)) / sigma_i                 x' = x + (sigma_{i+1} - sigma_i) d       (predict)
    d' = (x' - D(x'; sigma_{i+1})) / sigma_{i+1}      x  = x + (sigma_{i+1} - sigma_i) (d + d') / 2  (correct)

N steps cost 2 N - 1 evaluations: the last one, to sigma = 0, is not corrected.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from torch import Tensor


@dataclass
class EDMHeunSchedulerOutput(BaseOutput):
    """`prev_sample`: the sample for the next evaluation; `pred_original_sample`: the denoised one, D."""

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


def karras_sigmas(num_steps: int, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    """The N noise levels of EDM equation 5, decreasing, float64; N >= 1."""
    ramp = torch.linspace(0, 1, num_steps, dtype=torch.float64)
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return (high + ramp * (low - high)) ** rho


class EDMHeunScheduler(SchedulerMixin, ConfigMixin):
    """EDM's Heun sampler with its preconditioning; the network's output and its c_noise go in and out raw.

    `timesteps` are c_noise = ln(sigma) / 4, one an evaluation. Steps are computed in float64.
    """

    order = 2
    _compatibles: list[str] = ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"]

    @register_to_config
    def __init__(
        self,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.9,
        rho: float = 7.0,
        num_train_timesteps: int = 1000,
    ) -> None:
        self.set_timesteps(30)

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the starting noise."""
        return float(self.config.sigma_max)

    @property
    def step_index(self) -> int:
        """Which evaluation comes next, from 0."""
        return self._step_index

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Prepare N = `num_inference_steps` >= 1 Heun steps: 2 N - 1 evaluations."""
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps {num_inference_steps}: must be at least 1.")
        config = self.config
        levels = karras_sigmas(num_inference_steps, config.sigma_min, config.sigma_max, config.rho)
        self.num_inference_steps = num_inference_steps
        self.sigmas = torch.cat([levels, levels.new_zeros(1)])
        evaluated = torch.cat([levels[:1], levels[1:].repeat_interleave(2)])
        self.timesteps = (evaluated.log() / 4).float().to(device)
        self._step_index = 0
        self._start: Tensor | None = None
        self._slope: Tensor | None = None

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float | None = None) -> Tensor:
        """c_in x for the coming evaluation."""
        sigma = float(self._evaluated_sigma())
        return sample / (sigma**2 + self.config.sigma_data**2) ** 0.5

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        return_dict: bool = True,
    ) -> EDMHeunSchedulerOutput | tuple[Tensor, Tensor]:
        """Take the network's raw output at `sample` and give the sample of the next evaluation."""
        number = self._step_index // 2
        here, there = float(self.sigmas[number]), float(self.sigmas[number + 1])
        wide = torch.float32 if sample.device.type == "mps" else torch.float64  # mps has no float64
        x = sample.to(wide)
        denoised = self._denoised(model_output.to(wide), x)
        slope = (x - denoised) / float(self._evaluated_sigma())
        if self._start is None or self._slope is None:
            result = x + (there - here) * slope
            self._start, self._slope = (x, slope) if there > 0 else (None, None)
        else:
            result = self._start + (there - here) * (self._slope + slope) / 2
            self._start = self._slope = None
        self._step_index += 1
        result, denoised = result.to(sample.dtype), denoised.to(sample.dtype)
        return EDMHeunSchedulerOutput(result, denoised) if return_dict else (result, denoised)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_0 + sigma eps with sigma = exp(4 c_noise)."""
        sigma = (4 * timesteps.to(original_samples)).exp().view(-1, *[1] * (original_samples.ndim - 1))
        return original_samples + sigma * noise

    def _evaluated_sigma(self) -> Tensor:
        return self.sigmas[(self._step_index + 1) // 2]

    def _denoised(self, output: Tensor, x: Tensor) -> Tensor:
        sigma, sigma_data = float(self._evaluated_sigma()), self.config.sigma_data
        variance = sigma**2 + sigma_data**2
        return sigma_data**2 / variance * x + sigma * sigma_data / variance**0.5 * output

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)
