"""Pipelines around a U-Net: ours against the stock ones and against training, stock ones in diffusers."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.pipelines.stable_diffusion_xl import pipeline_stable_diffusion_xl as stock_module
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import shoestring
from shoestring.errors import RecipeError
from shoestring.interfaces import Batch
from shoestring.models.autoencoders import PixelAutoencoder
from shoestring.models.text_encoders import TextEncoder, collate
from shoestring.models.unet_lora_training import add_lora, lora_state, merged
from shoestring.objectives.noise import Conditioning
from shoestring.pipelines.export import export
from shoestring.pipelines.unet import UNetPipeline, make_unet_pipeline
from shoestring.sampling.schedulers import NOISE, make_noise_scheduler
from tests.pipelines import stock_parts as parts

PROMPTS = ["a red circle", "a blue square in the top left on a white background"]
Pixels = np.ndarray[Any, Any]


def make(unet: Any, text: TextEncoder, vae: Any, *, scheduler: str = "euler", **changes: Any) -> Any:
    """`make_unet_pipeline` with a recipe's numbers, quiet."""
    prediction = changes.pop("prediction", "epsilon")
    settings: dict[str, Any] = {
        "null": "zeros",
        "steps": 3,
        "guidance": 2.5,
        "size": parts.SIZE,
        "max_tokens": text.max_tokens,
        "pad": text.pad,
        **changes,
    }
    sampler = make_noise_scheduler(scheduler, parts.SCHEDULE, prediction=prediction)
    pipeline = make_unet_pipeline(unet, text=text, vae=vae, scheduler=sampler, **settings)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sdxl(**changes: Any) -> Any:
    return make(parts.sdxl_unet(), parts.sdxl_text(), parts.kl(), **changes)


def stable_diffusion(**changes: Any) -> Any:
    return make(parts.unet(), parts.clip_text(), parts.kl(), **{"null": "empty", **changes})


def scenes(**changes: Any) -> UNetPipeline:
    """The demo's kind: pixels, hashed text, SDXL's added conditions."""
    channels = {"in_channels": 3, "out_channels": 3}
    unet = parts.unet(added=parts.WIDTH, **channels, **changes.pop("unet", {}))
    pipeline = make(unet, parts.hashed_text(), PixelAutoencoder(), **{"prediction": "sample", **changes})
    assert isinstance(pipeline, UNetPipeline)
    return pipeline


def draw(pipeline: Any, prompt: Any = PROMPTS, seed: int = 0, **more: Any) -> Pixels:
    generator = torch.Generator().manual_seed(seed)
    return np.asarray(pipeline(prompt, generator=generator, output_type="np", **more).images)


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Ours against the stock pipelines


@pytest.mark.parametrize("scheduler", NOISE)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_zero_guidance_is_sdxls_own_bit_for_bit(scheduler: str, prediction: str) -> None:
    """The same latents and embeddings give the stock SDXL pipeline's picture, by every scheduler."""
    stock = sdxl(scheduler=scheduler, prediction=prediction)
    states, null, pooled, null_pooled = stock.encode_prompt(PROMPTS)
    assert not null.any()
    assert not null_pooled.any()
    ours = UNetPipeline(stock.unet, stock.vae, stock.text_encoder, stock.scheduler)
    ours.set_progress_bar_config(disable=True)
    same: dict[str, Any] = {
        "prompt_embeds": states,
        "pooled_prompt_embeds": pooled,
        "latents": noise(1, 2, 4, 8, 8),
        "num_inference_steps": 4,
        "guidance_scale": 3.5,
        "output_type": "np",
    }
    nothing = {"negative_prompt_embeds": null, "negative_pooled_prompt_embeds": null_pooled}
    theirs = stock(**same, **nothing, generator=torch.Generator().manual_seed(2)).images
    assert theirs.std() > 0.01
    assert np.array_equal(ours(**same, generator=torch.Generator().manual_seed(2)).images, theirs)


@pytest.mark.parametrize("guidance", [0.0, 1.0, 4.0])
def test_stable_diffusions_text_and_null_give_its_pictures(guidance: float) -> None:
    """Prompts as words, CLIP, the encoded empty caption: `UNetPipeline` is the stock pipeline."""
    stock = stable_diffusion()
    ours = UNetPipeline(
        stock.unet,
        stock.vae,
        stock.text_encoder,
        stock.scheduler,
        stock.tokenizer,
        null="empty",
        text_pad="encoder",
    )
    ours.set_progress_bar_config(disable=True)
    how: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": guidance}
    theirs = draw(stock, **how)
    assert theirs.std() > 0.01
    assert np.allclose(draw(ours, **how), theirs, atol=1e-5)
    assert np.allclose(
        draw(ours, negative_prompt="green", **how),
        draw(stock, negative_prompt=["green"] * 2, **how),
        atol=1e-5,
    )


