"""Distances between pictures against reference computations written out here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from shoestring.errors import RecipeError
from shoestring.models.perceptual import LPIPS, PyramidDistance, load_perceptual, unit_length

VGG = [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"]
"""torchvision's configuration D; in its `features` every M is one module, every width two."""

AFTER = {3: 0, 8: 1, 15: 2, 22: 3, 29: 4}
"""Number of a ReLU in torchvision's `features` -> the lpips package's linear layer after it."""


@pytest.fixture(scope="module")
def published() -> dict[str, Tensor]:
    """Tensors under the names and in the shapes of torchvision's vgg16 and lpips' vgg.pth, random."""
    torch.manual_seed(0)
    tensors: dict[str, Tensor] = {"classifier.0.weight": torch.zeros(2, 2)}
    number, before = 0, 3
    for width in VGG:
        if width != "M":
            assert isinstance(width, int)
            tensors[f"features.{number}.weight"] = torch.randn(width, before, 3, 3) / (9 * before / 2) ** 0.5
            tensors[f"features.{number}.bias"] = torch.randn(width) * 0.1
            before = width
        number += 1 if width == "M" else 2
    for block, width in enumerate((64, 128, 256, 512, 512)):
        tensors[f"lin{block}.model.1.weight"] = torch.rand(1, width, 1, 1)
    return tensors


def reference(tensors: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """LPIPS written out: pictures in [-1, 1], lpips' constants, torchvision's order of layers."""
    shift = torch.tensor([-0.030, -0.088, -0.188])[:, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450])[:, None, None]
    a, b = ((2 * picture - 1 - shift) / scale for picture in (x, y))
    total, number = torch.zeros(len(x)), 0
    for width in VGG:
        if width == "M":
            a, b = F.max_pool2d(a, 2, 2), F.max_pool2d(b, 2, 2)
            number += 1
            continue
        weight, bias = tensors[f"features.{number}.weight"], tensors[f"features.{number}.bias"]
        a, b = (F.relu(F.conv2d(z, weight, bias, padding=1)) for z in (a, b))
        number += 2
        if number - 1 in AFTER:
            n, m = (z / (z.pow(2).sum(1, keepdim=True).sqrt() + 1e-10) for z in (a, b))
            linear = tensors[f"lin{AFTER[number - 1]}.model.1.weight"]
            total = total + F.conv2d((n - m) ** 2, linear).mean(dim=(1, 2, 3))
    return total


def pictures(side: int = 32) -> tuple[Tensor, Tensor]:
    x, y = torch.rand(2, 2, 3, side, side, generator=torch.Generator().manual_seed(1))
    return x, y


def test_lpips_is_the_published_formula(published: dict[str, Tensor]) -> None:
    x, y = pictures()
    network = LPIPS.from_tensors(published)
    assert torch.allclose(network(x, y), reference(published, x, y), rtol=1e-4)
    assert network(x, x).tolist() == [0, 0]


def test_lpips_takes_the_names_of_the_lpips_module_too(published: dict[str, Tensor]) -> None:
    slices = {0: 1, 2: 1, 5: 2, 7: 2, 10: 3, 12: 3, 14: 3, 17: 4, 19: 4, 21: 4, 24: 5, 26: 5, 28: 5}
    renamed = {"scaling_layer.shift": torch.zeros(3)}
    for name, tensor in published.items():
        part, number, *rest = name.split(".")
        new = f"net.slice{slices[int(number)]}.{number}.{rest[0]}" if part == "features" else name
        renamed[new] = tensor
    x, y = pictures()
    assert torch.equal(LPIPS.from_tensors(renamed)(x, y), LPIPS.from_tensors(published)(x, y))


