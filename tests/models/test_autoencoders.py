"""Every autoencoder behind the same functions, against diffusers' own calls."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor, nn

from shoestring.errors import RecipeError
from shoestring.models import autoencoders
from shoestring.models.autoencoders import (
    LatentScaling,
    PixelAutoencoder,
    as_scaling,
    decode_latents,
    encode_images,
    latent_channels,
    latent_side,
    load_autoencoder,
    sample_latents,
    scale_latents,
    size_multiple,
    spatial_factor,
    weights_fingerprint,
)
from shoestring.models.wuerstchen_autoencoder import WuerstchenAutoencoder
from shoestring.models.wuerstchen_vqgan import PaellaVQModel


def kl(**config: object) -> AutoencoderKL:
    torch.manual_seed(0)
    two = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(block_out_channels=(4, 8), norm_num_groups=2, latent_channels=4, **two, **config)


def tiny() -> AutoencoderTiny:
    torch.manual_seed(0)
    channels, blocks = (8, 8, 8), (1, 1, 1)
    return AutoencoderTiny(
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        num_encoder_blocks=blocks,
        num_decoder_blocks=blocks,
    )


def dc() -> AutoencoderDC:
    torch.manual_seed(0)
    ends = {f"{end}_block_out_channels": (8, 16) for end in ("encoder", "decoder")}
    layers = {f"{end}_layers_per_block": (1, 1) for end in ("encoder", "decoder")}
    scales = {f"{end}_qkv_multiscales": ((), ()) for end in ("encoder", "decoder")}
    types = {f"{end}_block_types": "ResBlock" for end in ("encoder", "decoder")}
    return AutoencoderDC(
        latent_channels=8, attention_head_dim=4, scaling_factor=0.41, **ends, **layers, **scales, **types
    )


STAGE_A = {"embed_dim": 16, "bottleneck_blocks": 1, "num_vq_embeddings": 8, "scale_factor": 0.5}


def stage_a() -> PaellaVQModel:
    torch.manual_seed(0)
    model = PaellaVQModel(**STAGE_A)
    for parameter in model.parameters():
        if parameter.numel() == 6:  # the blocks' gates, zero at first
            nn.init.normal_(parameter)
    return model


def cascade(input_ratio: float = 0.75, **options: Any) -> WuerstchenAutoencoder:
    """Two levels of Stage B and a compressor of stride 4: multiples of 16 px, a cell of 16/3."""
    torch.manual_seed(0)
    stage = {"block": "fused", "expand": 4, "kernel": 3, "stride": 2, "in": 8, "out": 8, "layers": 1}
    levels = {"c_hidden": [8, 16], "nhead": [-1, 2], "blocks": [1, 1], "level_config": ["CT", "CTA"]}
    conditions = {"c_r": 8, "c_cond": 16, "clip_embd": 8, "effnet_embd": 5, "inject_effnet": [True, True]}
    compressor = {"c_latent": 5, "variant": [stage], "last_channel": 16, "input_ratio": input_ratio}
    model = WuerstchenAutoencoder(STAGE_A, levels | conditions, compressor | options, decode_steps=2)
    nn.init.normal_(model.decoder.clf[1].weight, std=0.1)
    return model


MAKERS = {
    "pixels": (PixelAutoencoder, 3, 1),
    "kl": (lambda: kl(scaling_factor=0.13025, shift_factor=0.1), 4, 2),
    "tiny": (tiny, 4, 4),
    "dc": (dc, 8, 2),
    "stage_a": (stage_a, 4, 4),
    "cascade": (lambda: cascade(latents_mean=-1, latents_std=42), 5, 16 / 3),
}


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("name", MAKERS)
def test_shapes_follow_from_channels_and_factor(name: str, images: Tensor) -> None:
    make, channels, factor = MAKERS[name]
    model: nn.Module = make().eval()
    mean, log_variance = encode_images(model, images)
    assert latent_channels(model) == channels
    assert spatial_factor(model) == pytest.approx(factor)
    assert mean.shape == (2, channels, latent_side(model, 16), latent_side(model, 16))
    assert latent_side(model, 16) == round(16 / factor)
    assert (log_variance is not None) == (name == "kl")
    with torch.no_grad():
        decoded = decode_latents(model, scale_latents(model, mean))
    assert decoded.shape == images.shape
    assert decoded.abs().max() <= 1


@pytest.mark.parametrize("name", MAKERS)
def test_a_saved_autoencoder_loads_as_the_same_network(name: str, images: Tensor, tmp_path: Path) -> None:
    model: nn.Module = MAKERS[name][0]().eval()
    model.save_pretrained(tmp_path / "vae")
    for place in (tmp_path / "vae", tmp_path):  # itself, or the pipeline's folder around it
        loaded = load_autoencoder(str(place))
        assert type(loaded) is type(model)
        assert not any(p.requires_grad for p in loaded.parameters())
        assert weights_fingerprint(loaded) == weights_fingerprint(model)
        torch.testing.assert_close(encode_images(loaded, images)[0], encode_images(model, images)[0])


def test_kl_agrees_with_diffusers_own_calls(images: Tensor) -> None:
    """Mean, log-variance, a draw, scaling and decoding equal what diffusers' pipelines do."""
    model = kl(scaling_factor=0.13025, shift_factor=0.1).eval()
    with torch.no_grad():
        distribution = model.encode(images).latent_dist
    mean, log_variance = encode_images(model, images)
    assert torch.equal(mean, distribution.mean)
    assert log_variance is not None
    assert torch.equal(log_variance, distribution.logvar)
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(sample_latents(mean, log_variance, noise), distribution.sample(generator))
    scaled = scale_latents(model, mean)
    torch.testing.assert_close(scaled, (distribution.mean - 0.1) * 0.13025)
    with torch.no_grad():  # as StableDiffusion3Pipeline decodes
        raw = model.decode(scaled / 0.13025 + 0.1, return_dict=False)[0]
        expected = VaeImageProcessor().postprocess(raw, output_type="pt") * 2 - 1
        torch.testing.assert_close(decode_latents(model, scaled), expected, atol=1e-5, rtol=0)


