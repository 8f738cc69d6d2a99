"""Scenes into a store of a cascade's codes: a fractional factor, sizes that fit, whose weights made them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from shoestring.data.add import SizeAddition
from shoestring.data.encode import EncodeSettings, encode
from shoestring.data.encoders import ImageEncoder
from shoestring.data.rows import Row
from shoestring.data.scenes import ScenesSource, render_many
from shoestring.data.sources import open_source
from shoestring.data.store import Store
from shoestring.errors import StoreError
from shoestring.models.autoencoders import (
    as_scaling,
    decode_latents,
    encoder_fingerprint,
    load_autoencoder,
    weights_fingerprint,
)
from shoestring.models.wuerstchen_autoencoder import WuerstchenAutoencoder

MakeRows = Callable[..., list[Row]]

SCENES = {"images": 12, "size": 64, "held_out": 2}
STAGES = [
    {"block": "fused", "expand": 2, "kernel": 3, "stride": stride, "in": 8, "out": 8, "layers": 1}
    for stride in (2, 2)
]


def cascade(ratio: float = 0.75, stride: int = 8, seed: int = 0) -> WuerstchenAutoencoder:
    """Tiny stages A, B and compressor with random statistics; ratio 3/4 at stride 8 is a factor of 10 2/3."""
    torch.manual_seed(seed)
    stages = STAGES if stride == 8 else [*STAGES, STAGES[1]]
    model = WuerstchenAutoencoder(
        vqgan={"bottleneck_blocks": 1, "embed_dim": 8, "num_vq_embeddings": 16},
        decoder={
            "c_r": 8,
            "c_cond": 8,
            "c_hidden": [8, 16],
            "nhead": [-1, 2],
            "blocks": [1, 1],
            "level_config": ["CT", "CTA"],
            "inject_effnet": [False, True],
            "effnet_embd": 5,
            "clip_embd": 8,
        },
        compressor={"c_latent": 5, "variant": stages, "last_channel": 16, "input_ratio": ratio},
    )
    for module in model.compressor.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    nn.init.normal_(model.decoder.clf[1].weight, std=0.2)  # zero at first, whatever the codes
    return model.eval()


def saved(model: WuerstchenAutoencoder, place: Path) -> str:
    """A pipeline's folder with the three stages."""
    for name in ("vqgan", "decoder", "compressor"):
        getattr(model, name).save_pretrained(place / name)
    return str(place)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved cascade; not to be changed."""
    return saved(cascade(), tmp_path_factory.mktemp("cascade"))


def encoded(place: str, out: Path, **changes: Any) -> Store:
    """The scenes' store by the cascade at `place`."""
    settings = EncodeSettings(**{"autoencoder": place, "sizes": (64,), "chunk_rows": 8, **changes})
    store = encode(open_source("scenes", scenes=SCENES), out, settings, log=lambda line: None)
    assert store is not None
    return store


def step(part: nn.Module) -> None:
    """One step of training: every parameter moves by a millionth."""
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.add_(1e-6 * torch.randn_like(parameter))


def pictures_of(rows: range) -> Tensor:
    source = ScenesSource(**SCENES)
    pictures = render_many([source.scene(row) for row in rows], 64)
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


# --- what is stored --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ratio", "stride", "side"), [(0.75, 8, 6), (1.0, 16, 4), (0.5, 8, 4)])
def test_codes_are_the_compressors_own(ratio: float, stride: int, side: int, tmp_path: Path) -> None:
    model = cascade(ratio, stride)
    store = encoded(saved(model, tmp_path / "cascade"), tmp_path / "store")
    assert store.latent_shape(64) == (5, side, side)
    made_by = store.manifest["autoencoder"]
    assert (made_by["class"], made_by["channels"]) == ("WuerstchenAutoencoder", 5)
    assert made_by["spatial_factor"] == pytest.approx(64 / side)
    expected = model.compressor.compress((pictures_of(range(12)) + 1) / 2)
    stored = store.normalised("autoencoder").latents(64, np.arange(12))
    torch.testing.assert_close(stored, as_scaling(model).apply(expected), atol=2e-3, rtol=2e-3)


