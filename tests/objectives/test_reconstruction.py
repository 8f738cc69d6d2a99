"""Stage A's two turns: their losses against closed forms, and that neither touches the other's network."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shoestring.errors import RecipeError
from shoestring.interfaces import Batch
from shoestring.models.patch_discriminator import PatchDiscriminator
from shoestring.models.perceptual import PyramidDistance
from shoestring.models.wuerstchen_vqgan import PaellaVQModel
from shoestring.objectives.reconstruction import (
    DiscriminatorObjective,
    ReconstructionObjective,
    centre_crop,
    random_crop,
    reconstruct,
)
from shoestring.processes import ALONE
from shoestring.runtime import keyed_uniform
from tests.objectives import turns_of_many

SIDE = 32


def make_vqgan() -> PaellaVQModel:
    torch.manual_seed(0)
    return PaellaVQModel(embed_dim=8, bottleneck_blocks=1, num_vq_embeddings=16)


def make_discriminator() -> PatchDiscriminator:
    torch.manual_seed(1)
    return PatchDiscriminator(c_hidden=16, depth=3)


def make_batch(count: int, first: int = 0) -> Batch:
    images = torch.rand(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(first)) * 2 - 1
    return Batch(torch.arange(first, first + count), images, torch.zeros(count, 1, 2), None)


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(module: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def test_the_loss_is_the_sum_of_its_terms() -> None:
    vqgan, discriminator, perceptual = make_vqgan(), make_discriminator(), PyramidDistance()
    objective = ReconstructionObjective(
        vqgan, seed=0, perceptual=perceptual, discriminator=discriminator, mse=2.0, quantise_skip=0.0
    )
    batch = make_batch(4)
    images = (batch.latents + 1) / 2
    twin = copy.deepcopy(vqgan)  # in training mode each pass moves the running statistics
    quantised, codebook = twin.quantize(twin.encode(images).latents)
    made = twin.decode(quantised).sample
    plain = codebook + 2.0 * (made - images).square().mean(dim=(1, 2, 3)) + 0.1 * perceptual(made, images)
    assert torch.allclose(objective(batch).per_sample, plain, rtol=1e-5)
    objective.adversarial = True
    logits = copy.deepcopy(discriminator).eval()(made)
    adversarial = -torch.log(torch.sigmoid(logits)).mean(dim=(1, 2, 3))
    assert torch.allclose(objective(batch).per_sample, plain + 0.01 * adversarial, rtol=1e-5)


def test_the_critic_s_loss_is_the_cross_entropy_of_real_and_made() -> None:
    vqgan, discriminator = make_vqgan(), make_discriminator()
    objective = DiscriminatorObjective(discriminator, vqgan, seed=0, quantise_skip=0.0)
    batch = make_batch(4)
    images = (batch.latents + 1) / 2
    with torch.no_grad():
        twin = copy.deepcopy(vqgan).eval()
        made = twin.decode(twin.quantize(twin.encode(images).latents)[0]).sample
        logits = copy.deepcopy(discriminator)(torch.cat([images, made])).flatten(1)  # (8, patches)
    truth = torch.cat([torch.ones(4), torch.zeros(4)])[:, None].expand_as(logits)
    entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(dim=1)
    loss = objective(batch)
    assert torch.allclose(loss.per_sample, (entropy[:4] + entropy[4:]) / 2, rtol=1e-4)
    assert loss.noise_level is None


def test_gradients_pass_through_the_critic_and_stay_out_of_it() -> None:
    vqgan, discriminator = make_vqgan(), make_discriminator()
    terms = {"mse": 0.0, "perceptual_weight": 0.0, "adversarial_weight": 1.0, "quantise_skip": 1.0}
    objective = ReconstructionObjective(vqgan, seed=0, discriminator=discriminator, **terms)
    objective.adversarial = True
    before = state(discriminator)
    objective(make_batch(4)).per_sample.mean().backward()
    assert all(weight.grad is None for weight in discriminator.parameters())
    assert vqgan.out_block[0].weight.grad is not None  # the adversarial term alone reaches it
    assert vqgan.out_block[0].weight.grad.abs().max() > 0
    assert same(discriminator, before), "no step of the power iteration"
    assert discriminator.training
    assert all(weight.requires_grad for weight in discriminator.parameters())
    assert not any(name.startswith("discriminator") for name in objective.trained)
    assert set(dict(objective.named_parameters())) == {
        f"trained.vqgan.{n}" for n, _ in vqgan.named_parameters()
    }


def test_the_critic_s_turn_leaves_the_autoencoder_as_it_is() -> None:
    vqgan, discriminator = make_vqgan(), make_discriminator()
    objective = DiscriminatorObjective(discriminator, vqgan, seed=0)
    before, critic = state(vqgan), state(discriminator)
    objective(make_batch(4)).per_sample.mean().backward()
    assert same(vqgan, before), "running statistics too"
    assert vqgan.training
    assert all(weight.grad is None for weight in vqgan.parameters())
    assert all(weight.grad is not None for weight in discriminator.parameters())
    assert not same(discriminator, critic), "the power iteration took its step"


def train(
    steps: range, vqgan: PaellaVQModel, discriminator: PatchDiscriminator
) -> Iterator[tuple[float, float]]:
    """Both turns of each step, as the loop takes them, with plain gradient descent."""
    makes = ReconstructionObjective(vqgan, seed=0, discriminator=discriminator, crop=24)
    judges = DiscriminatorObjective(discriminator, vqgan, seed=0, crop=24)
    makes.adversarial = True
    for step in steps:
        losses = []
        for objective in (makes, judges):
            objective.zero_grad()
            loss = objective(make_batch(2, first=2 * step)).per_sample.mean()
            loss.backward()
            with torch.no_grad():
                for weight in objective.trained.parameters():
                    if weight.grad is not None:
                        weight -= 0.05 * weight.grad
            losses.append(loss.item())
        yield losses[0], losses[1]


def test_two_turns_resume_exactly_from_their_state_dicts() -> None:
    """Buffers (running statistics, power iteration) are state and saved; nothing else carries over."""
    unbroken = list(train(range(6), make_vqgan(), make_discriminator()))
    vqgan, discriminator = make_vqgan(), make_discriminator()
    first = list(train(range(3), vqgan, discriminator))
    saved = state(vqgan), state(discriminator)
    torch.manual_seed(99)
    vqgan, discriminator = make_vqgan(), make_discriminator()
    vqgan.load_state_dict(saved[0])
    discriminator.load_state_dict(saved[1])
    assert first + list(train(range(3, 6), vqgan, discriminator)) == unbroken


@pytest.mark.slow
def test_two_processes_take_the_same_turns_as_one(launch: Callable[..., list[Any]], tmp_path: Path) -> None:
    """Under DDP each network's gradients are summed in its own turn alone."""
    done = launch(2, Path(turns_of_many.__file__), tmp_path / "found.pt", cwd=tmp_path, timeout=60)
    assert [each.returncode for each in done] == [0, 0], done[0].stderr
    found, alone = torch.load(tmp_path / "found.pt"), turns_of_many.losses(ALONE)
    assert torch.allclose(torch.tensor(found), torch.tensor(alone), rtol=1e-4)
    assert not torch.allclose(torch.tensor(alone[0]), torch.tensor(alone[-2]), rtol=1e-3), "both learn"


