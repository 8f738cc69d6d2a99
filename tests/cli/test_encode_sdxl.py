"""`shoestring encode` with an SDXL pipeline's folder: both text encoders and the VAE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from shoestring.data.loader import Loader
from shoestring.data.store import Store


def test_a_folder_becomes_a_store_that_trains_sdxl(
    empty: Path, captioned: Any, command: Any, sdxl_folder: Path
) -> None:
    """Latents, text, pooled text and ids of one picture, as a stock U-Net takes them."""
    captioned(empty / "photos", 6)
    encoders = ("--autoencoder", sdxl_folder, "--text-encoder", sdxl_folder, "--pad", "encoder")
    said = command("encode", "photos", "--out", "s", "--size", 32, *encoders, "--text-dtype", "int8")
    assert said.code == 0, said.err
    assert said.out.startswith("s: 6 images of 32 px (6 train), ")
    told = command("store", "info", "s").out
    assert "(SdxlTextPair), width 40 and pooled 20, padded by the encoder, at most 77" in told
    loader = Loader(Store.open("s"), size=32, batch_size=6, seed=0, extra=("pooled", "size_crop"))
    (batch,) = loader.batches(0, 6)
    pipeline = StableDiffusionXLPipeline.from_pretrained(sdxl_folder)
    with torch.no_grad():
        tokens, _, pooled, _ = pipeline.encode_prompt(list(batch.captions), do_classifier_free_guidance=False)
        conditions = {"text_embeds": batch.extra["pooled"], "time_ids": batch.extra["size_crop"]}
        output = pipeline.unet(batch.latents, 500, batch.text, added_cond_kwargs=conditions).sample
        ids = torch.tensor([[40, 40, 0, 0, 32, 32]] * 6)
        expected = pipeline.unet(
            batch.latents, 500, tokens, added_cond_kwargs={"text_embeds": pooled, "time_ids": ids}
        ).sample
    torch.testing.assert_close(output, expected, atol=0.02, rtol=0.02)
    assert np.isfinite(output.numpy()).all()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "pad 'none': SDXL attends to all positions of its text, padding included. Use pad 'encoder'."),
        (("--pad", "masked"), "pad 'masked': SDXL attends to all positions"),
        (("--pad", "encoder", "--max-tokens", 40), "max_tokens 40: SDXL's text has always 77 positions."),
    ],
)
def test_what_sdxl_does_not_take_is_one_line(
    words: tuple[Any, ...], message: str, empty: Path, captioned: Any, command: Any, sdxl_folder: Path
) -> None:
    captioned(empty / "photos", 2)
    error = command("encode", "photos", "--out", "s", "--text-encoder", sdxl_folder, *words).refused()
    assert error.startswith(message)
    assert not (empty / "s").exists()


def test_sdxls_text_is_added_to_a_store_by_a_command(
    empty: Path, captioned: Any, command: Any, sdxl_folder: Path
) -> None:
    captioned(empty / "photos", 4)
    assert command("encode", "photos", "--out", "s").code == 0
    words = ("--text-encoder", sdxl_folder, "--pad", "encoder", "--name", "xl")
    assert command("store", "add", "s", *words).code == 0
    loader = Loader(Store.open("s").drawing(["xl"]), size=32, batch_size=4, seed=0, extra=("pooled",))
    (batch,) = loader.batches(0, 4)
    assert (batch.text.shape, batch.extra["pooled"].shape) == ((4, 77, 40), (4, 20))
