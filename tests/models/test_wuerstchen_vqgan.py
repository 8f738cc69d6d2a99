"""Würstchen's Stage A against diffusers' class, closed forms and itself."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel as Theirs
from torch import Tensor

from shoestring.models.synced_norm import SyncedBatchNorm2d
from shoestring.models.wuerstchen_vqgan import MixingBlock, PaellaVQModel
from shoestring.training.optimizers import BOUNDARY, MATRIX, VECTOR, parameter_roles
from tests.models.wuerstchen_oracles import (
    arguments,
    gradients,
    largest_difference,
    randomize,
    relative,
    shapes,
)

CONFIGS: list[dict[str, Any]] = [
    {"levels": 2, "bottleneck_blocks": 2, "embed_dim": 32, "num_vq_embeddings": 16},
    {"levels": 1, "bottleneck_blocks": 1, "embed_dim": 12, "latent_channels": 3, "num_vq_embeddings": 5},
    {"levels": 3, "bottleneck_blocks": 1, "embed_dim": 24, "in_channels": 1, "out_channels": 2}
    | {"up_down_scale_factor": 4, "num_vq_embeddings": 300},
]
SMALL = CONFIGS[0]


def vqgan(config: dict[str, Any] = SMALL, seed: int = 0) -> PaellaVQModel:
    network: Any = randomize(PaellaVQModel(**config), seed)
    return network.eval()


def pictures(config: dict[str, Any] = SMALL, batch: int = 3) -> Tensor:
    side = config.get("up_down_scale_factor", 2) * 2 ** (config["levels"] - 1)
    generator = torch.Generator().manual_seed(1)
    return torch.rand(batch, config.get("in_channels", 3), 5 * side, 3 * side, generator=generator)


def test_published_size_and_keys() -> None:
    """18,406,894 parameters in 122 tensors with the names and shapes of diffusers' class."""
    with torch.device("meta"):
        ours, theirs = PaellaVQModel(), Theirs()
    assert sum(p.numel() for p in ours.parameters()) == 18_406_894
    assert len(ours.state_dict()) == 122
    assert shapes(ours) == shapes(theirs)


def test_constructor_is_that_of_diffusers() -> None:
    assert arguments(PaellaVQModel) == arguments(Theirs)


@pytest.mark.parametrize("config", CONFIGS)
def test_codes_pictures_and_gradients_equal_those_of_diffusers(config: dict[str, Any]) -> None:
    """With weights loaded strictly there and back again: encode, decode, decode of the nearest codes."""
    theirs, ours = Theirs(**config).eval(), PaellaVQModel(**config).eval()
    theirs.load_state_dict(vqgan(config).state_dict())
    ours.load_state_dict(theirs.state_dict())
    given = pictures(config)
    with torch.no_grad():
        z = theirs.encode(given).latents
        assert relative(ours.encode(given).latents, z) < 1e-5
        assert relative(ours.decode(z).sample, theirs.decode(z).sample) < 1e-5
        quantised = theirs.decode(z, force_not_quantize=False).sample
        assert relative(ours.decode(z, force_not_quantize=False).sample, quantised) < 1e-5
        assert relative(quantised, theirs.decode(z).sample) > 1e-2
    for module in (theirs, ours):
        module.train()
    found = gradients(ours, lambda: ours(given).sample)
    assert largest_difference(found, gradients(theirs, lambda: theirs(given).sample)) < 1e-5
    statistics = ours.norm.running_var
    assert statistics is not None
    assert torch.allclose(statistics, theirs.down_blocks[-1][1].running_var, rtol=1e-5)


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    network, given = vqgan(), pictures()
    network.save_pretrained(tmp_path)
    again = PaellaVQModel.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    assert torch.equal(again.eval()(given).sample, network(given).sample)