def test_quantisation_is_skipped_for_the_stated_share_of_images() -> None:
    vqgan = make_vqgan().eval()
    batch = make_batch(200)
    images = (batch.latents + 1) / 2
    with torch.no_grad():
        made, _ = reconstruct(vqgan, images, batch.index, seed=3, quantise_skip=0.3)
        latents = vqgan.encode(images).latents
        smooth, coded = vqgan.decode(latents).sample, vqgan.decode(vqgan.quantize(latents)[0]).sample
    skipped = keyed_uniform(3, "quantise_skip", batch.index) < 0.3
    assert skipped.float().mean().item() == pytest.approx(0.3, abs=0.1)
    assert torch.allclose(made, torch.where(skipped[:, None, None, None], smooth, coded), atol=1e-6)


def test_crops_are_keyed_squares_of_every_place() -> None:
    batch = make_batch(300)
    images = (batch.latents + 1) / 2
    crops = random_crop(images, 24, batch.index, seed=0)
    assert crops.shape == (300, 3, 24, 24)
    windows = images.unfold(2, 24, 1).unfold(3, 24, 1)  # (B, 3, 9, 9, 24, 24)
    found = (windows == crops[:, :, None, None]).all(dim=(1, 4, 5))  # (B, 9, 9)
    assert (found.sum(dim=(1, 2)) == 1).all()
    assert found.any(dim=0).any(dim=0).all(), "every column"
    assert found.any(dim=0).any(dim=1).all(), "every row"
    assert torch.equal(random_crop(images[50:60], 24, batch.index[50:60], seed=0), crops[50:60])
    assert torch.equal(random_crop(images, SIDE, batch.index, seed=0), images)
    assert torch.equal(centre_crop(images, 24), images[:, :, 4:28, 4:28])
    with pytest.raises(RecipeError, match=r"objective.crop 40: images are 32 x 32 px. Use 32 at most"):
        random_crop(images, 40, batch.index, seed=0)