def test_the_tiny_autoencoder_needs_no_scaling(images: Tensor) -> None:
    model = tiny().eval()
    assert as_scaling(model).is_identity
    with torch.no_grad():
        assert torch.equal(encode_images(model, images)[0], model.encode(images).latents)


def _flux(vae: Any, images: Tensor) -> Tensor:
    from diffusers import FluxImg2ImgPipeline

    generator = torch.Generator().manual_seed(3)
    return FluxImg2ImgPipeline._encode_vae_image(SimpleNamespace(vae=vae), images, generator)


def _sdxl(vae: Any, images: Tensor) -> Tensor:
    from diffusers import StableDiffusionXLImg2ImgPipeline

    generator, where = torch.Generator().manual_seed(3), (torch.float32, torch.device("cpu"))
    return StableDiffusionXLImg2ImgPipeline.prepare_latents(
        SimpleNamespace(vae=vae), images, None, len(images), 1, *where, generator, add_noise=False
    )


def _sana(vae: Any, images: Tensor) -> Tensor:
    from diffusers import SanaSprintImg2ImgPipeline

    scheduler = SimpleNamespace(config=SimpleNamespace(sigma_data=1.0))
    pipeline, start = SimpleNamespace(vae=vae, scheduler=scheduler, vae_scale_factor=2), torch.zeros(())
    size, where = (len(images), 8, 16, 16), (torch.float32, torch.device("cpu"))
    return SanaSprintImg2ImgPipeline.prepare_latents(pipeline, images, start, *size, *where, None)


MEAN, STD = (0.1, -0.2, 0.3, -0.4), (2.0, 4.0, 8.0, 16.0)


