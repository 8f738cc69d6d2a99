"""The critic against the authors' layer by layer, and what spectral norm does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shoestring.errors import RecipeError
from shoestring.models.patch_discriminator import PatchDiscriminator


def published_layers() -> list[str]:
    """The layers of the authors' `Discriminator()` (depth 6, width 512), by reading its constructor."""
    convolutions = [(3, 64), (64, 128), (128, 256), (256, 512), (512, 512), (512, 512)]
    names = []
    for number, (before, after) in enumerate(convolutions):
        names.append(f"Conv2d {before}->{after} (3, 3) (2, 2) (1, 1)")
        names += ["InstanceNorm2d"] if number else []
        names.append("LeakyReLU 0.2")
    return names


def test_the_layers_are_the_published_ones() -> None:
    with torch.device("meta"):
        network = PatchDiscriminator()
    names = []
    for layer in network.encoder:
        if isinstance(layer, nn.Conv2d):
            widths = f"{layer.in_channels}->{layer.out_channels}"
            names.append(f"Conv2d {widths} {layer.kernel_size} {layer.stride} {layer.padding}")
        elif isinstance(layer, nn.LeakyReLU):
            names.append(f"LeakyReLU {layer.negative_slope}")
        else:
            assert isinstance(layer, nn.InstanceNorm2d)
            assert not layer.affine
            names.append("InstanceNorm2d")
    assert names == published_layers()
    pairs = [(3, 64), (64, 128), (128, 256), (256, 512), (512, 512), (512, 512)]
    parameters = sum(9 * a * b + b for a, b in pairs) + 513
    assert sum(p.numel() for p in network.parameters()) == parameters


@pytest.mark.parametrize(
    ("depth", "side", "places"), [(2, 9, 3), (3, 32, 4), (4, 32, 2), (6, 96, 2), (7, 129, 2)]
)
def test_every_depth_puts_out_a_logit_a_patch(depth: int, side: int, places: int) -> None:
    network = PatchDiscriminator(c_hidden=32, depth=depth)
    logits = network(torch.rand(2, 3, side, side))
    assert logits.shape == (2, 1, places, places)


def test_pictures_that_leave_one_place_are_refused_with_the_depth_that_fits() -> None:
    network = PatchDiscriminator(c_hidden=32, depth=6)
    with pytest.raises(RecipeError, match=r"depth 6: pictures of 64 x 64 px .* depth of 5 at most"):
        network(torch.rand(1, 3, 64, 64))
    assert PatchDiscriminator(c_hidden=32, depth=5)(torch.rand(1, 3, 64, 64)).shape == (1, 1, 2, 2)


def test_images_of_a_batch_do_not_see_each_other() -> None:
    network = PatchDiscriminator(c_hidden=32, depth=3).eval()
    pictures = torch.rand(3, 3, 32, 32)
    alone = torch.cat([network(picture[None]) for picture in pictures])
    assert torch.allclose(network(pictures), alone, atol=1e-5)


def test_calls_in_training_lead_spectral_norms_to_one_and_in_evaluation_move_nothing() -> None:
    torch.manual_seed(0)
    network = PatchDiscriminator(c_hidden=32, depth=3)
    pictures = torch.rand(1, 3, 32, 32)
    for layer in network.encoder:
        if isinstance(layer, nn.Conv2d):
            with torch.no_grad():
                layer.parametrizations.weight.original.mul_(5)  # type: ignore[union-attr]
    for _ in range(50):
        network(pictures)
    for layer in network.encoder:
        if isinstance(layer, nn.Conv2d):
            assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, abs=0.02)
    network.eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network(pictures)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_it_computes_in_float32_under_autocast() -> None:
    network = PatchDiscriminator(c_hidden=32, depth=3).eval()
    pictures = torch.rand(1, 3, 32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = network(pictures.bfloat16())
    assert logits.dtype == torch.float32
    assert torch.equal(logits, network(pictures.bfloat16().float()))
