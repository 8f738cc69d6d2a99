"""The compressor against published names, numbers and outputs, and the weights it takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from shoestring.errors import CheckpointError, RecipeError
from shoestring.models.semantic_compressor import SemanticCompressor

SMALL: list[dict[str, Any]] = [
    {"block": "fused", "expand": 1, "kernel": 3, "stride": 1, "in": 8, "out": 8, "layers": 2},
    {"block": "mbconv", "expand": 4, "kernel": 3, "stride": 2, "in": 8, "out": 16, "layers": 2},
]
"""Stride 4, a residual block of each kind."""


def small(**config: Any) -> SemanticCompressor:
    torch.manual_seed(0)
    model = SemanticCompressor(variant=SMALL, last_channel=24, c_latent=4, **config)
    for module in model.modules():  # a trained network's norms are not 0 and 1
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return model.eval()


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))


# --- the published network -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "features", "whole"),
    [("s", 20_177_488, 20_198_000), ("l", 117_234_272, 117_234_272 + 20_512)],
)
def test_published_networks_have_their_published_numbers_of_parameters(
    variant: str, features: int, whole: int
) -> None:
    with torch.device("meta"):
        model = SemanticCompressor(variant=variant)
    assert sum(p.numel() for p in model.backbone.parameters()) == features
    assert sum(p.numel() for p in model.parameters()) == whole
    assert model.stride == 32


def test_names_and_shapes_are_torchvisions(fixtures: Path) -> None:
    """All 780 of efficientnet_v2_s's features, in order."""
    published = json.loads((fixtures / "efficientnet_v2_s_keys.json").read_text())
    with torch.device("meta"):
        state = SemanticCompressor().backbone.state_dict()
    assert {name: list(tensor.shape) for name, tensor in state.items()} == published
    assert list(state) == list(published)


def test_features_are_torchvisions(fixtures: Path) -> None:
    """A small EfficientNetV2 of torchvision's, with its weights, on a given input, in evaluation mode."""
    with safe_open(fixtures / "efficientnet_v2_small.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - a method of theirs
    model = SemanticCompressor(variant=config["stages"], last_channel=config["last_channel"]).eval()
    weights = {name[8:]: tensor for name, tensor in tensors.items() if name.startswith("weights.")}
    model.backbone.load_state_dict(weights)
    with torch.no_grad():
        features = model.backbone(tensors["x"])
    # Values go to 300, where float32 itself is exact to 3e-5.
    torch.testing.assert_close(features, tensors["features"], rtol=1e-5, atol=1e-3)
    spread = tensors["features"].std()
    torch.testing.assert_close(features / spread, tensors["features"] / spread, rtol=0, atol=1e-4)


def test_initial_weights_are_torchvisions() -> None:
    """Convolutions of variance 2 / fan_out, biases 0, norms 1 and 0, whatever came before."""
    torch.manual_seed(0)
    for name, module in SemanticCompressor(variant="tiny").backbone.named_modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] ** 2 * module.out_channels  # grouped or not: as in torchvision
            tolerance = 4 / module.weight.numel() ** 0.5
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=tolerance), name
            assert module.bias is None or not module.bias.any()
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.eps, module.momentum) == (1e-3, 0.1)
            assert module.weight.eq(1).all()


# --- what it computes ------------------------------------------------------------------------------------


