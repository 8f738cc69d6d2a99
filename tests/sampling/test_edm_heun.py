"""The Heun sampler against a closed form, the authors' samples and diffusers' EDM scheduler."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from diffusers import EDMEulerScheduler
from safetensors import safe_open
from torch import Tensor

from shoestring.models.microdit import MicroDiT
from shoestring.sampling.edm_heun import EDMHeunScheduler, karras_sigmas


def raw_output(denoised: Tensor, x: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
    """The network output F for which EDM's preconditioning gives `denoised`."""
    variance = sigma**2 + sigma_data**2
    return (denoised - sigma_data**2 / variance * x) / (sigma * sigma_data / variance.sqrt())


def gaussian_error(steps: int, deviation: float = 0.5) -> float:
    """Relative error for data ~ Normal(0, s^2), whose flow is x(0) = x(sigma) s / sqrt(s^2 + sigma^2)."""
    scheduler = EDMHeunScheduler()
    scheduler.set_timesteps(steps)
    start = torch.linspace(-2, 2, 9, dtype=torch.float64) * scheduler.init_noise_sigma
    x = start
    for timestep in scheduler.timesteps:
        sigma = (4 * timestep.double()).exp()
        denoised = deviation**2 / (deviation**2 + sigma**2) * x
        x = scheduler.step(raw_output(denoised, x, sigma, 0.9), timestep, x).prev_sample  # type: ignore[union-attr]
    exact = start * deviation / (deviation**2 + scheduler.init_noise_sigma**2) ** 0.5
    return float((x - exact).norm() / exact.norm())


def test_the_error_on_gaussian_data_is_second_order() -> None:
    errors = [gaussian_error(steps) for steps in (40, 80, 160)]
    assert errors[-1] < 1e-3
    assert all(coarse / fine == pytest.approx(4, rel=0.25) for coarse, fine in pairwise(errors))


@torch.no_grad()
@pytest.mark.parametrize("name", ["a", "b"])
def test_guided_samples_equal_the_authors(name: str, fixtures: Path) -> None:
    """6 Heun steps from sigma 80 with guidance 3 agree to 1e-5."""
    with safe_open(fixtures / f"microdit_{name}.safetensors", "pt") as file:
        t = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
        config = json.loads(file.metadata()["config"])
    weights = {key.removeprefix("weights."): v for key, v in t.items() if key.startswith("weights.")}
    network = MicroDiT.from_published(weights, config).eval()
    text = t["y"].squeeze(1)
    scheduler = EDMHeunScheduler()
    scheduler.set_timesteps(6)
    x = t["sample_noise"] * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        inputs = scheduler.scale_model_input(x, timestep)
        with_text = network(inputs, timestep.expand(3), text)[0]
        null = network(inputs, timestep.expand(3), torch.zeros_like(text))[0]
        x = scheduler.step(null.lerp(with_text, 3.0), timestep, x).prev_sample  # type: ignore[union-attr]
    expected = t["sample_heun6_cfg3"]
    assert (x - expected).norm() / expected.norm() < 1e-5


def test_noise_levels_equal_diffusers() -> None:
    theirs = EDMEulerScheduler(sigma_data=0.9)
    theirs.set_timesteps(12)
    assert torch.allclose(karras_sigmas(12, 0.002, 80.0, 7.0).float(), theirs.sigmas[:-1], rtol=1e-5)


def test_a_single_step_is_eulers() -> None:
    """With one step the end is sigma 0, which is not corrected: x becomes D(x)."""
    scheduler = EDMHeunScheduler()
    scheduler.set_timesteps(1)
    assert len(scheduler.timesteps) == 1
    x = torch.randn(2, 3)
    output = torch.randn(2, 3)
    step = scheduler.step(output, scheduler.timesteps[0], x)
    assert torch.allclose(step.prev_sample, step.pred_original_sample, atol=1e-5)  # type: ignore[union-attr]


def test_evaluations_are_two_a_step_but_for_the_last() -> None:
    scheduler = EDMHeunScheduler()
    for steps in (1, 2, 30):
        scheduler.set_timesteps(steps)
        assert len(scheduler.timesteps) == 2 * steps - 1
    with pytest.raises(ValueError, match="must be at least 1"):
        scheduler.set_timesteps(0)


def test_noise_is_added_at_the_level_of_the_timestep() -> None:
    scheduler = EDMHeunScheduler()
    x, noise = torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
    levels = torch.tensor([0.5, 2.0])
    noised = scheduler.add_noise(x, noise, levels.log() / 4)
    assert torch.allclose(noised[:, 0, 0, 0], levels)


def test_settings_survive_saving(tmp_path: Path) -> None:
    EDMHeunScheduler(sigma_data=0.5, rho=5.0).save_pretrained(tmp_path)
    assert EDMHeunScheduler.from_pretrained(tmp_path).config.sigma_data == 0.5