def test_a_network_that_is_told_the_guidance_is_told_it_as_by_sdxls_pipeline() -> None:
    """One evaluation a step, the scale embedded: latent consistency models with `time_cond_proj_dim`."""
    stock = make(parts.sdxl_unet(time_cond_proj_dim=8), parts.sdxl_text(), parts.kl(), scheduler="lcm")
    states, _, pooled, _ = stock.encode_prompt(PROMPTS)
    ours = UNetPipeline(stock.unet, stock.vae, stock.text_encoder, stock.scheduler)
    ours.set_progress_bar_config(disable=True)
    pictures = []
    for guidance in (1.5, 8.0):
        same: dict[str, Any] = {
            "prompt_embeds": states,
            "pooled_prompt_embeds": pooled,
            "latents": noise(1, 2, 4, 8, 8),
            "num_inference_steps": 2,
            "guidance_scale": guidance,
            "output_type": "np",
        }
        theirs = stock(**same, generator=torch.Generator().manual_seed(2)).images
        pictures.append(ours(**same, generator=torch.Generator().manual_seed(2)).images)
        assert np.array_equal(pictures[-1], theirs)
    assert not np.allclose(*pictures, atol=1e-3)


# Ours against training


@pytest.mark.parametrize("null", ["zeros", "empty"])
def test_the_network_is_told_what_training_told_it(null: str) -> None:
    """Outputs on the pipeline's arguments equal those on `Conditioning`'s of a batch, text and null alike."""
    pipeline = scenes(null=null)
    text = parts.hashed_text()
    states, mask = collate(text.encode(PROMPTS).tokens)
    side = float(parts.SIZE)
    batch = Batch(
        index=torch.arange(2),
        latents=noise(1, 2, 3, 16, 16),
        text=states,
        text_mask=mask,
        extra={"size_crop": torch.tensor([[side, side, 0, 0, side, side]]).expand(2, -1)},
    )
    empty = text.encode([""]).tokens[0] if null == "empty" else None
    conditioning = Conditioning(pipeline.unet.config, null=null, null_text=empty)

    seen: list[tuple[Tensor, Any, dict[str, Any]]] = []
    pipeline.unet.register_forward_pre_hook(
        lambda _, given, named: seen.append((given[0], given[1], named)), with_kwargs=True
    )
    draw(pipeline, num_inference_steps=1, guidance_scale=3.0)
    (z, t, told) = seen[0]
    with torch.no_grad():
        (both,) = pipeline.unet(z, t, **told)
        (text_only,) = pipeline.unet(z[:2], t, **conditioning(batch, train=False), return_dict=False)
        (null_only,) = pipeline.unet(z[2:], t, **conditioning.unconditional(batch), return_dict=False)
    assert torch.allclose(both[:2], null_only, atol=1e-5)
    assert torch.allclose(both[2:], text_only, atol=1e-5)
    assert not torch.allclose(text_only, null_only, atol=1e-3)


def test_a_picture_counts_as_its_own_original_whatever_its_size() -> None:
    pipeline = scenes()
    seen: list[Tensor] = []
    pipeline.unet.register_forward_pre_hook(
        lambda _, __, named: seen.append(named["added_cond_kwargs"]["time_ids"]), with_kwargs=True
    )
    draw(pipeline, height=24, width=40)
    assert all(ids.tolist() == [[24, 40, 0, 0, 24, 40]] * 4 for ids in seen)


# What diffusers' users expect of ours


@pytest.fixture
def pipeline() -> UNetPipeline:
    return scenes()


