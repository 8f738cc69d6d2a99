"""Stage C's pipeline: diffusers' numbers for the same weights and generator, and what it refuses."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from runpy import run_path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMWuerstchenScheduler
from diffusers.pipelines.deprecated import wuerstchen as theirs
from PIL import Image
from torch import Tensor

import shoestring
from shoestring.models.latent_previewer import LatentPreviewer
from shoestring.models.text_encoders import HashingTextEncoder
from shoestring.models.wuerstchen_prior import WuerstchenPrior
from shoestring.pipelines.wuerstchen_prior import (
    DEFAULT_STAGE_C_TIMESTEPS,
    PUBLISHED_STAGE_C_TIMESTEPS,
    WuerstchenPriorPipeline,
)

PROMPTS = ["a red circle", "a blue square, left"]
LONG = "a red circle, a blue square"


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ours(cascade: Any, **changes: Any) -> WuerstchenPriorPipeline:
    pipeline = WuerstchenPriorPipeline(**{**cascade.prior_parts(cascade.ours), **changes})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def original(cascade: Any) -> Any:
    pipeline = theirs.WuerstchenPriorPipeline(**cascade.prior_parts(cascade.theirs))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def assert_close(mine: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    """Equal up to `tolerance` of the largest number."""
    assert mine.shape == wanted.shape
    assert (mine - wanted).abs().max() <= tolerance * wanted.abs().max()


def on_hashes(**changes: Any) -> WuerstchenPriorPipeline:
    """A pipeline as a run of ours has it: hashed words, unpadded, measured statistics."""
    torch.manual_seed(0)
    network = WuerstchenPrior(c_in=3, c=16, c_cond=8, c_r=8, depth=2, nhead=2)
    for name, parameter in network.named_parameters():
        torch.nn.init.normal_(parameter, std=0.02 if name.startswith("out.") else 0.1)
    numbers = {
        "resolution_multiple": 64 / 3,
        "latents_mean": [1.0, 2.0, 3.0],
        "latents_std": [0.5, 2.0, 4.0],
        "text_pad": "none",
        "sample_size": 3,
        "default_steps": 2,
        "default_guidance": 2.0,
    }
    pipeline = WuerstchenPriorPipeline(
        None,
        HashingTextEncoder(width=8, max_tokens=6),
        network.eval(),
        DDPMWuerstchenScheduler(),
        **{**numbers, **changes},
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# --- diffusers' numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("guidance", [0.0, 1.0, 4.0])
@pytest.mark.parametrize(
    "times", [{"num_inference_steps": 2}, {"timesteps": [1.0, 0.7, 0.3, 0.0]}], ids=["steps", "times"]
)
def test_embeddings_give_diffusers_latents(
    cascade: Any, noise: Callable[..., Tensor], count: int, guidance: float, times: dict[str, Any]
) -> None:
    call = {
        "prompt_embeds": noise(1, 2, 5, 16),
        "height": 128,
        "width": 256,
        "guidance_scale": guidance,
        "num_images_per_prompt": count,
        **times,
    }
    negative = {"negative_prompt_embeds": noise(2, 2, 5, 16)}
    mine = ours(cascade)(**call, **negative, generator=seeded()).image_embeddings
    if guidance <= 1:
        negative = {}  # diffusers would put them below the text all the same, and fail
    wanted = original(cascade)(**call, **negative, generator=seeded()).image_embeddings
    assert mine.shape == (2 * count, 4, 3, 6)
    assert_close(mine, wanted)


@pytest.mark.parametrize(
    "negative", [None, "green", ["green", "a, b"]], ids=["empty string", "one", "one for each"]
)
@pytest.mark.parametrize("count", [1, 2])
def test_prompts_give_diffusers_latents(cascade: Any, negative: Any, count: int) -> None:
    call = {"prompt": PROMPTS, "height": 128, "width": 128, "num_images_per_prompt": count}
    call |= {"num_inference_steps": 2, "guidance_scale": 3.0}
    # diffusers wants as many negative prompts as prompts
    whole = [negative] * 2 if isinstance(negative, str) else negative
    mine = ours(cascade)(**call, negative_prompt=negative, generator=seeded()).image_embeddings
    wanted = original(cascade)(**call, negative_prompt=whole, generator=seeded()).image_embeddings
    assert_close(mine, wanted)


def test_a_prompt_that_is_too_long_is_cut_as_diffusers_cuts_it_and_told(
    cascade: Any, caplog: pytest.LogCaptureFixture
) -> None:
    call = {"prompt": LONG, "height": 128, "width": 128, "num_inference_steps": 1, "guidance_scale": 1.0}
    pipeline = ours(cascade)
    with caplog.at_level(logging.WARNING, "shoestring"):
        mine = pipeline(**call, generator=seeded()).image_embeddings
    assert [record.getMessage() for record in caplog.records] == pipeline.cut_prompts([LONG])
    assert "it takes 16" in caplog.text
    assert_close(mine, original(cascade)(**call, generator=seeded()).image_embeddings)


def test_given_noise_and_a_generator_for_each_picture_are_diffusers(
    cascade: Any, noise: Callable[..., Tensor]
) -> None:
    call = {"prompt": PROMPTS, "height": 128, "width": 128, "num_inference_steps": 2}
    call |= {"latents": noise(3, 2, 4, 3, 3)}
    mine = ours(cascade)(**call, generator=[seeded(5), seeded(6)]).image_embeddings
    assert_close(mine, original(cascade)(**call, generator=[seeded(5), seeded(6)]).image_embeddings)


def test_named_times_are_the_lists(cascade: Any) -> None:
    pipeline = ours(cascade)
    call = {"prompt": PROMPTS[0], "height": 128, "width": 128, "guidance_scale": 1.0}
    wanted = {"default": DEFAULT_STAGE_C_TIMESTEPS, "published": PUBLISHED_STAGE_C_TIMESTEPS}
    known = theirs.pipeline_wuerstchen_prior.DEFAULT_STAGE_C_TIMESTEPS
    assert np.allclose(DEFAULT_STAGE_C_TIMESTEPS, known, atol=1e-12)
    for name, times in wanted.items():
        named = pipeline(**call, timesteps=name, generator=seeded()).image_embeddings
        assert pipeline.num_timesteps == {"default": 29, "published": 30}[name]
        listed = pipeline(**call, timesteps=times, generator=seeded()).image_embeddings
        assert torch.equal(named, listed)


# --- our own runs ----------------------------------------------------------------------------------------


def test_unpadded_prompts_do_not_depend_on_their_neighbours() -> None:
    pipeline = on_hashes()
    both = pipeline(["red", "a blue square in a corner"], generator=[seeded(1), seeded(2)])
    alone = pipeline("red", generator=[seeded(1)])
    assert_close(both.image_embeddings[:1], alone.image_embeddings)


def test_codes_have_the_measured_statistics_and_the_size_trained_at() -> None:
    pipeline = on_hashes()
    codes = pipeline("red", generator=seeded()).image_embeddings
    latents = pipeline("red", generator=seeded(), output_type="latent").image_embeddings
    assert codes.shape == (1, 3, 3, 3)
    mean, std = torch.tensor([1.0, 2.0, 3.0])[:, None, None], torch.tensor([0.5, 2.0, 4.0])[:, None, None]
    assert torch.allclose(codes, latents * std + mean)
    assert torch.allclose(pipeline.normalize(codes), latents, atol=1e-6)
    array = pipeline("red", generator=seeded(), output_type="np").image_embeddings
    assert np.array_equal(array, codes.numpy())


def test_published_codes_are_scaled_as_published(cascade: Any, noise: Callable[..., Tensor]) -> None:
    latents = noise(0, 1, 4, 3, 3)
    assert torch.allclose(ours(cascade).denormalize(latents), latents * 42 - 1)


def test_a_null_caption_is_the_encoded_empty_string_and_not_zeros(cascade: Any) -> None:
    pipeline = ours(cascade)
    text, mask = pipeline.encode_prompt(PROMPTS, torch.device("cpu"))
    assert mask is None
    empty, _ = pipeline.encode_prompt("", torch.device("cpu"), do_classifier_free_guidance=False)
    assert torch.equal(text[2:], empty.expand(2, -1, -1))
    assert empty.abs().min(dim=-1).values.max() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_networks_see_float32_times_and_steps_stay_float32(cascade: Any, dtype: torch.dtype) -> None:
    sizes = {
        key: cascade.ours["prior"].config[key] for key in ("c_in", "c", "c_cond", "c_r", "depth", "nhead")
    }
    network = WuerstchenPrior(**sizes)
    network.load_state_dict(cascade.ours["prior"].state_dict())
    pipeline = ours(cascade, prior=network.eval().to(dtype))
    seen: list[Tensor] = []
    network.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    call = {"prompt": PROMPTS[0], "height": 128, "width": 128, "timesteps": "published"}
    codes = pipeline(**call, guidance_scale=1.0, generator=seeded()).image_embeddings
    assert codes.dtype == torch.float32
    times = torch.cat(seen)
    assert times.dtype == torch.float32
    assert torch.equal(times, torch.tensor(PUBLISHED_STAGE_C_TIMESTEPS[:-1]))
    whole = ours(cascade)(**call, guidance_scale=1.0, generator=seeded()).image_embeddings
    assert (codes - whole).square().mean().sqrt() < 0.05 * whole.std()


# --- callbacks -------------------------------------------------------------------------------------------


def test_a_callback_sees_each_step_and_what_it_gives_back_counts(cascade: Any) -> None:
    pipeline, seen = ours(cascade), []
    zero = {"prompt": PROMPTS, "height": 128, "width": 128, "num_inference_steps": 3}

    def watch(pipe: Any, step: int, time: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append((step, round(float(time), 4), sorted(tensors)))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 2 else {}

    names = ["latents", "text_encoder_hidden_states", "negative_prompt_embeds"]
    codes = pipeline(
        **zero, callback_on_step_end=watch, callback_on_step_end_tensor_inputs=names
    ).image_embeddings
    assert seen == [(i, time, sorted(names)) for i, time in enumerate([1.0, 0.6667, 0.3333])]
    assert torch.equal(codes, torch.full_like(codes, -1.0))


def test_a_callback_that_replaces_text_or_guidance_does_what_diffusers_does(cascade: Any) -> None:
    call = {"prompt": PROMPTS, "height": 128, "width": 128, "num_inference_steps": 4, "guidance_scale": 5.0}

    def cut(pipe: Any, step: int, time: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        if step != 1:
            return {}
        pipe._guidance_scale = 0.0
        return {"text_encoder_hidden_states": 2 * tensors["text_encoder_hidden_states"].chunk(2)[0]}

    call |= {
        "callback_on_step_end": cut,
        "callback_on_step_end_tensor_inputs": ["text_encoder_hidden_states"],
    }
    mine = ours(cascade)(**call, generator=seeded()).image_embeddings
    assert_close(mine, original(cascade)(**call, generator=seeded()).image_embeddings)


def test_an_interrupt_stops_after_the_step() -> None:
    pipeline, steps = on_hashes(), []

    def stop(pipe: Any, step: int, time: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        pipe._interrupt = True
        return {}

    pipeline("red", num_inference_steps=5, callback_on_step_end=stop)
    assert steps == [0]
    assert pipeline.current_timestep is None


def test_previews_are_the_previewers_pictures_of_codes() -> None:
    torch.manual_seed(0)
    previewer = LatentPreviewer(c_in=3, c_hidden=8).eval()
    pipeline, seen = on_hashes(previewer=previewer), []

    def look(pipe: Any, step: int, time: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.extend(pipe.preview(tensors["latents"], normalized=True))
        return {}

    codes = pipeline("red", generator=seeded(), callback_on_step_end=look).image_embeddings
    (last,) = pipeline.preview(codes)
    wanted = previewer(codes)[0].permute(1, 2, 0)
    assert isinstance(last, Image.Image)
    assert np.array_equal(np.asarray(last), (wanted.detach().numpy() * 255).round().astype(np.uint8))
    assert [picture.size for picture in seen] == [(24, 24)] * 2
    assert np.array_equal(np.asarray(seen[-1]), np.asarray(last))
    with pytest.raises(ValueError, match="no previewer"):
        on_hashes().preview(codes)


# --- saved -----------------------------------------------------------------------------------------------


def test_saving_and_opening_changes_no_code(cascade: Any, tmp_path: Path) -> None:
    pipeline = ours(cascade, latents_of="abc", sample_size=3)
    pipeline.save_pretrained(tmp_path / "a")
    call: dict[str, Any] = {"prompt": PROMPTS, "num_inference_steps": 2}
    wanted = pipeline(**call, generator=seeded()).image_embeddings
    assert run_path(str(tmp_path / "a" / "pipeline.py"))["WuerstchenPriorPipeline"] is type(pipeline)
    alone = WuerstchenPriorPipeline.from_pretrained(tmp_path / "a", low_cpu_mem_usage=False)
    for each in (alone, shoestring.load(tmp_path / "a")):
        each.set_progress_bar_config(disable=True)
        assert isinstance(each, WuerstchenPriorPipeline)
        assert each.config.latents_of == "abc"
        assert torch.equal(each(**call, generator=seeded()).image_embeddings, wanted)


def test_a_pipeline_of_hashed_words_opens_again(tmp_path: Path) -> None:
    pipeline = on_hashes(previewer=LatentPreviewer(c_in=3, c_hidden=8).eval())
    pipeline.save_pretrained(tmp_path / "a")
    opened = shoestring.load(tmp_path / "a")
    opened.set_progress_bar_config(disable=True)
    codes = [each("a red one", generator=seeded()).image_embeddings for each in (pipeline, opened)]
    assert torch.equal(*codes)
    assert [p.tobytes() for p in opened.preview(codes[0])] == [
        p.tobytes() for p in pipeline.preview(codes[0])
    ]


# --- refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "match"),
    [
        ({"height": 576}, "height 512 or 640"),
        ({"width": 1000}, "width 896 or 1024"),
        ({"height": 100, "width": 64}, "height 128, width 128"),
        ({"height": 0}, "height x width 0 x 128"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt 0: must be at least 1"),
        ({"num_images_per_prompt": 2, "generator": [torch.Generator()] * 3}, "3 generators for 2 pictures"),
        ({"height": 576, "resolution": "crop"}, "Use refuse or round"),
        ({"prompt_embeds": torch.zeros(1, 2, 16)}, "Give either prompt or prompt_embeds"),
        ({"prompt": []}, "at least one prompt"),
        ({"prompt": None}, "Give either prompt or prompt_embeds"),
        ({"negative_prompt": ["a", "b", "c"]}, "3 negative prompts for 1 prompts"),
        ({"num_inference_steps": 0}, "num_inference_steps 0"),
        ({"num_inference_steps": 2.5}, "whole number"),
        ({"timesteps": [0.0, 1.0]}, "must fall"),
        ({"timesteps": [2.0, 0.0]}, "must fall"),
        ({"timesteps": [1.0]}, "at least two"),
        ({"timesteps": "fast"}, "Use default, published"),
        ({"guidance_scale": float("nan")}, "finite"),
        ({"output_type": "pil"}, "Use pt, np, latent"),
        ({"latents": torch.zeros(1, 4, 2, 2)}, r"must be \(1, 4, 3, 3\)"),
        ({"callback_on_step_end_tensor_inputs": ["colour"]}, "colour"),
    ],
)
def test_what_cannot_be_made_is_refused_in_a_line(cascade: Any, call: dict[str, Any], match: str) -> None:
    usual = {"prompt": "a", "height": 128, "width": 128, "num_inference_steps": 1, "guidance_scale": 2.0}
    with pytest.raises(ValueError, match=match) as caught:
        ours(cascade)(**{**usual, **call})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("asked", "made"), [(576, 640), (1000, 1024), (60, 128), (1088, 1152), (512, 512)])
def test_rounding_takes_the_nearest_size_and_says_so(
    cascade: Any, asked: int, made: int, caplog: pytest.LogCaptureFixture
) -> None:
    call = {"prompt": "a", "height": 128, "width": asked, "num_inference_steps": 1, "guidance_scale": 1.0}
    with caplog.at_level(logging.WARNING, "shoestring"):
        codes = ours(cascade)(**call, resolution="round").image_embeddings
    assert codes.shape[2:] == (3, made * 3 // 128)
    assert (f"made at 128 x {made}" in caplog.text) == (asked != made)
