"""Stage B and A's pipeline: diffusers' numbers for the same weights, and what diffusers cannot do."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from runpy import run_path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMWuerstchenScheduler, DiffusionPipeline
from diffusers.pipelines.deprecated import wuerstchen as theirs
from PIL import Image
from torch import Tensor

import shoestring
from shoestring.models.wuerstchen_decoder import WuerstchenDiffNeXt
from shoestring.models.wuerstchen_vqgan import PaellaVQModel
from shoestring.pipelines.wuerstchen_decoder import WuerstchenDecoderPipeline

Noise = Callable[..., Tensor]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ours(cascade: Any, **changes: Any) -> WuerstchenDecoderPipeline:
    pipeline = WuerstchenDecoderPipeline(**{**cascade.decoder_parts(cascade.ours), **changes})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def without_text(cascade: Any, **changes: Any) -> WuerstchenDecoderPipeline:
    return ours(cascade, text_encoder=None, tokenizer=None, **changes)


def original(cascade: Any) -> Any:
    pipeline = theirs.WuerstchenDecoderPipeline(**cascade.decoder_parts(cascade.theirs))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def latents_of(pipeline: DiffusionPipeline, *given: Any, seed: int = 0, **call: Any) -> Tensor:
    return pipeline(*given, **{"generator": seeded(seed), "output_type": "latent", **call}).images


def assert_close(mine: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    """Equal up to `tolerance` of the largest number."""
    assert mine.shape == wanted.shape
    assert (mine - wanted).abs().max() <= tolerance * wanted.abs().max()


# --- diffusers' numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("codes", [1, 2])
@pytest.mark.parametrize("guidance", [0.0, 3.0])
@pytest.mark.parametrize("negative", [None, "green"])
@pytest.mark.parametrize(
    "times", [{"num_inference_steps": 2}, {"timesteps": [1.0, 0.7, 0.3, 0.0]}], ids=["steps", "times"]
)
def test_codes_and_a_prompt_give_diffusers_latents(
    cascade: Any, noise: Noise, codes: int, guidance: float, negative: str | None, times: dict[str, Any]
) -> None:
    call = {"prompt": "a red circle", "negative_prompt": negative, "guidance_scale": guidance, **times}
    code = noise(1, codes, 4, 3, 6)
    mine = latents_of(ours(cascade), code, **call)
    assert mine.shape == (codes, 4, 32, 64)
    assert_close(mine, latents_of(original(cascade), code, **call))


def test_pictures_are_diffusers_in_every_form(cascade: Any, noise: Noise) -> None:
    pipelines = ours(cascade), original(cascade)
    call: dict[str, Any] = {"image_embeddings": noise(1, 2, 4, 3, 3), "prompt": "a", "num_inference_steps": 1}
    for form in ("pt", "np", "pil"):
        mine, wanted = (each(**call, generator=seeded(), output_type=form).images for each in pipelines)
        assert np.allclose(np.asarray(mine[1]), np.asarray(wanted[1]), atol=1 if form == "pil" else 1e-5)
        assert type(mine) is type(wanted)
    assert np.asarray(mine[0]).std() > 1
    assert mine[0].size == (128, 128)


def test_lists_arrays_given_noise_and_a_generator_each_are_diffusers(cascade: Any, noise: Noise) -> None:
    codes = noise(1, 2, 4, 3, 3)
    call = {"prompt": "a", "num_inference_steps": 2, "latents": noise(2, 2, 4, 32, 32)}
    wanted = latents_of(original(cascade), codes, **call, generator=[seeded(5), seeded(6)])
    for form in (codes, codes.numpy(), list(codes.split(1))):
        assert_close(latents_of(ours(cascade), form, **call, generator=[seeded(5), seeded(6)]), wanted)


def test_text_given_as_states_is_the_prompts(cascade: Any, noise: Noise) -> None:
    pipeline, code = ours(cascade), noise(1, 1, 4, 3, 3)
    states, _ = pipeline.encode_prompt("a red one", torch.device("cpu"), do_classifier_free_guidance=False)
    call = {"num_inference_steps": 2, "guidance_scale": 2.0}
    wanted = latents_of(pipeline, code, prompt="a red one", **call)
    assert torch.equal(latents_of(pipeline, code, prompt_embeds=states, **call), wanted)


# --- several pictures, where diffusers fails -------------------------------------------------------------


def test_each_picture_of_many_prompts_is_the_one_drawn_alone(cascade: Any, noise: Noise) -> None:
    pipeline, codes = ours(cascade), noise(1, 2, 4, 3, 3)
    call = {"num_inference_steps": 2, "guidance_scale": 2.0}
    prompts = ["a red circle", "b"]
    many = latents_of(
        pipeline,
        codes,
        prompt=prompts,
        negative_prompt=["c", "d"],
        num_images_per_prompt=2,
        generator=[seeded(seed) for seed in range(4)],
        **call,
    )
    for row in range(4):
        alone = latents_of(
            pipeline,
            codes[row // 2 : row // 2 + 1],
            prompt=prompts[row // 2],
            negative_prompt="cd"[row // 2],
            generator=[seeded(row)],
            **call,
        )
        assert_close(many[row : row + 1], alone)


# --- without text ----------------------------------------------------------------------------------------


def test_the_published_decoder_without_text_sees_77_zeros(cascade: Any, noise: Noise) -> None:
    code = noise(1, 1, 4, 3, 3)
    call = {"num_inference_steps": 2}
    wanted = latents_of(ours(cascade), code, prompt_embeds=torch.zeros(1, 77, 12), **call)
    assert_close(latents_of(ours(cascade), code, use_text=False, **call), wanted)
    assert_close(latents_of(without_text(cascade, null_tokens=77), code, **call), wanted)


def test_a_decoder_of_no_text_attends_to_the_picture_alone(cascade: Any, noise: Noise) -> None:
    code, start = noise(1, 1, 4, 3, 3), noise(2, 1, 4, 32, 32)
    mine = latents_of(without_text(cascade), code, timesteps=[1.0, 0.0], latents=start)
    scheduler = DDPMWuerstchenScheduler()
    scheduler.set_timesteps(timesteps=[1.0, 0.0])
    with torch.no_grad():
        predicted = cascade.ours["decoder"](start, torch.ones(1), code)
    assert_close(mine, scheduler.step(predicted, torch.ones(1), start).prev_sample)
    zeros = latents_of(without_text(cascade, null_tokens=3), code, timesteps=[1.0, 0.0], latents=start)
    assert (zeros - mine).abs().max() > 1e-3


def test_guidance_without_text_compares_the_code_with_zeros(cascade: Any, noise: Noise) -> None:
    code, start = noise(1, 1, 4, 3, 3), noise(2, 1, 4, 32, 32)
    call = {"timesteps": [1.0, 0.0], "latents": start}
    pipeline = without_text(cascade)
    guided = latents_of(pipeline, code, guidance_scale=3.0, **call)
    with_code, without = (latents_of(pipeline, each, **call) for each in (code, torch.zeros_like(code)))
    assert_close(guided, torch.lerp(without, with_code, 3.0))


# --- types -----------------------------------------------------------------------------------------------


def test_bfloat16_networks_see_float32_times_latents_and_codes(cascade: Any, noise: Noise) -> None:
    decoder = WuerstchenDiffNeXt.from_config(cascade.ours["decoder"].config)
    decoder.load_state_dict(cascade.ours["decoder"].state_dict())
    vqgan = PaellaVQModel.from_config(cascade.ours["vqgan"].config)
    vqgan.load_state_dict(cascade.ours["vqgan"].state_dict())
    pipeline = without_text(
        cascade, decoder=decoder.eval().to(torch.bfloat16), vqgan=vqgan.eval().to(torch.bfloat16)
    )
    seen: list[tuple[torch.dtype, ...]] = []
    times: list[Tensor] = []

    def watch(_: Any, args: tuple[Tensor, ...]) -> None:
        seen.append(tuple(each.dtype for each in args))
        times.append(args[1])

    decoder.register_forward_pre_hook(watch)
    code = noise(1, 1, 4, 3, 3)
    pictures = pipeline(code, num_inference_steps=12, generator=seeded(), output_type="pt").images
    assert set(seen) == {(torch.float32, torch.float32)}
    assert torch.equal(torch.cat(times), torch.linspace(1, 0, 13)[:-1])
    whole = without_text(cascade)(code, generator=seeded(), output_type="pt").images
    assert pictures.dtype == torch.float32
    assert (pictures - whole).abs().mean() < 0.02


# --- pictures in -----------------------------------------------------------------------------------------


def test_reconstructions_are_pictures_of_the_compressors_codes(cascade: Any, compressor: Any) -> None:
    pipeline = without_text(cascade, compressor=compressor)
    assert math.isclose(pipeline.config.latent_dim_scale, 32 / 3)
    assert pipeline.size_multiple == 128
    pictures = torch.rand(2, 3, 128, 256, generator=seeded())
    made = pipeline.reconstruct(pictures, generator=seeded(), output_type="pt").images
    with torch.no_grad():
        codes = compressor.compress(pictures)
    assert codes.shape == (2, 4, 3, 6)
    assert torch.equal(made, pipeline(codes, generator=seeded(), output_type="pt").images)
    image = Image.fromarray((pictures[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))
    assert pipeline.reconstruct(image, num_inference_steps=1).images[0].size == (256, 128)


def test_pictures_of_other_sizes_are_refused_or_resized_when_asked(cascade: Any, compressor: Any) -> None:
    pipeline = without_text(cascade, compressor=compressor)
    pictures = torch.rand(1, 3, 100, 250)
    with pytest.raises(ValueError, match="height 128, width 128 or 256"):
        pipeline.reconstruct(pictures)
    made = pipeline.reconstruct(pictures, resolution="round", num_inference_steps=1, output_type="pt").images
    assert made.shape == (1, 3, 128, 256)
    with pytest.raises(ValueError, match="no compressor"):
        without_text(cascade).reconstruct(pictures)


# --- callbacks, files, refusals --------------------------------------------------------------------------


def test_a_callback_may_replace_the_code_and_the_rest_follows(cascade: Any, noise: Noise) -> None:
    pipeline, first, second = without_text(cascade), noise(1, 1, 4, 3, 3), noise(2, 1, 4, 3, 3)
    seen: list[Tensor] = []

    def swap(pipe: Any, step: int, time: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(tensors["latents"])
        return {"image_embeddings": second} if step == 0 else {}

    names = ["latents", "image_embeddings"]
    swapped = latents_of(
        pipeline,
        first,
        timesteps=[1.0, 0.5, 0.0],
        callback_on_step_end=swap,
        callback_on_step_end_tensor_inputs=names,
    )
    after = latents_of(pipeline, second, timesteps=[0.5, 0.0], latents=seen[0])
    assert_close(swapped, after)
    assert (swapped - latents_of(pipeline, first, timesteps=[1.0, 0.5, 0.0])).abs().max() > 1e-3


@pytest.mark.parametrize("text", [True, False], ids=["text", "no text"])
def test_saving_and_opening_changes_no_picture(
    cascade: Any, compressor: Any, noise: Noise, tmp_path: Path, text: bool
) -> None:
    pipeline = (ours if text else without_text)(cascade, compressor=compressor, latents_of="abc")
    pipeline.save_pretrained(tmp_path / "a")
    call: dict[str, Any] = {"prompt": "a red circle" if text else None, "num_inference_steps": 2}
    wanted = latents_of(pipeline, noise(1, 1, 4, 3, 3), **call)
    assert run_path(str(tmp_path / "a" / "pipeline.py"))["WuerstchenDecoderPipeline"] is type(pipeline)
    alone = WuerstchenDecoderPipeline.from_pretrained(tmp_path / "a", low_cpu_mem_usage=False)
    for each in (alone, shoestring.load(tmp_path / "a")):
        each.set_progress_bar_config(disable=True)
        assert isinstance(each, WuerstchenDecoderPipeline)
        assert each.config.latents_of == "abc"
        assert each.config.null_tokens == (77 if text else 0)
        assert torch.equal(latents_of(each, noise(1, 1, 4, 3, 3), **call), wanted)
        assert each.reconstruct(torch.rand(1, 3, 128, 128), num_inference_steps=1).images[0].size == (
            128,
            128,
        )


@pytest.mark.parametrize(
    ("shape", "call", "match"),
    [
        ((1, 4, 25, 24), {}, "25 x 24 cells: both must be multiples of 3.*nearest: 24 x 24"),
        ((1, 4, 1, 3), {}, "nearest: 3 x 3"),
        ((1, 5, 3, 3), {}, r"must be \(B, 4, h, w\)"),
        ((4, 3, 3), {}, r"must be \(B, 4, h, w\)"),
        ((0, 4, 3, 3), {}, r"of shape \(0, 4, 3, 3\): must be"),
        ((3, 4, 3, 3), {"prompt": ["a", "b"]}, "2 prompts for 3 pictures"),
        ((1, 4, 3, 3), {"prompt": "a", "use_text": False}, "has no effect, use_text=False"),
        ((1, 4, 3, 3), {"prompt": "a", "prompt_embeds": torch.zeros(1, 2, 12)}, "Give either prompt"),
        ((1, 4, 3, 3), {"output_type": "jpg"}, "Use pil, np, pt, latent"),
        ((1, 4, 3, 3), {"num_inference_steps": 0}, "num_inference_steps 0"),
        ((1, 4, 3, 3), {"latents": torch.zeros(1, 4, 8, 8)}, r"must be \(1, 4, 32, 32\)"),
    ],
)
def test_what_cannot_be_made_is_refused_in_a_line(
    cascade: Any, noise: Noise, shape: tuple[int, ...], call: dict[str, Any], match: str
) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        ours(cascade)(noise(1, *shape), **call)
    assert "\n" not in str(caught.value)


def test_text_that_nobody_would_see_is_refused(cascade: Any, noise: Noise) -> None:
    pipeline, code = without_text(cascade), noise(1, 1, 4, 3, 3)
    for given in ({"prompt": "a"}, {"negative_prompt": "a"}):
        with pytest.raises(ValueError, match="no effect, this decoder has no text encoder"):
            pipeline(code, **given)
    with pytest.raises(ValueError, match="use_text=True"):
        pipeline(code, use_text=True)
