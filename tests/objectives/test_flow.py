"""Flow matching against closed forms."""

from __future__ import annotations

import pytest
import torch

from shoestring.objectives.flow import FlowObjective, velocity_from_x0
from tests.objectives.test_denoising import make_batch
from tests.objectives.test_edm import Constant


@pytest.mark.parametrize("cap", [None, 20.0])
def test_x0_loss_is_the_velocity_loss_capped(cap: float | None) -> None:
    """min(1/t^2, cap) |F - x_0|^2: without the cap, the squared error of the implied velocity."""
    objective = FlowObjective(Constant(0.2), seed=0, prediction="x0", weight_cap=cap)
    batch = make_batch(4)
    noise = torch.randn_like(batch.latents)
    level = torch.tensor([-4.0, -1.0, 0.0, 2.0])
    t = level.sigmoid()[:, None, None, None]
    z = (1 - t) * batch.latents + t * noise
    implied = velocity_from_x0(torch.full_like(z, 0.2), z, t)
    expected = ((implied - (noise - batch.latents)) ** 2).mean(dim=(1, 2, 3))
    if cap is not None:
        expected = expected * (cap * t.flatten() ** 2).clamp(max=1.0)
    assert torch.allclose(objective.error(batch, level, noise, None), expected, rtol=1e-3)


def test_velocity_loss_is_zero_for_the_true_velocity() -> None:
    batch = make_batch(2)
    noise = torch.randn_like(batch.latents)
    objective = FlowObjective(Constant(), seed=0)
    objective.predict = lambda *_: noise - batch.latents  # type: ignore[method-assign]
    assert objective.error(batch, torch.zeros(2), noise, None).abs().max() == 0


def test_the_network_sees_the_mix_and_a_thousand_times_t() -> None:
    network = Constant()
    objective = FlowObjective(network, seed=0)
    batch = make_batch(2)
    noise = torch.randn_like(batch.latents)
    objective.error(batch, torch.zeros(2), noise, None)
    mix = (batch.latents + noise) / 2
    assert torch.allclose(network.asked["hidden_states"], mix, atol=1e-6)  # type: ignore[arg-type]
    assert network.asked["timestep"].tolist() == [500.0, 500.0]  # type: ignore[attr-defined]


def test_a_positive_shift_draws_more_noise() -> None:
    def mean_level(shift: float) -> float:
        levels = FlowObjective(Constant(), seed=0, shift=shift)(make_batch(500)).noise_level
        assert levels is not None
        return levels.mean().item()

    assert mean_level(1.0) == pytest.approx(mean_level(0.0) + 1.0, abs=1e-5)