@pytest.mark.parametrize(
    ("make", "theirs"),
    [
        (lambda: kl(scaling_factor=0.3611, shift_factor=0.1159), _flux),
        (lambda: kl(scaling_factor=0.13025), _sdxl),
        (lambda: kl(scaling_factor=0.5, latents_mean=MEAN, latents_std=STD), _sdxl),
        (dc, _sana),
    ],
    ids=["flux", "sdxl", "playground", "sana"],
)
def test_scaled_latents_are_those_of_diffusers_pipelines(
    make: Callable[[], nn.Module], theirs: Callable[[Any, Tensor], Tensor], images: Tensor
) -> None:
    """The pipelines' own code, run on the autoencoder alone: encode, draw, scale."""
    model = make().eval()
    raw, spread = encode_images(model, images)
    if spread is not None:
        raw = sample_latents(raw, spread, torch.randn(raw.shape, generator=torch.Generator().manual_seed(3)))
    with torch.no_grad():
        expected = theirs(model, images)
    assert not as_scaling(model).is_identity
    torch.testing.assert_close(scale_latents(model, raw), expected, rtol=1e-5, atol=1e-5)


def test_stage_a_alone_works_between_0_and_1_and_scales_by_its_factor(images: Tensor) -> None:
    """Its own calls: no quantisation, latents over `scale_factor`, as Stage B sees them."""
    model = stage_a().eval()
    with torch.no_grad():
        z = model.encode((images + 1) / 2).latents
        mean, _ = encode_images(model, images)
        assert torch.equal(mean, z)
        torch.testing.assert_close(scale_latents(model, mean), z / 0.5)
        expected = model.decode(z, force_not_quantize=True).sample.clamp(0, 1) * 2 - 1
        torch.testing.assert_close(decode_latents(model, z / 0.5), expected)


def test_a_pipeline_with_stage_a_alone_opens_as_stage_a(images: Tensor, tmp_path: Path) -> None:
    """As training it exports it; with a `vae/` beside it, that is meant."""
    model = stage_a().eval()
    model.save_pretrained(tmp_path / "run" / "pipeline" / "vqgan")
    (tmp_path / "run" / "recipe.yaml").write_text("{}")
    for place in (tmp_path / "run" / "pipeline", tmp_path / "run"):
        loaded = load_autoencoder(str(place))
        assert isinstance(loaded, PaellaVQModel)
        torch.testing.assert_close(encode_images(loaded, images)[0], encode_images(model, images)[0])
    dc().save_pretrained(tmp_path / "run" / "pipeline" / "vae")
    assert isinstance(load_autoencoder(str(tmp_path / "run")), AutoencoderDC)


@pytest.mark.parametrize("name", MAKERS)
def test_sizes_that_fit_are_multiples_and_others_are_refused(name: str) -> None:
    """A cell's side, but for the cascade, whose stages agree only at multiples of 16 px."""
    model = MAKERS[name][0]().eval()
    multiple = size_multiple(model)
    assert multiple == (16 if name == "cascade" else spatial_factor(model))
    assert latent_side(model, 3 * multiple) == 3 * latent_side(model, multiple)
    if multiple > 1:
        with pytest.raises(RecipeError, match=rf"multiples of {multiple}; nearest to .*: {multiple}"):
            latent_side(model, multiple + 1)


@torch.no_grad()
def test_the_cascade_decodes_a_few_at_a_time_as_it_would_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 2, 2 and 1 pictures; each picture's noise is its own, so no part shows."""
    model = cascade().eval()
    images = torch.rand(5, 3, 16, 32) * 2 - 1
    mean, _ = encode_images(model, images)
    decoded = decode_latents(model, mean)
    monkeypatch.setattr(autoencoders, "PIXELS_AT_ONCE", 2 * 16 * 32)
    sizes: list[int] = []
    model.vqgan.out_block.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    torch.testing.assert_close(decode_latents(model, mean), decoded, rtol=1e-4, atol=1e-4)
    assert sizes == [2, 2, 1]
    assert decoded.std() > 0.05


