"""Another scheduler and a tiny decoder in a loaded pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, LCMScheduler

from shoestring.errors import RecipeError
from shoestring.models.autoencoders import PixelAutoencoder, scale_latents
from shoestring.pipelines.parts import use_scheduler, use_tiny_decoder
from shoestring.pipelines.unet import make_unet_pipeline
from shoestring.sampling.schedulers import make_noise_scheduler
from tests.pipelines import stock_parts as parts


def make(unet: Any, text: Any, vae: Any, prediction: str = "epsilon", **changes: Any) -> Any:
    settings: dict[str, Any] = {"null": "empty", "steps": 3, "guidance": 2.0, "size": parts.SIZE, **changes}
    pipeline = make_unet_pipeline(
        unet,
        text=text,
        vae=vae,
        scheduler=make_noise_scheduler("euler", parts.SCHEDULE, prediction=prediction),
        max_tokens=text.max_tokens,
        pad=text.pad,
        **settings,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


WIDTHS = ("encoder_block_out_channels", "decoder_block_out_channels")
BLOCKS = ("num_encoder_blocks", "num_decoder_blocks")
PIPELINES = {
    "sdxl": lambda **k: make(parts.sdxl_unet(), parts.sdxl_text(), parts.kl(), **k),
    "sd": lambda **k: make(parts.unet(), parts.clip_text(), parts.kl(), **k),
    "ours": lambda **k: make(parts.unet(), parts.hashed_text(), parts.kl(), **k),
}


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    parts.tiny().save_pretrained(tmp_path / "tiny")
    return str(tmp_path / "tiny")


def draw(pipeline: Any, output_type: str) -> Any:
    how = {"generator": torch.Generator().manual_seed(0), "num_inference_steps": 2}
    return pipeline("a red circle", output_type=output_type, **how).images


@pytest.mark.parametrize("kind", PIPELINES)
def test_a_tiny_decoder_is_given_the_latents_as_the_network_makes_them(kind: str, tiny: str) -> None:
    """Its factor is 1: it is trained on what AutoencoderKL's factor has scaled already."""
    pipeline = PIPELINES[kind]()
    use_tiny_decoder(pipeline, tiny)
    latents = draw(pipeline, "latent")
    with torch.no_grad():
        expected = (parts.tiny().decode(latents).sample / 2 + 0.5).clamp(0, 1)
    assert expected.std() > 1e-3
    assert np.allclose(draw(pipeline, "np").transpose(0, 3, 1, 2), expected.numpy(), atol=1e-6)


def test_a_pipelines_own_scaling_is_brought_to_what_the_tiny_decoder_reads(tiny: str) -> None:
    """(latents std + mean) are raw; the tiny one reads them as the AutoencoderKL scales them."""
    mean, std = [0.5, -1.0, 0.0, 2.0], [1.0, 2.0, 0.5, 4.0]
    vae = parts.kl(shift_factor=0.3)
    pipeline = make(parts.unet(), parts.hashed_text(), vae, latents_mean=mean, latents_std=std)
    use_tiny_decoder(pipeline, tiny)
    latents = draw(pipeline, "latent")
    raw = latents * torch.tensor(std).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)
    with torch.no_grad():
        expected = (parts.tiny().decode(scale_latents(vae, raw)).sample / 2 + 0.5).clamp(0, 1)
    assert np.allclose(draw(pipeline, "np").transpose(0, 3, 1, 2), expected.numpy(), atol=1e-5)


def test_a_tiny_decoder_takes_the_type_and_place_of_the_one_it_replaces(tiny: str) -> None:
    pipeline = PIPELINES["sdxl"]().to(torch.bfloat16)
    use_tiny_decoder(pipeline, tiny)
    assert pipeline.vae.dtype == torch.bfloat16
    assert draw(pipeline, "np").shape == (1, 16, 16, 3)


@pytest.mark.parametrize(
    ("autoencoder", "message"),
    [
        (lambda: parts.kl(), "is of class AutoencoderKL, not AutoencoderTiny"),
        (lambda: parts.tiny(latent_channels=16), r"reads 16 channels at 1/2 of the size, the pipeline's"),
        (
            lambda: parts.tiny(**dict.fromkeys(WIDTHS, (8,) * 3), **dict.fromkeys(BLOCKS, (1,) * 3)),
            r"reads 4 channels at 1/4 of the size, the pipeline's latents have 4 at 1/2",
        ),
    ],
)
def test_a_decoder_of_other_latents_is_refused(autoencoder: Any, message: str, tmp_path: Path) -> None:
    autoencoder().save_pretrained(tmp_path / "other")
    pipeline = PIPELINES["sdxl"]()
    old = pipeline.vae
    with pytest.raises(RecipeError, match=message):
        use_tiny_decoder(pipeline, str(tmp_path / "other"))
    assert pipeline.vae is old
    with pytest.raises(
        RecipeError, match=r"--tiny-decoder .*gone: no autoencoder .* Give an AutoencoderTiny"
    ):
        use_tiny_decoder(pipeline, str(tmp_path / "gone"))


def test_pipelines_without_an_autoencoder_to_replace_are_told(tiny: str) -> None:
    pixels = make(parts.unet(in_channels=3, out_channels=3), parts.hashed_text(), PixelAutoencoder())
    with pytest.raises(RecipeError, match="this UNetPipeline has a PixelAutoencoder"):
        use_tiny_decoder(pixels, tiny)
    by_channel = make(
        parts.unet(), parts.hashed_text(), parts.kl(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    )
    with pytest.raises(RecipeError, match="scales latents by channel"):
        use_tiny_decoder(by_channel, tiny)


@pytest.mark.parametrize("kind", PIPELINES)
def test_another_scheduler_keeps_the_schedule_and_the_prediction(kind: str) -> None:
    pipeline = PIPELINES[kind](prediction="v_prediction")
    before = pipeline.scheduler.alphas_cumprod
    for name, expected in (("dpm++", DPMSolverMultistepScheduler), ("lcm", LCMScheduler)):
        use_scheduler(pipeline, name)
        assert type(pipeline.scheduler) is expected
        assert pipeline.scheduler.config.prediction_type == "v_prediction"
        assert torch.equal(pipeline.scheduler.alphas_cumprod, before)
        assert np.isfinite(draw(pipeline, "np")).all()


@pytest.mark.parametrize("name", ["lcm", "tcd"])
def test_a_few_step_network_keeps_the_times_it_was_distilled_at(name: str) -> None:
    """4 steps of 20 times 50 apart, by the pipeline's own scheduler and by one put in its place."""
    pipeline = PIPELINES["ours"]()
    pipeline.scheduler = LCMScheduler(**parts.SCHEDULE, original_inference_steps=20)
    use_scheduler(pipeline, name)
    pipeline.scheduler.set_timesteps(4)
    assert pipeline.scheduler.timesteps.tolist() == [999, 749, 499, 249]
    pipeline.scheduler.set_timesteps(8)
    assert pipeline.scheduler.timesteps.tolist() == [999, 899, 749, 649, 499, 399, 249, 149]


def test_a_scheduler_of_another_kind_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"'flow_euler': does not fit prediction epsilon. Use euler, ddim"):
        use_scheduler(PIPELINES["sdxl"](), "flow_euler")
