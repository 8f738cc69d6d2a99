"""The EDM loss against the authors' values and closed forms."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from shoestring.interfaces import Batch
from shoestring.models.microdit import MicroDiT
from shoestring.objectives.denoising import kept_patches
from shoestring.objectives.edm import EDMObjective, loss_weight, preconditioning
from tests.objectives.test_denoising import make_batch


class Constant(torch.nn.Module):
    """A network that always puts out the same value, and remembers what it was asked."""

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.config = type("Config", (), {"patch_size": 2})()
        self.value = torch.nn.Parameter(torch.tensor(value))

    def forward(self, hidden_states: torch.Tensor, **asked: object) -> tuple[torch.Tensor]:
        self.asked = {"hidden_states": hidden_states, **asked}
        return (self.value.expand_as(hidden_states),)


@pytest.mark.parametrize("name", ["a", "b"])
def test_denoiser_and_losses_equal_the_authors(name: str, fixtures: Path) -> None:
    with safe_open(fixtures / f"microdit_{name}.safetensors", "pt") as file:
        t = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
        config = json.loads(file.metadata()["config"])
    weights = {key.removeprefix("weights."): v for key, v in t.items() if key.startswith("weights.")}
    objective = EDMObjective(MicroDiT.from_published(weights, config), seed=0)
    batch = Batch(torch.arange(3), t["x"], t["y"].squeeze(1), None)
    sigma = t["sigma"][:, None, None, None]
    keep = kept_patches(t["mask_noise"], config["mask_ratio"])
    with torch.no_grad():
        denoised = objective.denoise(t["x"] + t["eps"] * sigma, sigma, batch.text)
        loss = objective.error(batch, t["sigma"].log(), t["eps"], None).mean()
        masked = objective.error(batch, t["sigma"].log(), t["eps"], keep).mean()
    assert (denoised - t["denoised"]).norm() / t["denoised"].norm() < 1e-5
    assert loss.item() == pytest.approx(t["edm_loss"].item(), rel=1e-5)
    assert masked.item() == pytest.approx(t["edm_loss_masked"].item(), rel=1e-5)


def test_preconditioning_keeps_unit_variance() -> None:
    """c_in gives the input unit variance, and weight * c_out^2 is 1, for data of deviation sigma_data."""
    sigma = torch.logspace(-2, 2, 9)
    c = preconditioning(sigma, 0.9)
    assert torch.allclose(c.c_in**2 * (0.81 + sigma**2), torch.ones(9))
    assert torch.allclose(loss_weight(sigma, 0.9) * c.c_out**2, torch.ones(9))
    assert torch.allclose((4 * c.c_noise).exp(), sigma)


def test_noise_levels_follow_the_stated_normal() -> None:
    objective = EDMObjective(Constant(), seed=1, p_mean=-0.6, p_std=1.2)
    levels = objective(make_batch(4000)).noise_level
    assert levels is not None
    assert levels.mean().item() == pytest.approx(-0.6, abs=0.08)
    assert levels.std().item() == pytest.approx(1.2, abs=0.06)


def test_a_zero_network_loses_what_the_skip_leaves() -> None:
    """With F = 0, D = c_skip (x_0 + sigma eps): the loss at a level has a closed form."""
    objective = EDMObjective(Constant(), seed=0, caption_drop=0.0)
    batch = make_batch(3)
    level = torch.tensor([-1.0, 0.0, 1.0])
    noise = torch.randn_like(batch.latents)
    sigma = level.exp()[:, None, None, None]
    c_skip = 0.81 / (sigma**2 + 0.81)
    weight = (sigma**2 + 0.81) / (sigma * 0.9) ** 2
    expected = (weight * ((c_skip - 1) * batch.latents + c_skip * sigma * noise) ** 2).mean(dim=(1, 2, 3))
    assert torch.allclose(objective.error(batch, level, noise, None), expected, rtol=1e-5)


def test_a_phase_changes_the_numbers() -> None:
    objective = EDMObjective(Constant(), seed=1)
    objective.set_numbers(sigma_data=0.5, p_mean=3.0, p_std=0.1)
    levels = objective(make_batch(8)).noise_level
    assert levels is not None
    assert levels.min() > 2.5
    assert objective.sigma_data == 0.5


def test_losses_do_not_depend_on_the_grouping_into_batches() -> None:
    objective = EDMObjective(Constant(0.3), seed=0, mask=0.5)
    whole = make_batch(8)
    parts = torch.cat([objective(part).per_sample for part in whole.parts(3)])
    assert torch.allclose(objective(whole).per_sample, parts, rtol=1e-5)
