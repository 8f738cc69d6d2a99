"""Stores of SDXL's text: both encoders' tokens, pooled vectors, and size and crop ids, as training reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from torch import Tensor

from shoestring.data.add import CaptionAddition, add
from shoestring.data.encode import batch_of
from shoestring.data.encoders import CaptionEncoder, ImageEncoder
from shoestring.data.loader import Loader
from shoestring.data.rows import Row
from shoestring.data.store import Store
from shoestring.errors import ShoestringError, StoreError

MakeStore = Callable[..., Store]
SIDES = ((40, 40), (96, 48), (50, 100), (64, 33))  # width, height


@pytest.fixture
def photos(pictures: Callable[..., Any]) -> list[Row]:
    """Rows of several shapes, of one to three captions; some are longer than 77 tokens."""
    captions = [
        tuple(f"red noise {part} of {'no ' * (9 * n)}" for part in range(1 + n % 3)) for n in range(12)
    ]
    return [Row(f"row{n}", pictures(n, *SIDES[n % 4]), captions[n]) for n in range(12)]


@pytest.fixture(scope="module")
def stock(sdxl_folder: Path) -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline.from_pretrained(sdxl_folder)


def prompted(stock: StableDiffusionXLPipeline, captions: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """Tokens (B, 77, C) and pooled (B, P) by diffusers alone."""
    with torch.no_grad():
        tokens, _, pooled, _ = stock.encode_prompt(list(captions), do_classifier_free_guidance=False)
    return tokens, pooled


def xl(folder: Path, dtype: str = "float16") -> CaptionEncoder:
    return CaptionEncoder.load(str(folder), dtype, pad="encoder", max_tokens=None)


def added(store: Store, captions: CaptionAddition) -> Store:
    grown = add(store, captions, log=lambda line: None)
    assert grown is not None
    return grown


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_batch_holds_what_stock_sdxl_is_given(
    dtype: str, photos: list[Row], make_store: MakeStore, sdxl_folder: Path, stock: StableDiffusionXLPipeline
) -> None:
    """Text without a mask, its pooled vector, the latent of the stock VAE and the six ids in SDXL's order."""
    place = str(sdxl_folder)
    encoders = {"autoencoder": place, "text_encoder": place, "pad": "encoder", "text_dtype": dtype}
    store = make_store(photos, sizes=(32,), chunk_rows=5, **encoders)
    made = store.manifest["text_encoder"]
    assert (made["class"], made["width"], made["pooled"], store.max_tokens) == ("SdxlTextPair", 40, 20, 77)
    loader = Loader(store, size=32, batch_size=7, seed=0, extra=("pooled", "size_crop"))
    shapes = {row.captions: row.image.shape[:2] for row in photos}
    by_caption = {caption: shape for captions, shape in shapes.items() for caption in captions}
    for batch in loader.batches(0, 36):
        tokens, pooled = prompted(stock, batch.captions)
        assert batch.text_mask is None
        assert batch.text.shape == tokens.shape
        closeness = torch.nn.functional.cosine_similarity(batch.text, tokens, dim=-1)
        assert (1 - closeness).max() < (1e-6 if dtype == "float16" else 1e-3)
        torch.testing.assert_close(batch.extra["pooled"], pooled, atol=2e-3, rtol=1e-3)
        assert batch.latents.shape[1:] == (4, 4, 4)
        for caption, ids in zip(batch.captions, batch.extra["size_crop"].tolist(), strict=True):
            height, width = by_caption[caption]
            scale = 32 / min(height, width)
            corner = [(side * scale - 32) / 2 for side in (height, width)]
            assert ids[:2] == [height, width]
            assert np.abs(np.array(ids[2:4]) - corner).max() <= 1
            assert ids[4:] == [32, 32]


def test_latents_are_the_stock_vaes_and_scaled_as_its_pipeline_does(
    photos: list[Row], make_store: MakeStore, sdxl_folder: Path, stock: StableDiffusionXLPipeline
) -> None:
    """`--autoencoder` given a pipeline's folder takes its vae/."""
    store = make_store(photos[:1], sizes=(40,), autoencoder=str(sdxl_folder))
    image = torch.from_numpy(photos[0].image).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        expected = stock.vae.encode(image).latent_dist.mean * stock.vae.config.scaling_factor
    torch.testing.assert_close(store.latents(40, np.array([0])), expected, atol=2e-3, rtol=2e-3)


