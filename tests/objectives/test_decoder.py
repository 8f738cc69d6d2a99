"""Stage B's loss and its previews, on small real networks and against closed forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shoestring.interfaces import Batch
from shoestring.models.latent_previewer import LatentPreviewer
from shoestring.models.semantic_compressor import SemanticCompressor
from shoestring.models.wuerstchen_decoder import WuerstchenDiffNeXt
from shoestring.models.wuerstchen_vqgan import PaellaVQModel
from shoestring.objectives.cosine import alpha_bar, draw_time, log_sigma_of, loss_weight
from shoestring.objectives.decoder import DecoderObjective, PreviewObjective, smaller
from shoestring.runtime import keyed_uniform

SIDE = 64
NULL = torch.full((2, 5), 7.0)
STAGES = [
    {"block": "fused", "expand": 1, "kernel": 3, "stride": 1, "in": 8, "out": 8, "layers": 1},
    {"block": "mbconv", "expand": 2, "kernel": 3, "stride": 2, "in": 8, "out": 16, "layers": 2},
]


class Echo(nn.Module):
    """eps_hat = scale x_t + mean of the code, after dropout; remembers what it was asked."""

    def __init__(self, scale: float = 1.0, dropout: float = 0.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, r: Tensor, **asked: Any) -> Tensor:
        self.asked = {"x": x, "r": r, **asked}
        return self.dropout(self.scale * x) + 0 * asked["effnet"].mean()


def make_vqgan() -> PaellaVQModel:
    torch.manual_seed(0)
    vqgan = PaellaVQModel(embed_dim=8, bottleneck_blocks=1, num_vq_embeddings=16)
    vqgan.norm.running_mean.fill_(0.1)  # type: ignore[union-attr,operator]
    return vqgan


def make_compressor(**settings: Any) -> SemanticCompressor:
    torch.manual_seed(1)
    return SemanticCompressor(c_latent=6, variant=STAGES, **settings)


def make_decoder(**settings: Any) -> WuerstchenDiffNeXt:
    torch.manual_seed(2)
    return WuerstchenDiffNeXt(
        c_r=8,
        c_cond=8,
        c_hidden=[8, 16],
        nhead=[-1, 2],
        blocks=[1, 1],
        level_config=["CT", "CTA"],
        inject_effnet=[False, True],
        effnet_embd=6,
        clip_embd=5,
        **settings,
    )


def make_objective(decoder: nn.Module | None = None, **settings: Any) -> DecoderObjective:
    decoder = decoder or Echo()
    return DecoderObjective(
        decoder, make_compressor(), make_vqgan(), **{"seed": 0, "null_text": NULL, **settings}
    )


def make_batch(count: int, first: int = 0) -> Batch:
    images = torch.rand(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(first)) * 2 - 1
    mask = torch.tensor([[True, True, False]]).expand(count, -1)
    return Batch(torch.arange(first, first + count), images, torch.ones(count, 3, 5), mask)


def test_it_denoises_scaled_latents_of_stage_a_at_the_drawn_times() -> None:
    objective = make_objective(code_drop=0.0, code_noise=0.0)
    batch = make_batch(4)
    vqgan: Any = make_vqgan().eval()
    with torch.no_grad():
        x = vqgan.encode((batch.latents + 1) / 2).latents / vqgan.config.scale_factor
    assert torch.allclose(objective.latents(batch.latents), x, atol=1e-6)
    assert x.shape == (4, 4, SIDE // 4, SIDE // 4)
    loss = objective(batch)
    t = draw_time(keyed_uniform(0, "noise_level", batch.index))
    asked: Any = objective.trained["decoder"].asked
    assert torch.equal(asked["r"], t)
    abar = alpha_bar(t).view(-1, 1, 1, 1)
    noise = (asked["x"] - abar.sqrt() * x) / (1 - abar).sqrt()
    expected = loss_weight(alpha_bar(t)) * (asked["x"] - noise).square().mean(dim=(1, 2, 3))
    assert torch.allclose(loss.per_sample, expected, rtol=1e-3)
    assert loss.noise_level is not None
    assert torch.allclose(loss.noise_level, log_sigma_of(alpha_bar(t)))


def test_an_untrained_decoder_loses_what_the_closed_form_says() -> None:
    """A fresh network's eps_hat is 2 x_t: E|eps - 2 x_t|^2 = 4 abar E x^2 + (1 - 2 sqrt(1 - abar))^2."""
    objective = make_objective(make_decoder(), weight="none")
    batch = make_batch(32)
    power = objective.latents(batch.latents).square().mean()
    for t in (0.25, 0.5, 0.75):
        abar = alpha_bar(torch.tensor(t))
        with torch.no_grad():
            loss = objective.loss_at(batch, log_sigma_of(abar).expand(32)).mean()
        assert loss.item() == pytest.approx(
            (4 * abar * power + (1 - 2 * (1 - abar).sqrt()) ** 2).item(), rel=0.03
        )