def test_output_types_are_diffusers(pipeline: UNetPipeline) -> None:
    array = draw(pipeline, PROMPTS[0])
    assert array.shape == (1, 16, 16, 3)
    pil = pipeline(PROMPTS[0], generator=torch.Generator().manual_seed(0)).images[0]
    assert isinstance(pil, Image.Image)
    assert np.array_equal(np.asarray(pil), (array[0] * 255).round().astype(np.uint8))
    tensor = pipeline(PROMPTS[0], generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert np.allclose(tensor.permute(0, 2, 3, 1).numpy(), array)
    (latents,) = pipeline(
        PROMPTS[0], generator=torch.Generator().manual_seed(0), output_type="latent", return_dict=False
    )
    assert np.allclose((latents.permute(0, 2, 3, 1).numpy() / 2 + 0.5).clip(0, 1), array, atol=1e-6)


def test_saving_and_opening_changes_no_picture(pipeline: UNetPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path / "saved")
    opened = shoestring.load(tmp_path / "saved")
    assert isinstance(opened, UNetPipeline)
    assert dict(opened.config)["default_guidance"] == 2.5
    assert opened.unet.config.mid_block_type is None
    assert np.array_equal(draw(pipeline), draw(opened))


def test_plain_diffusers_opens_an_export_when_told_to_trust_it(
    pipeline: UNetPipeline, tmp_path: Path
) -> None:
    pipeline.save_pretrained(tmp_path / "saved")
    opened = DiffusionPipeline.from_pretrained(
        tmp_path / "saved", custom_pipeline=str(tmp_path / "saved" / "pipeline.py"), trust_remote_code=True
    )
    assert np.array_equal(draw(pipeline), draw(opened))


@pytest.mark.parametrize("null", ["zeros", "empty"])
def test_embeddings_of_encode_prompt_give_the_prompts_picture(null: str) -> None:
    pipeline = scenes(null=null)
    names = ("prompt_embeds", "prompt_attention_mask", "pooled_prompt_embeds")
    names += tuple(f"negative_{name}" for name in names)
    embeddings = dict(zip(names, pipeline.encode_prompt(PROMPTS), strict=True))
    assert np.array_equal(draw(pipeline, None, **embeddings), draw(pipeline))


def test_guidance_up_to_one_evaluates_the_text_alone(pipeline: UNetPipeline) -> None:
    rows: list[int] = []
    pipeline.unet.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    none, one = draw(pipeline, guidance_scale=0.0), draw(pipeline, guidance_scale=1.0)
    assert set(rows) == {2}
    assert np.array_equal(none, one)
    rows.clear()
    assert not np.allclose(draw(pipeline, guidance_scale=1.5), one, atol=1e-3)
    assert set(rows) == {4}


def test_several_pictures_of_a_prompt_lie_side_by_side(pipeline: UNetPipeline) -> None:
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    four = pipeline(PROMPTS, num_images_per_prompt=2, generator=generators, output_type="np").images
    assert four.shape == (4, 16, 16, 3)
    assert np.allclose(four[1], draw(pipeline, PROMPTS[0], seed=1)[0], atol=1e-4)
    assert np.allclose(four[2], draw(pipeline, PROMPTS[1], seed=2)[0], atol=1e-4)


def test_one_negative_prompt_serves_all_and_each_may_have_its_own(pipeline: UNetPipeline) -> None:
    one = draw(pipeline, negative_prompt="a green cross")
    assert not np.allclose(one, draw(pipeline), atol=1e-3)
    assert np.array_equal(one, draw(pipeline, negative_prompt=["a green cross"] * 2))
    with pytest.raises(ValueError, match="3 negative prompts for 2 prompts"):
        draw(pipeline, negative_prompt=["a"] * 3)


def test_callbacks_may_change_the_latents_or_stop(pipeline: UNetPipeline) -> None:
    seen = []

    def blacken(pipe: Any, number: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        seen.append((number, float(timestep)))
        return {"latents": given["latents"] * 0}

    assert np.allclose(draw(pipeline, callback_on_step_end=blacken), 0.5)
    assert seen == [(0, 999), (1, 666), (2, 332)]

    def stop(pipe: Any, number: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = True
        seen.append((number, float(timestep)))
        return given

    seen.clear()
    draw(pipeline, callback_on_step_end=stop)
    assert seen == [(0, 999)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": 0}, "must be at least 1"),
        ({"prompt": None}, "either prompt or prompt_embeds"),
        ({"prompt": []}, "at least one prompt"),
        ({"latents": torch.zeros(1, 3, 16, 16)}, "must be"),
        ({"callback_on_step_end_tensor_inputs": ["x"]}, "not among"),
        ({"generator": [torch.Generator()] * 3}, "3 generators for 2 pictures"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 3, 16)}, "wants pooled_prompt_embeds too"),
    ],
)
def test_wrong_arguments_say_what_is_wrong(
    arguments: dict[str, Any], message: str, pipeline: UNetPipeline
) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline(**{"prompt": PROMPTS, **arguments})