# --- codes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [1, 100, 2**24])
def test_codes_are_the_nearest_whatever_is_compared_at_once(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoestring.models.wuerstchen_vqgan.DISTANCES_AT_ONCE", at_once)
    network = vqgan()
    z = network.encode(pictures()).latents.detach()
    codes = network.vquantizer.embedding.weight.detach()
    distances = (z.permute(0, 2, 3, 1)[..., None, :] - codes).norm(dim=-1)  # (B, h, w, codes)
    nearest = codes[distances.argmin(dim=-1)].permute(0, 3, 1, 2)
    assert torch.allclose(network.quantize(z)[0], nearest, atol=1e-6)


@pytest.mark.parametrize("autocast", [False, True])
def test_codes_of_the_first_step_are_told_apart(autocast: bool) -> None:
    """A new codebook lies within 1/8192 of zero and z does not: float64 finds the same codes as we do."""
    torch.manual_seed(0)
    book = PaellaVQModel(bottleneck_blocks=1, embed_dim=8).vquantizer
    points, codes = torch.randn(500, 4), book.embedding.weight.detach()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = book.nearest(points)
    exact = torch.cdist(points.double(), codes.double(), compute_mode="donot_use_mm_for_euclid_dist")
    assert (found == exact.argmin(dim=1)).float().mean() > 0.99


def test_quantisation_loss_equals_that_of_diffusers_and_is_a_number_for_each_picture() -> None:
    network = vqgan()
    z = network.encode(pictures()).latents.detach().requires_grad_()
    quantised, loss = network.quantize(z)
    theirs = Theirs(**SMALL)
    theirs.load_state_dict(network.state_dict())
    other = z.detach().clone().requires_grad_()
    their_quantised, their_loss, _ = theirs.vquantizer(other)
    assert torch.allclose(quantised, their_quantised)
    assert loss.shape == (3,)
    assert torch.allclose(loss.mean(), their_loss)
    alone = torch.cat([network.quantize(picture[None])[1] for picture in z])
    assert torch.allclose(loss, alone)

    weights = torch.randn_like(z)
    (loss.mean() + (quantised * weights).sum()).backward()
    (their_loss + (their_quantised * weights).sum()).backward()
    assert z.grad is not None
    assert torch.allclose(z.grad, other.grad)
    ours, them = network.vquantizer.embedding.weight.grad, theirs.vquantizer.embedding.weight.grad
    assert ours is not None
    assert torch.allclose(ours, them, atol=1e-7)


def test_gradients_of_codes_pass_straight_through() -> None:
    network = vqgan()
    z = torch.randn(1, 4, 2, 3, requires_grad=True)
    weights = torch.randn_like(z)
    (network.quantize(z)[0] * weights).sum().backward()
    assert z.grad is not None
    assert torch.equal(z.grad, weights)


# --- the scale of z --------------------------------------------------------------------------------------


def test_latent_scale_is_the_deviation_of_z() -> None:
    """Measured on what the batch norm puts out in training, where each channel is normalised exactly."""
    network = vqgan().train()
    with torch.no_grad():
        z = network.encode(torch.rand(4, 3, 64, 64)).latents
    assert network.latent_scale() == pytest.approx(float(z.std(correction=0)), rel=1e-4)
    assert PaellaVQModel(**SMALL).latent_scale() == pytest.approx(1.0)


def test_batch_norm_is_the_one_shared_by_processes() -> None:
    assert isinstance(vqgan().norm, SyncedBatchNorm2d)


# --- initialisation --------------------------------------------------------------------------------------


def test_initial_weights_are_the_authors() -> None:
    """Blocks start as the identity with Xavier weights; codes lie within one over their number."""
    torch.manual_seed(0)
    network = PaellaVQModel(bottleneck_blocks=1, embed_dim=64)
    for block in network.modules():
        if not isinstance(block, MixingBlock):
            continue
        c = block.channelwise[0].in_features
        picture = torch.randn(2, c, 4, 5)
        assert torch.equal(block(picture), picture)
        for layer, fans in (
            (block.channelwise[0], 5 * c),
            (block.channelwise[2], 5 * c),
            (block.depthwise[1], 9 + 9 * c),
        ):
            assert float(layer.weight.detach().abs().max()) == pytest.approx(math.sqrt(6 / fans), rel=0.01)
            assert not layer.bias.any()
    codes = network.vquantizer.embedding.weight.detach()
    assert float(codes.abs().max()) == pytest.approx(1 / 8192, rel=1e-3)
    assert float(codes.std()) == pytest.approx(1 / 8192 / math.sqrt(3), rel=0.02)


def test_starting_again_leaves_nothing_of_before() -> None:
    network = vqgan()
    torch.manual_seed(3)
    network.reset_parameters()
    torch.manual_seed(3)
    fresh = PaellaVQModel(**SMALL)
    torch.manual_seed(3)
    fresh.reset_parameters()
    for (name, ours), theirs in zip(network.state_dict().items(), fresh.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


# --- elsewhere -------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_is_near_float32(autocast: bool) -> None:
    network = vqgan()
    z = network.encode(pictures()).latents
    exact = network.decode(z).sample
    if autocast:
        with torch.autocast("cpu", torch.bfloat16):
            assert relative(network.decode(z).sample.float(), exact) < 0.05
    else:
        rough = network.to(torch.bfloat16).decode(z.bfloat16()).sample
        assert rough.dtype == torch.bfloat16
        assert relative(rough.float(), exact) < 0.05


def test_roles_of_parameters() -> None:
    roles = parameter_roles(vqgan())
    for name, role in (
        ("in_block.1.weight", BOUNDARY),
        ("down_blocks.1.weight", BOUNDARY),
        ("up_blocks.3.weight", BOUNDARY),
        ("out_block.0.weight", BOUNDARY),
        ("down_blocks.0.channelwise.0.weight", MATRIX),
        ("vquantizer.embedding.weight", VECTOR),
        ("down_blocks.3.1.weight", VECTOR),
        ("up_blocks.1.gammas", VECTOR),
    ):
        assert roles[name] == role, name
