"""Würstchen's schedule and Stage C's loss against diffusers and closed forms."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from diffusers import DDPMWuerstchenScheduler
from diffusers.pipelines.deprecated.wuerstchen.pipeline_wuerstchen_prior import DEFAULT_STAGE_C_TIMESTEPS
from torch import Tensor, nn

from shoestring.errors import RecipeError
from shoestring.interfaces import Batch
from shoestring.models.wuerstchen_prior import WuerstchenPrior
from shoestring.objectives.cosine import (
    PriorObjective,
    alpha_bar,
    default_timesteps,
    diffuse,
    draw_time,
    log_sigma_of,
    loss_weight,
    published_timesteps,
    time_of,
)
from shoestring.runtime import keyed_uniform
from tests.objectives.test_denoising import make_batch

NULL = torch.full((2, 5), 7.0)


class Echo(nn.Module):
    """eps_hat = scale x_t, after dropout; remembers what it was asked."""

    def __init__(self, scale: float = 1.0, dropout: float = 0.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, r: Tensor, c: Tensor, text_mask: Tensor | None = None) -> Tensor:
        self.asked = {"x": x, "r": r, "c": c, "text_mask": text_mask}
        return self.dropout(self.scale * x)


def make_prior(**settings: float) -> WuerstchenPrior:
    torch.manual_seed(0)
    return WuerstchenPrior(c_in=16, c=16, c_cond=5, c_r=8, depth=2, nhead=2, **settings)


def test_alpha_bar_has_the_published_values() -> None:
    t = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9, 1.0])
    expected = torch.tensor([0.97209, 0.84701, 0.49384, 0.14427, 0.02409, 0.0001])
    assert torch.allclose(alpha_bar(t), expected, atol=5e-6)
    assert alpha_bar(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([0.9999, 0.0001])


def test_alpha_bar_and_noising_equal_diffusers() -> None:
    scheduler = DDPMWuerstchenScheduler()
    t = torch.linspace(0, 1, 501)
    assert torch.allclose(alpha_bar(t), scheduler._alpha_cumprod(t, t.device), atol=3e-7)
    x, noise = torch.randn(2, 501, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(diffuse(x, noise, alpha_bar(t)), scheduler.add_noise(x, noise, t), atol=2e-5)


@pytest.mark.parametrize("steps", [default_timesteps(), published_timesteps()])
def test_true_noise_leads_diffusers_steps_back_to_the_image(steps: list[float]) -> None:
    """With eps_hat = eps of each x_t, every step of the scheduler ends at x_0, for either list of times."""
    scheduler = DDPMWuerstchenScheduler()
    scheduler.set_timesteps(timesteps=torch.tensor(steps))
    generator = torch.Generator().manual_seed(0)
    clean, x = torch.randn(2, 1, 3, 4, 4, generator=generator)
    for t in scheduler.timesteps[:-1].view(-1, 1):
        abar = alpha_bar(t)
        noise = (x - abar.sqrt() * clean) / (1 - abar).sqrt()
        x = scheduler.step(noise, t, x, generator=generator).prev_sample
    assert torch.allclose(x, clean, atol=0.03)  # abar ends at 0.9999: 1 % of noise is not removed


def test_time_is_the_inverse_of_the_noise_level() -> None:
    t = torch.linspace(0.003, 0.993, 100)
    assert torch.allclose(time_of(log_sigma_of(alpha_bar(t))), t, atol=2e-5)
    sigma = log_sigma_of(alpha_bar(t)).exp()
    assert torch.allclose(sigma**2, (1 - alpha_bar(t)) / alpha_bar(t), rtol=1e-4)
    ends = time_of(torch.tensor([-20.0, 20.0]))
    assert ends.tolist() == pytest.approx([0.0022, 0.9936], abs=1e-4)
    assert alpha_bar(ends).tolist() == pytest.approx([0.9999, 0.0001], rel=1e-2)


def test_the_published_draw_puts_7_5_percent_of_images_at_the_noisiest_time() -> None:
    uniform = keyed_uniform(0, "t", torch.arange(20_000))
    t = draw_time(uniform)
    assert (t == 1).float().mean().item() == pytest.approx(1 - 0.999 / 1.08, abs=0.005)
    assert t.min() >= 0.001
    assert (draw_time(uniform, 1.0) == 1).float().mean() < 0.003, "Stable Cascade's draw has no such lump"


def test_weights_are_those_of_the_table() -> None:
    abar = alpha_bar(torch.tensor([0.05, 0.5, 0.9]))
    snr = abar / (1 - abar)
    assert torch.allclose(loss_weight(abar, "p2"), 1 / (1 + snr))
    assert torch.allclose(loss_weight(abar, "paper"), 1 / (1 + 2 * snr))
    assert torch.equal(loss_weight(abar, "none"), torch.ones(3))
    assert torch.allclose(loss_weight(abar, "x0"), 1 / snr)
    assert loss_weight(abar, "x0", 2.0).max() == 2
    assert loss_weight(alpha_bar(torch.tensor(0.5)), "p2").item() == pytest.approx(0.506, abs=5e-4)
    assert loss_weight(alpha_bar(torch.tensor(0.5)), "paper").item() == pytest.approx(0.339, abs=5e-4)


def test_the_x0_weight_is_the_error_of_the_implied_image() -> None:
    """x_0_hat = (x_t - sqrt(1 - abar) eps_hat) / sqrt(abar)."""
    batch = make_batch(3)
    objective = PriorObjective(Echo(0.4), seed=0, null_text=NULL, weight="x0")
    noise = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(9))
    t = torch.tensor([0.1, 0.5, 0.8])
    abar = alpha_bar(t).view(-1, 1, 1, 1)
    x = diffuse(batch.latents, noise, alpha_bar(t))
    implied = (x - (1 - abar).sqrt() * 0.4 * x) / abar.sqrt()
    expected = (implied - batch.latents).square().mean(dim=(1, 2, 3))
    assert torch.allclose(objective.error(batch, t, noise), expected, rtol=1e-4)


UNWEIGHTED = {1.0: (1.821, 1.218, 0.577, 0.150), 1 / 42: (0.830, 0.371, 0.084, 0.006)}
P2 = {1.0: (0.0146, 0.1863, 0.2921, 0.1283), 1 / 42: (0.0066, 0.0568, 0.0423, 0.0049)}


@pytest.mark.parametrize("deviation", [1.0, 1 / 42])
@pytest.mark.parametrize(("weight", "table"), [("none", UNWEIGHTED), ("p2", P2)])
def test_an_untrained_prior_loses_what_the_closed_form_says(
    weight: str, table: dict[float, tuple[float, ...]], deviation: float
) -> None:
    """eps_hat = x_t: E|eps - x_t|^2 = abar std^2 + (1 - sqrt(1 - abar))^2 for a fresh network."""
    times = torch.tensor([0.05, 0.25, 0.5, 0.75])
    abar = alpha_bar(times)
    closed = loss_weight(abar, weight) * (abar * deviation**2 + (1 - (1 - abar).sqrt()) ** 2)
    assert torch.allclose(closed, torch.tensor(table[deviation]), atol=6e-4)
    latents = deviation * torch.randn(4, 16, 64, 64, generator=torch.Generator().manual_seed(3))
    batch = Batch(torch.arange(4), latents, torch.ones(4, 2, 5), None)
    objective = PriorObjective(make_prior(), seed=0, null_text=NULL, weight=weight)
    with torch.no_grad():
        assert torch.allclose(objective.loss_at(batch, log_sigma_of(abar)), closed, rtol=0.02)


def test_a_step_trains_on_the_drawn_times_and_tells_the_noise_level() -> None:
    network = Echo()
    loss = PriorObjective(network, seed=4, null_text=NULL, caption_drop=0.0)(make_batch(64))
    assert loss.noise_level is not None
    assert torch.allclose(loss.noise_level, log_sigma_of(alpha_bar(network.asked["r"])))
    assert torch.equal(network.asked["r"], draw_time(keyed_uniform(4, "noise_level", torch.arange(64))))
    assert loss.per_sample.dtype == torch.float32
    assert loss.per_sample.shape == (64,)


def test_losses_do_not_depend_on_the_grouping_into_batches() -> None:
    for drop in ("sample", "batch"):
        objective = PriorObjective(Echo(0.3), seed=0, null_text=NULL, caption_drop=0.5, drop=drop)
        objective.set_batches(4)
        whole = make_batch(8)
        parts = torch.cat([objective(part).per_sample for part in whole.parts(3)])
        assert torch.allclose(objective(whole).per_sample, parts, rtol=1e-5)


def dropped_by(objective: PriorObjective, batch: Batch) -> Tensor:
    objective(batch)
    network: Echo = objective.trained["prior"]  # type: ignore[assignment]
    return (network.asked["c"] == 7).any(dim=2).any(dim=1)


def test_each_image_has_its_own_caption_coin_or_a_batch_has_one() -> None:
    batch = make_batch(4000)
    single = PriorObjective(Echo(), seed=0, null_text=NULL, caption_drop=0.3)
    assert dropped_by(single, batch).float().mean().item() == pytest.approx(0.3, abs=0.03)
    shared = PriorObjective(Echo(), seed=0, null_text=NULL, caption_drop=0.3, drop="batch")
    shared.set_batches(10, start=-3)  # batches are 0..6, 7..16, 17..26, ...
    dropped = dropped_by(shared, batch)
    assert dropped.float().mean().item() == pytest.approx(0.3, abs=0.07)
    whole = dropped[7:3997].view(-1, 10)
    assert torch.equal(whole.all(dim=1), whole.any(dim=1))
    # Two processes' halves of one batch agree, each knowing its own images alone.
    first, second = (dropped_by(shared, part) for part in replace(batch, extra={}).parts(2))
    assert torch.equal(torch.cat([first, second]), dropped)


def test_a_dropped_caption_is_the_null_caption_whatever_its_length() -> None:
    network = Echo()
    null = torch.arange(20.0).view(4, 5) + 1  # longer than the batch's three tokens
    objective = PriorObjective(network, seed=0, null_text=null, caption_drop=1.0)
    objective(make_batch(2))
    assert torch.equal(network.asked["c"], null.expand(2, 4, 5))
    assert network.asked["text_mask"].all()
    objective.caption_drop = 0.0
    objective(make_batch(2))
    assert network.asked["text_mask"].tolist() == [[True, True, False, False]] * 2
    assert torch.equal(network.asked["c"], torch.tensor([1.0, 1, 1, 0])[None, :, None].expand(2, 4, 5))
    short = PriorObjective(network, seed=0, null_text=null[:1], caption_drop=1.0)
    short(make_batch(2))
    assert network.asked["text_mask"].tolist() == [[True, False, False]] * 2
    assert torch.equal(network.asked["c"][:, 0], null[:1].expand(2, 5))
    assert network.asked["c"][:, 1:].abs().max() == 0


def test_without_a_mask_the_null_caption_takes_every_place() -> None:
    network = Echo()
    null = torch.randn(3, 5)
    PriorObjective(network, seed=0, null_text=null, caption_drop=1.0)(make_batch(2, masked=False))
    assert torch.equal(network.asked["c"], null.expand(2, 3, 5))
    assert network.asked["text_mask"] is None


def test_dropout_is_keyed_by_the_image_and_leaves_the_global_generator_alone() -> None:
    objective = PriorObjective(Echo(dropout=0.5), seed=0, null_text=NULL)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = objective(make_batch(4)).per_sample
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(objective(make_batch(4)).per_sample, first)
    other = PriorObjective(Echo(dropout=0.0), seed=0, null_text=NULL)(make_batch(4)).per_sample
    assert not torch.allclose(other, first), "dropout was on"


def test_dropout_is_the_same_where_activations_are_computed_again() -> None:
    """Checkpointing runs blocks again in the backward pass, after the keyed generator was left."""
    gradients = []
    for again in (False, True):
        prior = make_prior(dropout=0.5)
        torch.nn.init.normal_(prior.out[1].weight)  # type: ignore[arg-type]
        if again:
            prior.enable_gradient_checkpointing()
        batch = replace(make_batch(4), latents=torch.ones(4, 16, 4, 4))
        PriorObjective(prior, seed=0, null_text=NULL)(batch).per_sample.mean().backward()
        gradients.append(prior.projection.weight.grad)
        torch.rand(7)  # the global generator goes on; the second pass must not care
    assert gradients[0] is not None
    assert gradients[0].abs().max() > 0
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-4, atol=1e-7)  # type: ignore[arg-type]


def test_held_out_losses_know_neither_dropout_nor_seed_and_leave_the_mode() -> None:
    batch, levels = make_batch(4), torch.zeros(4)
    noisy = PriorObjective(Echo(dropout=0.5), seed=0, null_text=NULL, caption_drop=1.0)
    plain = PriorObjective(Echo(), seed=5, null_text=NULL, caption_drop=0.0)
    assert torch.equal(noisy.loss_at(batch, levels), plain.loss_at(batch, levels))
    assert noisy.trained["prior"].training
    assert (noisy.trained["prior"].asked["c"] != 7).all(), "captions are kept"  # type: ignore[union-attr]


def test_the_weight_is_a_number_of_the_objective() -> None:
    p2 = PriorObjective(Echo(), seed=0, null_text=NULL)(make_batch(8)).per_sample
    plain = PriorObjective(Echo(), seed=0, null_text=NULL, weight="none")(make_batch(8))
    assert plain.noise_level is not None
    variance = plain.noise_level.exp() ** 2
    assert torch.allclose(p2, plain.per_sample * variance / (1 + variance), rtol=1e-3)
    with pytest.raises(RecipeError, match=r"weight 'snr': unknown. Use p2, paper, none, x0"):
        PriorObjective(Echo(), seed=0, null_text=NULL, weight="snr")
    with pytest.raises(RecipeError, match="weight_cap 5: has no effect with weight p2"):
        PriorObjective(Echo(), seed=0, null_text=NULL, weight_cap=5.0)


def test_the_default_times_are_those_of_diffusers() -> None:
    assert default_timesteps() == pytest.approx(DEFAULT_STAGE_C_TIMESTEPS, abs=1e-12)
    assert len(default_timesteps()) - 1 == 29


def test_the_published_times_take_20_steps_to_two_thirds_and_10_to_zero() -> None:
    steps = [a - b for a, b in zip(published_timesteps(), published_timesteps()[1:], strict=False)]
    assert steps == pytest.approx([1 / 60] * 20 + [1 / 15] * 10)
    assert published_timesteps()[20] == 2 / 3
    assert (published_timesteps()[0], published_timesteps()[-1]) == (1.0, 0.0)
    assert math.isclose(default_timesteps()[0] - default_timesteps()[1], 1 / 57)