@pytest.mark.parametrize("null", ["zeros", "empty"])
def test_in_bfloat16_the_pictures_are_nearly_the_same(null: str) -> None:
    """Latents and the scheduler stay in float32, whatever the network's type."""
    pipeline = scenes(null=null)
    plain = draw(pipeline)
    half = draw(pipeline.to(torch.bfloat16))
    assert half.dtype == np.float32
    assert 0 < np.abs(half - plain).mean() < 0.02


def test_latents_of_another_scaling_are_brought_back_to_the_autoencoders() -> None:
    vae = parts.kl()
    pipeline = make(
        parts.unet(), parts.hashed_text(), vae, latents_mean=[1.0, 2, 3, 4], latents_std=[0.5, 1, 2, 4]
    )
    generator = torch.Generator().manual_seed(0)
    latents = pipeline(PROMPTS, generator=generator, output_type="latent").images
    raw = latents * torch.tensor([0.5, 1, 2, 4]).view(-1, 1, 1) + torch.tensor([1.0, 2, 3, 4]).view(-1, 1, 1)
    with torch.no_grad():
        expected = (vae.decode(raw).sample / 2 + 0.5).clamp(0, 1)
    assert np.allclose(draw(pipeline).transpose(0, 3, 1, 2), expected.numpy(), atol=1e-5)


def test_an_adapter_is_loaded_as_diffusers_loads_them_and_taken_off_again(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    adapted = add_lora(parts.unet(), 2)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    save_file(lora_state(adapted), tmp_path / "pytorch_lora_weights.safetensors")
    pipeline, folded = (
        make(unet, parts.hashed_text(), parts.kl(), prediction="sample")
        for unet in (parts.unet(), merged(adapted))
    )
    plain = draw(pipeline)
    pipeline.load_lora_weights(tmp_path)
    assert np.allclose(draw(pipeline), draw(folded), atol=1e-4)
    assert not np.allclose(draw(pipeline), plain, atol=1e-2)
    pipeline.unload_lora_weights()
    assert np.array_equal(draw(pipeline), plain)


def test_text_may_be_encoded_without_the_network_and_drawn_without_the_encoder(
    pipeline: UNetPipeline, tmp_path: Path
) -> None:
    """What little memory asks for: one part after the other."""
    pipeline.save_pretrained(tmp_path / "saved")
    encoder = shoestring.load(tmp_path / "saved", unet=None, vae=None)
    names = ("prompt_embeds", "prompt_attention_mask", "pooled_prompt_embeds")
    names += tuple(f"negative_{name}" for name in names)
    embeddings = dict(zip(names, encoder.encode_prompt(PROMPTS), strict=True))
    artist = shoestring.load(tmp_path / "saved", text_encoder=None)
    artist.set_progress_bar_config(disable=True)
    assert np.array_equal(draw(artist, None, **embeddings), draw(pipeline))


# Which pipeline is made, and what opens it


def test_stock_parts_make_stock_pipelines_and_others_ours() -> None:
    kl, hashed = parts.kl(), parts.hashed_text()
    assert type(sdxl()) is StableDiffusionXLPipeline
    assert type(make(parts.sdxl_unet(), parts.sdxl_text(), parts.tiny())) is StableDiffusionXLPipeline
    assert type(stable_diffusion()) is StableDiffusionPipeline
    added = parts.unet(added=parts.WIDTH)
    assert type(make(added, parts.clip_text(), kl)) is UNetPipeline
    assert type(make(parts.unet(), hashed, kl)) is UNetPipeline
    assert type(make(parts.unet(), parts.clip_text(pad="none"), kl)) is UNetPipeline
    assert type(make(parts.unet(), parts.clip_text(max_tokens=8), kl)) is UNetPipeline


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda: stable_diffusion(null="zeros"), "Set objective.null_caption=empty."),
        (lambda: make(parts.unet(cross_attention_dim=32), parts.sdxl_text(), parts.kl()), r"\(here None\)"),
        (
            lambda: make(
                parts.sdxl_unet(in_channels=3, out_channels=3), parts.sdxl_text(), PixelAutoencoder()
            ),
            r"its own scaling \(here PixelAutoencoder\)",
        ),
        (lambda: sdxl(latents_mean=[0.0] * 4, latents_std=[1.0] * 4), "normalise: autoencoder"),
        (lambda: sdxl(size=15), "15"),
    ],
)
def test_parts_that_a_stock_pipeline_would_not_sample_as_trained_are_refused(
    make_it: Any, message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        make_it()


@pytest.mark.parametrize("null", ["zeros", "empty"])
def test_an_exported_sdxl_opens_in_stock_diffusers(null: str, tmp_path: Path) -> None:
    """Stock classes and AutoPipeline, the mid block none, the null caption and the pictures kept."""
    pipeline = sdxl(null=null)
    export(pipeline, tmp_path / "pipeline", ("unet",))
    for opener in (StableDiffusionXLPipeline, AutoPipelineForText2Image):
        opened = opener.from_pretrained(tmp_path / "pipeline")
        opened.set_progress_bar_config(disable=True)
        assert type(opened) is StableDiffusionXLPipeline
        assert opened.unet.config.mid_block_type is None
        assert opened.unet.mid_block is None
        assert opened.config.force_zeros_for_empty_prompt == (null == "zeros")
        how: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 3.0}
        assert np.array_equal(draw(opened, **how), draw(pipeline, **how))