@pytest.mark.parametrize("name", ["kl", "tiny", "dc"])
def test_memory_is_bounded_by_encoding_and_decoding_a_few_at_a_time(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any batch goes through in parts of so many pixels, and comes out as it would whole."""
    model = MAKERS[name][0]().eval()
    images = torch.rand(5, 3, 16, 16) * 2 - 1
    mean, spread = encode_images(model, images)
    with torch.no_grad():
        decoded = decode_latents(model, mean)
    monkeypatch.setattr(autoencoders, "PIXELS_AT_ONCE", 2 * 16 * 16)
    sizes: list[int] = []
    for part in (model.encoder, model.decoder):
        part.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    parts, spreads = encode_images(model, images)
    with torch.no_grad():
        torch.testing.assert_close(decode_latents(model, mean), decoded, rtol=1e-5, atol=1e-5)
    assert sizes == [2, 2, 1] * 2
    torch.testing.assert_close(parts, mean, rtol=1e-5, atol=1e-5)
    if spread is not None:
        torch.testing.assert_close(spreads, spread, rtol=1e-5, atol=1e-5)


def test_in_half_precision_an_autoencoder_that_would_overflow_works_in_float32(images: Tensor) -> None:
    """diffusers' `force_upcast`, on by default in AutoencoderKL: float16 weights, float32 arithmetic."""
    model = kl(force_upcast=True).eval()
    with torch.no_grad():
        model.encoder.conv_out.weight.mul_(1e5)
    half, whole = model.half(), kl(force_upcast=False).eval()
    whole.load_state_dict(half.state_dict())
    mean, spread = encode_images(half, images)
    expected, _ = encode_images(whole, images)
    assert expected.abs().max() > torch.finfo(torch.float16).max
    assert spread is not None
    torch.testing.assert_close(mean, expected)
    with torch.no_grad():
        assert decode_latents(half, mean).isfinite().all()
    assert half.dtype == torch.float16


def test_pixels_are_the_identity(images: Tensor) -> None:
    model = load_autoencoder("pixels")
    mean, log_variance = encode_images(model, images)
    assert torch.equal(mean, images)
    assert log_variance is None
    assert torch.equal(decode_latents(model, scale_latents(model, mean)), images)


def test_scaling_by_channel_follows_latents_mean_and_std() -> None:
    """Playground 2.5's way: (raw - mean) * factor / std, and back."""
    model = kl(scaling_factor=0.5, latents_mean=(1.0, 2.0, 3.0, 4.0), latents_std=(2.0, 4.0, 8.0, 16.0))
    raw = torch.randn(2, 4, 3, 3)
    mean, std = torch.tensor([1.0, 2, 3, 4]).view(4, 1, 1), torch.tensor([2.0, 4, 8, 16]).view(4, 1, 1)
    scaling = as_scaling(model)
    torch.testing.assert_close(scaling.apply(raw), (raw - mean) * 0.5 / std)
    torch.testing.assert_close(scaling.undo(scaling.apply(raw)), raw)
    assert not scaling.is_identity
    assert LatentScaling().is_identity


def test_fingerprints_tell_weights_apart() -> None:
    one, other = kl(), kl()
    assert weights_fingerprint(one) == weights_fingerprint(other)
    with torch.no_grad():
        next(other.parameters()).flatten()[0] += 1e-3
    assert weights_fingerprint(one) != weights_fingerprint(other)


def _pickled(folder: Path) -> None:
    kl().save_pretrained(folder, safe_serialization=False)


def _foreign(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"_class_name": "VQModel"}))


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (_pickled, "safetensors"),
        (_foreign, "VQModel.*Known: PixelAutoencoder, AutoencoderKL"),
        (lambda folder: None, "no autoencoder there"),
    ],
)
def test_a_folder_that_cannot_be_used_says_why(
    prepare: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    prepare(tmp_path)
    with pytest.raises(RecipeError, match=message):
        load_autoencoder(str(tmp_path))


@pytest.mark.parametrize("name", ["./nowhere", "nobody/nothing-of-the-kind"])
def test_a_missing_autoencoder_says_what_may_be_given(name: str) -> None:
    with pytest.raises(RecipeError, match=r"Give .*stabilityai/sdxl-vae, or pixels"):
        load_autoencoder(name)