def test_lpips_loads_from_one_file_or_from_the_published_two(
    published: dict[str, Tensor], tmp_path: Path
) -> None:
    save_file(published, tmp_path / "all.safetensors")
    both = tmp_path / "both"
    both.mkdir()
    linear = {name: tensor for name, tensor in published.items() if name.startswith("lin")}
    torch.save(linear, both / "vgg.pth")
    torch.save({k: v for k, v in published.items() if k not in linear}, both / "vgg16-397923af.pth")
    x, y = pictures()
    expected = LPIPS.from_tensors(published)(x, y)
    for place in (tmp_path / "all.safetensors", both):
        network = load_perceptual(str(place))
        assert torch.equal(network(x, y), expected)
        assert not any(weight.requires_grad for weight in network.parameters())


def test_weights_that_do_not_serve_are_named(published: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="neither `laplacian` nor a file"):
        load_perceptual("lpips")
    with pytest.raises(RecipeError, match=r"no lin0.model.1.weight \(5 of 31 missing\)"):
        LPIPS.from_tensors({name: t for name, t in published.items() if not name.startswith("lin")})
    alex = {**published, "lin0.model.1.weight": torch.zeros(1, 32, 1, 1)}
    with pytest.raises(RecipeError, match=r"lin0.model.1.weight is \(1, 32, 1, 1\), not \(1, 64, 1, 1\)"):
        LPIPS.from_tensors(alex)
    broken = tmp_path / "broken.pth"
    broken.write_bytes(b"not tensors")
    with pytest.raises(RecipeError, match=r"perceptual .*broken.pth: not a whole PyTorch checkpoint"):
        load_perceptual(str(broken))
    broken.rename(tmp_path / "broken.safetensors")
    with pytest.raises(RecipeError, match=r"perceptual .*broken.safetensors: not a whole"):
        load_perceptual(str(tmp_path / "broken.safetensors"))


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    ran = tmp_path / "ran"

    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (ran,))

    torch.save({"lin0.model.1.weight": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(RecipeError, match=r"trap.pth: refused: it holds more than tensors"):
        load_perceptual(str(tmp_path / "trap.pth"))
    assert not ran.exists()


def test_features_that_are_all_zero_have_a_finite_gradient() -> None:
    features = torch.zeros(1, 4, 2, 2, requires_grad=True)
    unit_length(features).sum().backward()
    assert features.grad is not None
    assert features.grad.isfinite().all()


def test_a_laplacian_pyramid_adds_up_to_the_picture() -> None:
    network = PyramidDistance(levels=4)
    x, _ = pictures(33)
    bands = network.pyramid(x)
    assert [band.shape[-1] for band in bands] == [33, 17, 9, 5]
    total = bands[-1]
    for band in reversed(bands[:-1]):
        total = band + network.expand(total, band)
    assert torch.allclose(total, x, atol=1e-6)


def test_the_pyramid_distance_is_a_distance() -> None:
    network = PyramidDistance()
    x, y = pictures()
    z = torch.rand_like(x)
    assert network(x, x).tolist() == [0, 0]
    assert network(x, y).shape == (2,)
    assert torch.allclose(network(x, y), network(y, x))
    assert (network(x, y) + network(y, z) >= network(x, z)).all()
    # A constant offset is in the last level alone; the blur keeps constants.
    assert torch.allclose(network(x, x + 0.25), torch.full((2,), 0.25), atol=1e-5)


def test_blur_is_farther_than_an_offset_by_as_much() -> None:
    """What differs at several scales counts at each; an offset of the same mean difference counts once."""
    network = PyramidDistance()
    board = ((torch.arange(64) // 8)[:, None] + (torch.arange(64) // 8)) % 2
    x = board.float().expand(1, 3, 64, 64).contiguous()
    blurred = network.blur(x)
    offset = x + (blurred - x).abs().mean()
    assert network(blurred, x) > 1.3 * network(offset, x)
    half = x + (blurred - x) / 2
    assert torch.allclose(network(half, x), network(blurred, x) / 2), "faint differences are not squared away"


def test_the_pyramid_distance_is_differentiable_and_float32_under_autocast() -> None:
    network = PyramidDistance()
    x, y = pictures()
    x.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        distance = network(x, y)
    assert torch.equal(distance, network(x, y))
    distance.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert x.grad.abs().max() > 0
    assert load_perceptual("laplacian")(x, y).shape == (2,)