def test_stage_a_stays_as_it_is_while_decoder_and_compressor_learn() -> None:
    decoder = Reads()
    objective = make_objective(decoder).train()
    vqgan, compressor = objective.frozen["vqgan"], objective.trained["compressor"]
    assert not any(part.training for part in vqgan.modules())
    before = {name: tensor.clone() for name, tensor in vqgan.state_dict().items()}
    running = compressor.mapper[1].running_mean.clone()  # type: ignore[union-attr,index]
    objective(make_batch(4)).per_sample.mean().backward()
    assert all(torch.equal(before[name], tensor) for name, tensor in vqgan.state_dict().items())
    assert all(weight.grad is None for weight in vqgan.parameters())
    assert all(weight.grad is not None for weight in compressor.parameters())
    assert not torch.equal(running, compressor.mapper[1].running_mean)  # type: ignore[union-attr,index]
    assert set(objective.trained) == {"decoder", "compressor"}


class Reads(nn.Module):
    """A small network that needs its code."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(4 + 6, 4, 1)

    def forward(self, x: Tensor, r: Tensor, effnet: Tensor, **_: Any) -> Tensor:
        return self.mix(torch.cat([x, F.interpolate(effnet, x.shape[-2:])], dim=1))


def test_decoder_and_compressor_learn_together_with_and_without_text() -> None:
    for text in (True, False):
        torch.manual_seed(0)
        objective = make_objective(make_decoder(), use_text=text, null_text=NULL if text else None)
        optimizer = torch.optim.Adam([w for w in objective.parameters() if w.requires_grad], 3e-3)
        batch, levels = make_batch(8), torch.zeros(8)
        with torch.no_grad():
            before = objective.loss_at(batch, levels).mean()
        for _ in range(20):
            optimizer.zero_grad()
            objective(batch).per_sample.mean().backward()
            optimizer.step()
        with torch.no_grad():
            assert objective.loss_at(batch, levels).mean() < 0.7 * before


def test_shares_of_the_codes_are_dropped_and_noised() -> None:
    objective = make_objective(code_drop=0.2, code_noise=0.5)
    index = torch.arange(4000)
    code = torch.full((4000, 6, 2, 2), 3.0)
    damaged = objective.damage(code, index)
    dropped = (damaged == 0).all(dim=(1, 2, 3))
    kept = (damaged == 3).all(dim=(1, 2, 3))
    assert dropped.float().mean().item() == pytest.approx(0.2, abs=0.02)
    assert kept.float().mean().item() == pytest.approx(0.8 * 0.5, abs=0.03)
    noised = damaged[~dropped & ~kept]
    # Times are uniform in [0, 0.5]: the signal that is left is between sqrt(abar(0.5)) and 1.
    signal = alpha_bar(0.5 * torch.rand(100_000, generator=torch.Generator().manual_seed(0))).sqrt().mean()
    assert noised.mean().item() == pytest.approx(3 * signal.item(), rel=0.02)
    assert torch.equal(objective.damage(code[1000:1500], index[1000:1500]), damaged[1000:1500])


def test_without_drop_and_noise_the_code_is_the_compressor_s() -> None:
    objective = make_objective(code_drop=0.0, code_noise=0.0)
    batch = make_batch(4)
    objective(batch)
    code = make_compressor().train().compress((batch.latents + 1) / 2)
    assert torch.allclose(objective.trained["decoder"].asked["effnet"], code, atol=1e-5)  # type: ignore[union-attr,index]
    assert code.shape == (4, 6, 12, 12)


def test_text_is_dropped_per_image_or_left_out_whole() -> None:
    objective = make_objective(caption_drop=0.5)
    objective(make_batch(8))
    asked: Any = objective.trained["decoder"].asked
    dropped = keyed_uniform(0, "caption_drop", torch.arange(8)) < 0.5
    assert 0 < dropped.sum() < 8
    assert torch.equal((asked["clip"] == 7).any(dim=2).any(dim=1), dropped)
    silent = make_objective(null_text=None, use_text=False)
    silent(make_batch(4))
    asked = silent.trained["decoder"].asked
    assert asked["clip"] is None
    assert asked["text_mask"] is None


def test_dropout_and_stochastic_depth_are_keyed_by_the_image() -> None:
    def run(seed_of_torch: int) -> Tensor:
        compressor = make_compressor(stochastic_depth=0.9)
        objective = DecoderObjective(Reads(), compressor, make_vqgan(), seed=0, null_text=NULL)
        with torch.no_grad():
            objective.trained["decoder"].mix.weight.fill_(0.3)  # type: ignore[union-attr,operator]
            objective.trained["decoder"].mix.bias.zero_()  # type: ignore[union-attr,operator]
        torch.manual_seed(seed_of_torch)
        before = torch.get_rng_state()
        loss = objective(make_batch(4)).per_sample
        assert torch.equal(before, torch.get_rng_state())
        return loss

    assert torch.equal(run(1), run(2))


def test_held_out_losses_are_of_whole_codes_and_running_statistics() -> None:
    objective = make_objective(Echo(dropout=0.5), code_drop=1.0, code_noise=1.0, caption_drop=1.0)
    batch, levels = make_batch(4), torch.zeros(4)
    compressor: Any = objective.trained["compressor"]
    running = compressor.mapper[1].running_mean.clone()
    together = objective.loss_at(batch, levels)
    asked: Any = objective.trained["decoder"].asked
    assert asked["effnet"].abs().min() > 0
    assert (asked["clip"] != 7).all()
    assert torch.equal(running, compressor.mapper[1].running_mean)
    alone = torch.cat([objective.loss_at(part, torch.zeros(2)) for part in batch.parts(2)])
    assert torch.allclose(together, alone, rtol=1e-4)
    assert compressor.training
    assert not objective.frozen["vqgan"].training


def test_the_previewer_learns_small_pictures_and_the_compressor_nothing() -> None:
    torch.manual_seed(0)
    compressor, previewer = make_compressor(), LatentPreviewer(c_in=6, c_hidden=16)
    objective = PreviewObjective(previewer, compressor, seed=0)
    assert {name.split(".")[0] for name, _ in objective.named_parameters()} == {"trained"}
    before = {name: tensor.clone() for name, tensor in compressor.state_dict().items()}
    batch = make_batch(4)
    optimizer = torch.optim.Adam(objective.parameters(), 1e-2)
    losses = []
    for _ in range(20):
        loss = objective(batch).per_sample.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert all(torch.equal(before[name], tensor) for name, tensor in compressor.state_dict().items())
    assert all(weight.grad is None for weight in compressor.parameters())
    assert compressor.training


def test_a_smaller_picture_keeps_means_and_does_not_alias() -> None:
    stripes = (torch.arange(64) % 2).float().expand(1, 3, 64, 64)
    small = smaller(stripes, torch.empty(1, 3, 16, 16))[..., 1:-1]
    assert torch.allclose(small, torch.full_like(small, 0.5), atol=0.02)
    plain = F.interpolate(stripes, (16, 16), mode="nearest")
    assert (plain - 0.5).abs().min() == 0.5, "every fourth column would be all 0 or all 1"


def test_with_a_code_weight_the_previewer_teaches_the_compressor_what_its_own_error_says() -> None:
    """The loss is Stage B's plus the weighted error of the preview, whose gradient reaches the compressor."""
    torch.manual_seed(3)
    previewer = LatentPreviewer(c_in=6, c_hidden=8)
    plain = make_objective(code_drop=0.0, code_noise=0.0)
    taught = make_objective(code_drop=0.0, code_noise=0.0, previewer=previewer, code_weight=2.5)
    batch = make_batch(4)
    own, both = plain(batch).per_sample, taught(batch).per_sample
    preview = previewer(taught.code(batch.latents))
    error = (preview - smaller((batch.latents + 1) / 2, preview)).square().mean(dim=(1, 2, 3))
    assert torch.allclose(both - own, 2.5 * error, rtol=1e-3)
    both.mean().backward()
    weights = [weight.grad for weight in previewer.parameters() if weight.ndim > 1]
    assert all(grad is not None and grad.any() for grad in weights)
    kernel: Any = next(taught.trained["compressor"].parameters())
    assert kernel.grad.any(), "Echo reads no code: what reaches the compressor comes from the previewer"
    assert set(taught.trained) == {"decoder", "compressor", "previewer"}