def test_an_exported_sdxl_gives_image_to_image_and_inpainting(tmp_path: Path) -> None:
    export(sdxl(), tmp_path / "pipeline", ("unet",))
    opened = StableDiffusionXLPipeline.from_pretrained(tmp_path / "pipeline")
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    mask = Image.fromarray(np.pad(np.full((8, 16), 255, np.uint8), ((8, 0), (0, 0))))
    how: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 2.0, "output_type": "np"}
    how |= {"image": picture, "height": 16, "width": 16}
    for each in (
        StableDiffusionXLImg2ImgPipeline(**opened.components),
        AutoPipelineForImage2Image.from_pipe(opened),
    ):
        each.set_progress_bar_config(disable=True)
        named = {name: how[name] for name in how if name not in {"height", "width"}}
        (little,) = each(PROMPTS[0], strength=0.25, **named).images
        (much,) = each(PROMPTS[0], strength=1.0, **named).images
        assert little.shape == much.shape == (16, 16, 3)
        assert not np.allclose(little, much, atol=1e-2)
    for each in (
        StableDiffusionXLInpaintPipeline(**opened.components),
        AutoPipelineForInpainting.from_pipe(opened),
    ):
        each.set_progress_bar_config(disable=True)
        (filled,) = each(PROMPTS[0], mask_image=mask, strength=0.99, **how).images
        assert filled.shape == (16, 16, 3)


def test_an_exported_stable_diffusion_opens_in_stock_diffusers(tmp_path: Path) -> None:
    pipeline = stable_diffusion()
    export(pipeline, tmp_path / "pipeline", ("unet",))
    opened = AutoPipelineForText2Image.from_pretrained(tmp_path / "pipeline")
    opened.set_progress_bar_config(disable=True)
    assert type(opened) is StableDiffusionPipeline
    assert opened.unet.mid_block is None
    assert np.array_equal(draw(opened, num_inference_steps=2), draw(pipeline, num_inference_steps=2))


def test_no_watermark_is_drawn_wherever_an_export_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else pictures would depend on whether a machine has the package."""
    export(sdxl(), tmp_path / "pipeline", ("unet",))
    monkeypatch.setattr(stock_module, "is_invisible_watermark_available", lambda: True)
    monkeypatch.setattr(stock_module, "StableDiffusionXLWatermarker", object, raising=False)
    assert StableDiffusionXLPipeline.from_pretrained(tmp_path / "pipeline").watermark is None
    assert sdxl().watermark is None


def test_a_later_export_brings_the_unet_up_to_date_and_keeps_the_numbers(tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    pipeline = sdxl()
    export(pipeline, folder, ("unet",))
    for parameter in itertools.islice(pipeline.unet.parameters(), 4):
        parameter.data.mul_(2)
    export(pipeline, folder, ("unet",))
    opened = shoestring.load(folder)
    opened.set_progress_bar_config(disable=True)
    assert np.array_equal(draw(opened, num_inference_steps=2), draw(pipeline, num_inference_steps=2))
    assert json.loads((folder / "sampling.json").read_text()) == {"steps": 3, "guidance": 2.5}