def test_pictures_are_normalised_as_imagenets(images: Tensor) -> None:
    model = small()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normal = ((images.permute(0, 2, 3, 1) - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        torch.testing.assert_close(model(images), model.mapper(model.backbone(normal)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ratio", [0.75, 1.0, 0.5, 0.6667])
def test_compress_resizes_by_the_ratio_then_sees(ratio: float) -> None:
    model = small(input_ratio=ratio)
    images = torch.rand(2, 3, 48, 96)
    height, width = round(48 * ratio), round(96 * ratio)
    with torch.no_grad():
        z = model.compress(images)
        seen = F.interpolate(images, (height, width), mode="bilinear", antialias=True, align_corners=False)
        torch.testing.assert_close(z, model(seen), rtol=1e-5, atol=1e-5)
    assert z.shape == (2, 4, height // 4, width // 4)


@pytest.mark.parametrize("bad", [(32, 40), (40, 32), (8, 32)])
def test_a_size_that_leaves_part_of_a_cell_is_refused_with_the_nearest(bad: tuple[int, int]) -> None:
    """Stride 4 of three quarters: multiples of 16."""
    side = next(each for each in bad if each % 16)
    near = {40: "32 or 48", 8: "16"}[side]
    with pytest.raises(RecipeError, match=rf"multiples of 16; nearest to {side}: {near}\."):
        small().compress(torch.rand(1, 3, *bad))


def test_tiny_is_small_and_has_stride_16() -> None:
    torch.manual_seed(0)
    model = SemanticCompressor(variant="tiny", input_ratio=1.0)
    assert 200_000 < sum(p.numel() for p in model.parameters()) < 400_000
    z = model.compress(torch.rand(2, 3, 64, 32))
    assert z.shape == (2, 16, 4, 2)
    z.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_without_affine_codes_are_normal_in_training(images: Tensor) -> None:
    """Stable Cascade's way: mean 0, spread 1 a channel, nothing learned in the norm."""
    model = small(affine=False).train()
    z = model(images)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(z.std((0, 2, 3), correction=0), torch.ones(4), rtol=0, atol=1e-3)
    assert "mapper.1.weight" not in model.state_dict()


def test_stochastic_depth_skips_whole_pictures_in_training_alone(images: Tensor) -> None:
    """A last residual block dropped at rate p gives x or x + y / (1 - p), and x + y in evaluation."""
    model = small(stochastic_depth=0.8)
    block = model.backbone[2][1]
    assert block.drop == pytest.approx(0.8 * 3 / 4)  # the fourth of four, the first at 0
    x = torch.randn(64, 16, 4, 4)
    with torch.no_grad():
        added = block(x) - x
        block.training = True  # its norms stay in evaluation
        dropped = block(x) - x
    kept = dropped.flatten(1).abs().amax(1) > 0
    torch.testing.assert_close(dropped[kept], added[kept] / 0.4, rtol=1e-4, atol=1e-5)
    assert 12 < kept.sum() < 39  # 64 coins at 0.4, four deviations


# --- weights of others -----------------------------------------------------------------------------------


def classifier(model: SemanticCompressor) -> dict[str, Tensor]:
    """A state dict as torchvision's classifier of this backbone would save it."""
    features = {f"features.{name}": value for name, value in model.backbone.state_dict().items()}
    return {**features, "classifier.1.weight": torch.zeros(1000, 24), "classifier.1.bias": torch.zeros(1000)}


def published(model: SemanticCompressor) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ""])
def test_imagenet_weights_fill_the_backbone_alone(suffix: str, images: Tensor, tmp_path: Path) -> None:
    donor, model = small(), small()
    torch.manual_seed(5)
    nn.init.normal_(donor.backbone[0][0].weight)
    mapper = {name: value.clone() for name, value in model.mapper.state_dict().items()}
    source: Any = classifier(donor)
    if suffix:
        path = tmp_path / f"efficientnet{suffix}"
        (save_file if suffix == ".safetensors" else torch.save)(source, path)
        source = path
    model.load_imagenet(source)
    with torch.no_grad():
        assert torch.equal(model.backbone(images), donor.backbone(images))
    assert all(torch.equal(value, mapper[name]) for name, value in model.mapper.state_dict().items())


@pytest.mark.parametrize("affine", [True, False])
def test_a_published_compressor_loads_strictly_by_itself(
    affine: bool, images: Tensor, tmp_path: Path
) -> None:
    """v2's lies beside other networks in a .pt; whether its norm is affine is told from it."""
    donor = small(affine=affine)
    torch.save(
        {"state_dict": {"clf.1.bias": torch.zeros(3)}, "effnet_state_dict": published(donor)},
        tmp_path / "b.pt",
    )
    model = SemanticCompressor.from_published(
        tmp_path / "b.pt", variant=SMALL, last_channel=24, latents_mean=-1, latents_std=42
    )
    assert model.config["affine"] is affine
    assert model.config["c_latent"] == 4
    with torch.no_grad():
        assert torch.equal(model(images), donor(images))


def _without(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda state: state.__delitem__(name)


def _with(name: str, value: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda state: state.update({name: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("backbone.1.0.block.0.0.weight"), r"lacks backbone\.1\.0\.block\.0\.0\.weight \(1 missing"),
        (_with("head.weight", torch.zeros(1)), r"has head\.weight, which this network has not"),
        (_with("mapper.0.weight", torch.zeros(4, 25, 1, 1)), r"mapper\.0\.weight is \(4, 25, 1, 1\); this"),
        (_without("mapper.0.weight"), "holds no networks like a compressor"),
        (_without("mapper.1.weight"), r"norm has no scale and shift \(Stable Cascade\)"),
    ],
)
def test_other_weights_are_refused_and_say_why(
    change: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    model, state = small(), published(small())
    change(state)
    with pytest.raises(CheckpointError, match=message):
        model.load_published(state)


def test_v1s_compressor_is_called_by_its_name() -> None:
    with torch.device("meta"):
        state = SemanticCompressor(variant="l").state_dict()
        with pytest.raises(CheckpointError, match=r"Würstchen v1's compressor \(EfficientNetV2-L\)"):
            SemanticCompressor.from_published(state)


def test_a_pickle_that_is_a_program_is_not_run(tmp_path: Path) -> None:
    torch.save({"mapper.0.weight": torch.zeros(4, 24, 1, 1), "hook": print}, tmp_path / "b.pt")
    with pytest.raises(CheckpointError, match="refused: it holds more than tensors"):
        SemanticCompressor.from_published(tmp_path / "b.pt")


# --- configuration ---------------------------------------------------------------------------------------


def test_a_saved_compressor_loads_as_the_same(images: Tensor, tmp_path: Path) -> None:
    """With its stages and statistics, through JSON."""
    model = small(input_ratio=0.5)
    model.set_statistics([0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0])
    model.save_pretrained(tmp_path)
    loaded = SemanticCompressor.from_pretrained(tmp_path)
    assert loaded.config["latents_std"] == [1.0, 2.0, 3.0, 4.0]
    assert loaded.config["variant"] == SMALL
    with torch.no_grad():
        torch.testing.assert_close(loaded.compress(images), model.compress(images))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"variant": "m"}, "variant 'm': unknown. Use s, l, tiny"),
        ({"variant": []}, "empty list"),
        ({"variant": [{**SMALL[0], "block": "dense"}]}, "block 'dense'; use 'fused' or 'mbconv'"),
        ({"variant": [{**SMALL[0], "width": 3}]}, "stage 0: has .*width"),
        ({"variant": [SMALL[0], {**SMALL[1], "in": 9}]}, "stage 1: takes 9 channels; 8 come in"),
        ({"variant": SMALL, "input_ratio": 1.5}, "input_ratio 1.5"),
        ({"variant": SMALL, "latents_mean": 0.0}, "give both or none"),
        ({"variant": SMALL, "latents_mean": [0.0, 1.0], "latents_std": 1.0}, "latents_mean: 2 numbers"),
        ({"variant": SMALL, "latents_mean": 0.0, "latents_std": 0.0}, "must be above 0"),
    ],
)
def test_a_network_that_cannot_be_built_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        SemanticCompressor(**config)