def test_stored_codes_decode_to_pictures(place: str, tmp_path: Path) -> None:
    """The same ones as the codes never stored, to float16's rounding."""
    store, model = encoded(place, tmp_path / "store"), load_autoencoder(place)
    pictures = decode_latents(model, store.latents(64, np.arange(3)))
    assert pictures.shape == (3, 3, 64, 64)
    assert -1 <= pictures.min() <= pictures.max() <= 1
    direct = model.decode(model.encode(pictures_of(range(3))).latent).sample  # type: ignore[operator]
    torch.testing.assert_close(pictures, direct, atol=1e-4, rtol=0)
    assert (pictures[0] - pictures[1]).abs().max() > 0.01, "pictures differ by their codes"


def test_scalings_are_of_the_codes(place: str, tmp_path: Path) -> None:
    store = encoded(place, tmp_path / "store")
    train = store.splits["train"].rows(np.arange(12))
    latents = store.normalised("measured").latents(64, train)
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 1e-4
    assert (latents.std(dim=(0, 2, 3), correction=0) - 1).abs().max() < 1e-4
    raw = store._gather("latents-64", "mean", train)
    published = store.normalised("x42-1").latents(64, train)
    torch.testing.assert_close(published, (torch.from_numpy(raw).float() + 1) / 42)


# --- sizes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "near"), [(72, r"multiples of 32; nearest: 64 or 96\."), (20, r"multiples of 32; nearest: 32\.")]
)
def test_a_size_that_does_not_fit_is_refused_with_the_nearest(
    size: int, near: str, place: str, tmp_path: Path
) -> None:
    with pytest.raises(StoreError, match=near):
        encoded(place, tmp_path / "store", sizes=(size,), upscale=True)
    assert not (tmp_path / "store").exists()


# --- whose codes they are --------------------------------------------------------------------------------


def test_a_step_of_training_changes_the_fingerprint_of_what_it_trained_alone(place: str) -> None:
    """A decoder trained on makes no other codes; a compressor trained on, or its statistics alone, does."""
    model, fresh = cascade(), cascade()
    assert isinstance(fresh, WuerstchenAutoencoder)
    whole, encoding = weights_fingerprint(model), encoder_fingerprint(model)
    loaded = load_autoencoder(place)
    assert (weights_fingerprint(loaded), encoder_fingerprint(loaded)) == (whole, encoding)
    for part in (model.decoder, model.vqgan):
        before = weights_fingerprint(model)
        step(part)
        assert (weights_fingerprint(model) != before, encoder_fingerprint(model)) == (True, encoding)
    step(model.compressor)
    assert encoder_fingerprint(model) != encoding
    fresh.compressor.train()(torch.rand(2, 3, 32, 32))
    assert encoder_fingerprint(fresh) != encoding
    assert encoder_fingerprint(cascade(seed=1)) != encoding


def test_the_manifest_names_both_fingerprints(place: str, tmp_path: Path, kl_folder: Path) -> None:
    """One alone for autoencoders whose parts are not told apart."""
    made_by = encoded(place, tmp_path / "store").manifest["autoencoder"]
    model = load_autoencoder(place)
    assert made_by["weights"] == weights_fingerprint(model)
    assert made_by["encoder_weights"] == encoder_fingerprint(model) != made_by["weights"]
    assert "encoder_weights" not in ImageEncoder.load(str(kl_folder)).identity()


def test_a_size_is_added_with_another_decoder_but_not_with_another_compressor(
    place: str, tmp_path: Path
) -> None:
    store = encoded(place, tmp_path / "store")
    source = open_source("scenes", scenes=SCENES)
    model = cascade()
    step(model.decoder)
    better = saved(model, tmp_path / "better")
    assert SizeAddition(store, source, 96, ImageEncoder.load(better)).columns == ["latents-96"]
    other = saved(cascade(seed=1), tmp_path / "other")
    with pytest.raises(StoreError, match="with other weights than"):
        SizeAddition(store, source, 96, ImageEncoder.load(other))