def test_both_turns_see_the_same_crops() -> None:
    """The critic's loss with `crop` is its loss on the generator's crops, given whole."""
    batch = make_batch(4)
    crops = random_crop(batch.latents, 24, batch.index, seed=0)
    cropped, whole = (
        DiscriminatorObjective(make_discriminator(), make_vqgan(), seed=0, crop=crop) for crop in (24, None)
    )
    expected = whole(replace(batch, latents=crops)).per_sample
    assert torch.allclose(cropped(batch).per_sample, expected, atol=1e-6)
    makes, plain = (ReconstructionObjective(make_vqgan(), seed=0, crop=crop) for crop in (24, None))
    assert torch.allclose(makes(batch).per_sample, plain(replace(batch, latents=crops)).per_sample, atol=1e-6)


def test_the_reconstruction_error_is_of_what_is_shown() -> None:
    """In evaluation mode, clamped, of the middle, without codes unless asked: and PSNR follows from it."""
    vqgan = make_vqgan()
    objective = ReconstructionObjective(vqgan, seed=0, crop=16)
    batch = make_batch(3)
    images = ((batch.latents + 1) / 2)[:, :, 8:24, 8:24]
    error = objective.reconstruction_error(batch)
    assert vqgan.training
    twin = copy.deepcopy(vqgan).eval()
    with torch.no_grad():
        shown = twin.decode(twin.encode(images).latents).sample.clamp(0, 1)
        coded = twin.decode(twin.encode(images).latents, force_not_quantize=False).sample.clamp(0, 1)
    assert torch.allclose(error, (shown - images).square().mean(dim=(1, 2, 3)))
    quantised = objective.reconstruction_error(batch, quantise=True)
    assert torch.allclose(quantised, (coded - images).square().mean(dim=(1, 2, 3)))
    psnr = -10 * torch.log10(error)
    assert math.isfinite(psnr.mean().item())


def test_it_learns_to_give_pictures_back_and_the_critic_to_tell() -> None:
    torch.manual_seed(0)
    vqgan: Any = make_vqgan()
    objective = ReconstructionObjective(vqgan, seed=0, perceptual=PyramidDistance())
    smooth = F.interpolate(torch.rand(8, 3, 4, 4), SIDE, mode="bilinear") * 2 - 1
    batch = Batch(torch.arange(8), smooth, torch.zeros(8, 1, 2), None)
    before = objective.reconstruction_error(batch).mean()
    optimizer = torch.optim.Adam(objective.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        objective(batch).per_sample.mean().backward()
        optimizer.step()
    assert objective.reconstruction_error(batch).mean() < before / 5
    critic = DiscriminatorObjective(make_discriminator(), make_vqgan(), seed=0)
    optimizer = torch.optim.Adam(critic.parameters(), 3e-2)
    for _ in range(25):
        optimizer.zero_grad()
        loss = critic(batch).per_sample.mean()
        loss.backward()
        optimizer.step()
    assert loss < 0.8 * math.log(2), "what it loses by guessing is log 2"