def test_a_store_is_checked_by_the_encoders_names(
    photos: list[Row], make_store: MakeStore, sdxl_folder: Path
) -> None:
    store = make_store(photos, sizes=(32,), text_encoder=str(sdxl_folder), pad="encoder")
    store.check(text_encoder=f"{sdxl_folder}/", pad="encoder", max_tokens=77)
    with pytest.raises(
        StoreError, match=f"made with the text encoder {sdxl_folder}, the recipe asks for hash"
    ):
        store.check(text_encoder="hashing")
    with pytest.raises(StoreError, match="made with the pad encoder, the recipe asks for none"):
        store.check(text_encoder=str(sdxl_folder), pad="none")


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_captions_added_later_have_their_pooled_vectors(
    dtype: str,
    photos: list[Row],
    make_store: MakeStore,
    list_source: Any,
    sdxl_folder: Path,
    stock: StableDiffusionXLPipeline,
) -> None:
    """First the store's own under SDXL's encoders, then others beside them; drawn from both sets at once."""
    plain = make_store(photos, sizes=(32,), chunk_rows=5)
    with pytest.raises(StoreError, match=r"\(hashing\) gives no pooled text"):
        Loader(plain, size=32, batch_size=4, seed=0, extra=("pooled",))
    text = xl(sdxl_folder, dtype)
    grown = added(plain, CaptionAddition(plain, None, text, name="xl"))
    other = [Row(row.key, row.image, (f"other red {n}",)) for n, row in enumerate(photos)]
    grown = added(grown, CaptionAddition(grown, list_source(other), text, name="more"))
    met = set()
    for names in (["xl"], ["more"], ["xl", "more"]):
        loader = Loader(grown.drawing(names), size=32, batch_size=12, seed=0, extra=("pooled", "size_crop"))
        for batch in loader.batches(0, 48):
            _, pooled = prompted(stock, batch.captions)
            torch.testing.assert_close(batch.extra["pooled"], pooled, atol=2e-3, rtol=1e-3)
            assert (batch.text.shape[1:], batch.extra["size_crop"].shape[1:]) == ((77, 40), (6,))
            met |= {(tuple(names), caption.startswith("other")) for caption in batch.captions}
    both = ("xl", "more")
    assert met == {(("xl",), False), (("more",), True), (both, False), (both, True)}


def test_at_1024_pixels_the_autoencoder_sees_one_picture_at_a_time() -> None:
    """Four are decoded together; what bounds memory is what goes through the network at once."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    sizes = {"block_out_channels": (2, 2, 2, 2), "norm_num_groups": 1, "layers_per_block": 1}
    vae = AutoencoderKL(latent_channels=4, **blocks, **sizes, mid_block_add_attention=False).eval()
    seen: list[tuple[int, ...]] = []
    vae.encoder.register_forward_pre_hook(lambda _, given: seen.append(tuple(given[0].shape)))
    assert batch_of((1024,)) == 4
    arrays = ImageEncoder(vae, "vae").columns(np.zeros((2, 1024, 1024, 3), dtype=np.uint8))
    assert seen == [(1, 3, 1024, 1024)] * 2
    assert arrays["mean"].shape == (2, 4, 128, 128)
    assert arrays["mean"].nbytes == 2 * 128 * 2**10


def test_a_vae_that_overflows_is_refused_with_what_to_do(photos: list[Row], sdxl_folder: Path) -> None:
    """Stored in half precision or not, it runs in float32; latents that do not fit are no latents."""
    image = ImageEncoder.load(str(sdxl_folder))
    with torch.no_grad():
        image.model.quant_conv.weight.mul_(1e8)  # type: ignore[union-attr, operator]
    with pytest.raises(ShoestringError, match=r"beyond float16's range.*Give another --autoencoder"):
        image.columns(np.stack([photos[0].image]))
