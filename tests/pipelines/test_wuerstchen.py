"""The whole cascade: diffusers' pictures for the same weights, sizes, and stages that do not fit."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable
from pathlib import Path
from runpy import run_path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC, DiffusionPipeline
from diffusers.pipelines.deprecated import wuerstchen as theirs
from torch import Tensor

import shoestring
from shoestring.errors import CheckpointError
from shoestring.models.autoencoders import decode_latents, encoder_fingerprint, scale_latents
from shoestring.models.latent_previewer import LatentPreviewer
from shoestring.models.text_encoders import HashingTextEncoder
from shoestring.models.wuerstchen_autoencoder import WuerstchenAutoencoder
from shoestring.models.wuerstchen_decoder import WuerstchenDiffNeXt
from shoestring.models.wuerstchen_prior import WuerstchenPrior
from shoestring.pipelines.export import export
from shoestring.pipelines.generate import generate, warn_cut_prompts
from shoestring.pipelines.shim import write_shim
from shoestring.pipelines.wuerstchen import WuerstchenCombinedPipeline
from shoestring.pipelines.wuerstchen_sizes import cells, fit_size, scaled_cells, whole_multiple

Noise = Callable[..., Tensor]

QUICK = {"height": 128, "width": 128, "prior_num_inference_steps": 2, "num_inference_steps": 2}
DRAWN_ONLY_BY_STAGE_C = ("decoder", "vqgan", "scheduler", "text_encoder", "tokenizer")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ours(cascade: Any, **changes: Any) -> WuerstchenCombinedPipeline:
    pipeline = WuerstchenCombinedPipeline(**{**cascade.all_parts(cascade.ours), **changes})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def original(cascade: Any) -> Any:
    pipeline = theirs.WuerstchenCombinedPipeline(**cascade.all_parts(cascade.theirs))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def on_autoencoder(cascade: Any, vae: torch.nn.Module, **changes: Any) -> WuerstchenCombinedPipeline:
    """A pipeline as a run of ours has it: an autoencoder in place of decoder and vqgan."""
    parts = dict.fromkeys(DRAWN_ONLY_BY_STAGE_C)
    return ours(cascade, **{**parts, "vae": vae, **changes})


@pytest.fixture
def autoencoder(cascade: Any, compressor: Any) -> WuerstchenAutoencoder:
    model = WuerstchenAutoencoder.from_parts(
        cascade.ours["vqgan"], cascade.ours["decoder"], compressor, decode_steps=2
    )
    model.set_statistics([0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0])
    return model.eval()


@pytest.fixture
def dc() -> AutoencoderDC:
    """A small AutoencoderDC of 8 px a cell."""
    torch.manual_seed(0)
    blocks = {"encoder_block_types": "ResBlock", "decoder_block_types": "ResBlock"}
    layers = {"encoder_layers_per_block": (1,) * 4, "decoder_layers_per_block": (1,) * 4}
    widths = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    scales = {"encoder_qkv_multiscales": ((),) * 4, "decoder_qkv_multiscales": ((),) * 4}
    return AutoencoderDC(
        latent_channels=4, attention_head_dim=4, scaling_factor=0.5, **blocks, **layers, **widths, **scales
    ).eval()


def pixels(pipeline: DiffusionPipeline, *given: Any, seed: int = 0, **call: Any) -> Tensor:
    return pipeline(*given, **{"generator": seeded(seed), "output_type": "pt", **call}).images


# --- diffusers' pictures ---------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("negative", [None, "green"])
@pytest.mark.parametrize("guidance", [{}, {"prior_guidance_scale": 0.0}, {"decoder_guidance_scale": 2.0}])
def test_prompts_give_diffusers_pictures(
    cascade: Any, count: int, negative: str | None, guidance: dict[str, float]
) -> None:
    call = {**QUICK, "prompt": "a red circle", "negative_prompt": negative, "num_images_per_prompt": count}
    call |= guidance
    latents = [pixels(each(cascade), **call, output_type="latent") for each in (ours, original)]
    assert latents[0].shape == (count, 4, 32, 32)
    assert (latents[0] - latents[1]).abs().max() <= 1e-5 * latents[1].abs().max()
    pictures = [pixels(each(cascade), **call) for each in (ours, original)]
    assert torch.allclose(*pictures, atol=1e-5)
    assert pictures[0].shape == (count, 3, 128, 128)


def test_embeddings_and_explicit_times_give_diffusers_pictures(cascade: Any, noise: Noise) -> None:
    call = {
        "prompt_embeds": noise(1, 1, 5, 16),
        "negative_prompt_embeds": noise(2, 1, 5, 16),
        "prior_timesteps": [1.0, 0.6, 0.2, 0.0],
        "decoder_timesteps": [1.0, 0.3, 0.0],
        "latents": noise(3, 2, 4, 3, 6),
        "num_images_per_prompt": 2,
        "height": 128,
        "width": 256,
    }
    pictures = [pixels(each(cascade), **call) for each in (ours, original)]
    assert pictures[0].shape == (2, 3, 128, 256)
    assert torch.allclose(*pictures, atol=1e-5)


def test_sizes_steps_and_guidance_not_given_are_diffusers(cascade: Any) -> None:
    pipeline, seen = ours(cascade), []

    def watch(pipe: Any, step: int, time: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append((pipe.guidance_scale, pipe.num_timesteps, tuple(tensors["latents"].shape[2:])))
        return {}

    pipeline("a", prior_callback_on_step_end=watch, callback_on_step_end=watch, output_type="latent")
    assert seen == [(4.0, 60, (12, 12))] * 60 + [(0.0, 12, (128, 128))] * 12


# --- several pictures ------------------------------------------------------------------------------------


def test_each_picture_of_many_prompts_is_the_one_drawn_alone(cascade: Any) -> None:
    pipeline = ours(cascade)
    prompts, negatives = ["a red circle", "b"], ["c", "d"]
    call = {**QUICK, "decoder_guidance_scale": 2.0}
    many = pixels(
        pipeline,
        prompts,
        negative_prompt=negatives,
        num_images_per_prompt=2,
        generator=[seeded(seed) for seed in range(4)],
        **call,
    )
    for row in range(4):
        alone = pixels(
            pipeline,
            prompts[row // 2],
            negative_prompt=negatives[row // 2],
            generator=[seeded(row)],
            **call,
        )
        assert torch.allclose(many[row : row + 1], alone, atol=1e-5)


def test_generate_draws_each_prompt_with_its_own_seed(cascade: Any) -> None:
    pipeline = ours(cascade, sample_size=3, decoder_steps=2, default_steps=2)
    together = list(generate(pipeline, ["a", "b"], [3, 4], steps=3, guidance=1.5))
    (alone,) = generate(pipeline, ["b"], [4], steps=3, guidance=1.5)
    assert np.abs(np.asarray(together[1].image).astype(int) - np.asarray(alone.image)).max() <= 1
    assert alone.settings() == {
        "prompt": "b",
        "seed": 4,
        "steps": 3,
        "guidance": 1.5,
        "scheduler": "DDPMWuerstchenScheduler",
    }
    call = {"prior_num_inference_steps": 3, "prior_guidance_scale": 1.5, "generator": [seeded(4)]}
    assert alone.image.tobytes() == pipeline("b", **call).images[0].tobytes()
    assert alone.image.size == (128, 128)
    (usual,) = generate(pipeline, ["b"], [4])
    assert (usual.steps, usual.guidance) == (2, 4.0)
    assert len(warn_cut_prompts(pipeline, ["a", "a red circle, a blue square"])) == 1


# --- with an autoencoder ---------------------------------------------------------------------------------


def test_an_autoencoder_decodes_stage_cs_codes(cascade: Any, autoencoder: WuerstchenAutoencoder) -> None:
    pipeline = on_autoencoder(cascade, autoencoder)
    assert pipeline.size_multiple == 128
    assert pipeline.config.latents_std == [1.0, 2.0, 3.0, 4.0]
    call = {"height": 256, "width": 128, "prior_num_inference_steps": 2}
    codes = pixels(pipeline, "a", **call, output_type="latent")
    assert codes.shape == (1, 4, 6, 3)
    with torch.no_grad():
        wanted = autoencoder.decode(codes).sample.clamp(-1, 1) / 2 + 0.5
    assert torch.allclose(pixels(pipeline, "a", **call), wanted, atol=1e-5)
    assert pipeline("a", **call).images[0].size == (128, 256)


def test_another_autoencoder_takes_its_place(cascade: Any, dc: AutoencoderDC) -> None:
    pipeline = on_autoencoder(cascade, dc, sample_size=4)
    assert pipeline.size_multiple == 8
    codes = pixels(pipeline, "a", prior_num_inference_steps=2, output_type="latent")
    latents = pipeline.prior_pipe.normalize(codes)
    assert codes.shape == (1, 4, 4, 4)
    assert torch.allclose(latents, codes * 0.5, atol=1e-6)
    wanted = decode_latents(dc, scale_latents(dc, codes)) / 2 + 0.5
    assert torch.allclose(pixels(pipeline, "a", prior_num_inference_steps=2), wanted, atol=1e-6)
    assert pixels(pipeline, "a", prior_num_inference_steps=1, height=24, width=40).shape == (1, 3, 24, 40)


def test_measured_statistics_take_the_place_of_the_autoencoders(
    cascade: Any, autoencoder: WuerstchenAutoencoder
) -> None:
    call = {"height": 128, "width": 128, "prior_num_inference_steps": 2, "output_type": "latent"}
    own = on_autoencoder(cascade, autoencoder)
    other = on_autoencoder(cascade, autoencoder, latents_mean=[0.0], latents_std=[2.0])
    latents = own.prior_pipe.normalize(pixels(own, "a", **call))
    assert torch.allclose(pixels(other, "a", **call), latents * 2, atol=1e-5)


def test_stage_bs_settings_have_no_effect_with_an_autoencoder_and_are_refused(
    cascade: Any, autoencoder: WuerstchenAutoencoder
) -> None:
    pipeline = on_autoencoder(cascade, autoencoder)
    for call in ({"num_inference_steps": 3}, {"decoder_guidance_scale": 2.0}, {"use_text": False}):
        with pytest.raises(ValueError, match=f"{next(iter(call))}: has no effect.*WuerstchenAutoencoder"):
            pipeline("a", **call)


# --- parts -----------------------------------------------------------------------------------------------


def test_the_decoder_works_without_text(cascade: Any) -> None:
    with_text = ours(cascade)
    without = ours(cascade, text_encoder=None, tokenizer=None, null_tokens=77)
    call = {**QUICK, "prompt": "a", "negative_prompt": "b"}
    assert torch.allclose(pixels(without, **call), pixels(with_text, **call, use_text=False), atol=1e-6)
    assert not torch.allclose(pixels(with_text, **call), pixels(without, **call), atol=1e-3)


def test_a_part_that_is_exchanged_is_the_one_used(cascade: Any) -> None:
    pipeline = ours(cascade)
    before = pixels(pipeline, "a", **QUICK)
    network = WuerstchenPrior.from_config(cascade.ours["prior"].config).eval()
    pipeline.prior_prior = network  # fresh: eps is what comes in
    after = pixels(pipeline, "a", **QUICK)
    assert not torch.allclose(before, after, atol=1e-3)
    assert torch.equal(after, pixels(ours(cascade, prior_prior=network), "a", **QUICK))


def test_previews_are_made_of_codes(cascade: Any, noise: Noise) -> None:
    pipeline = ours(cascade, previewer=LatentPreviewer(c_in=4, c_hidden=8).eval())
    assert [picture.size for picture in pipeline.preview(noise(0, 2, 4, 3, 6))] == [(48, 24)] * 2


@pytest.mark.parametrize("kind", ["published", "no text", "autoencoder", "hashes"])
def test_saving_and_opening_changes_no_picture(
    cascade: Any, autoencoder: WuerstchenAutoencoder, tmp_path: Path, kind: str
) -> None:
    numbers = {"latents_of": "abc", "decoder_latents_of": "abc", "sample_size": 3, "default_steps": 2}
    if kind == "published":
        pipeline = ours(cascade, decoder_steps=2, **numbers)
    elif kind == "no text":
        pipeline = ours(cascade, text_encoder=None, tokenizer=None, decoder_steps=2, **numbers)
    elif kind == "autoencoder":
        pipeline = on_autoencoder(cascade, autoencoder, **numbers)
    else:
        words = {"prior_text_encoder": HashingTextEncoder(width=16), "prior_tokenizer": None}
        pipeline = on_autoencoder(cascade, autoencoder, **words, text_pad="none", **numbers)
    pipeline.save_pretrained(tmp_path / "a")
    wanted = pixels(pipeline, "a red one")
    assert run_path(str(tmp_path / "a" / "pipeline.py"))["WuerstchenCombinedPipeline"] is type(pipeline)
    alone = WuerstchenCombinedPipeline.from_pretrained(tmp_path / "a", low_cpu_mem_usage=False)
    for each in (alone, shoestring.load(tmp_path / "a")):
        each.set_progress_bar_config(disable=True)
        assert isinstance(each, WuerstchenCombinedPipeline)
        assert torch.equal(pixels(each, "a red one"), wanted)
        assert {name: each.config[name] for name in numbers} == numbers


def test_plain_diffusers_finds_one_class_however_many_exports_it_opens(cascade: Any, tmp_path: Path) -> None:
    """It runs every pipeline.py in the same module, and refuses one with two pipelines in it."""
    pipeline = ours(cascade)
    names: dict[str, Any] = {}
    for each in (pipeline, pipeline.prior_pipe, pipeline.decoder_pipe):
        write_shim(each, tmp_path)
        names = run_path(str(tmp_path / "pipeline.py"), names)
        assert [name for name in names if name.endswith("Pipeline")] == [type(each).__name__]
        assert names[type(each).__name__] is type(each)


def test_an_export_brings_stage_c_up_to_date(cascade: Any, tmp_path: Path) -> None:
    network = WuerstchenPrior.from_config(cascade.ours["prior"].config).eval()
    pipeline = ours(cascade, prior_prior=network)
    export(pipeline, tmp_path / "a", ("prior_prior",))
    torch.nn.init.ones_(network.out[1].bias)
    export(pipeline, tmp_path / "a", ("prior_prior",))
    opened = shoestring.load(tmp_path / "a")
    opened.set_progress_bar_config(disable=True)
    assert torch.equal(pixels(opened, "a", **QUICK), pixels(pipeline, "a", **QUICK))


# --- stages that do not fit ------------------------------------------------------------------------------


def test_stages_of_two_compressors_are_refused_by_their_fingerprints(cascade: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="compressor 123abc, decoder or vae reads those of 456def"):
        ours(cascade, latents_of="123abc", decoder_latents_of="456def")
    ours(cascade, latents_of="123abc")  # a published decoder does not say
    pipeline = ours(cascade, latents_of="123abc", decoder_latents_of="123abc")
    pipeline.save_pretrained(tmp_path / "a")
    with pytest.raises(CheckpointError, match="compressor 123abc, decoder or vae reads those of 456def"):
        shoestring.load(tmp_path / "a", decoder_latents_of="456def")


def test_a_compressor_or_autoencoder_of_other_weights_than_the_priors_is_refused(
    cascade: Any, autoencoder: WuerstchenAutoencoder, compressor: Any, dc: AutoencoderDC
) -> None:
    makers: list[tuple[Any, Callable[..., Any]]] = [
        (compressor, lambda **numbers: ours(cascade, compressor=compressor, **numbers)),
        (autoencoder, lambda **numbers: on_autoencoder(cascade, autoencoder, **numbers)),
        (dc, lambda **numbers: on_autoencoder(cascade, dc, **numbers)),
    ]
    for network, make in makers:
        own = encoder_fingerprint(network)
        assert make(latents_of=own).config.decoder_latents_of == own
        with pytest.raises(CheckpointError, match=f"compressor 123abc, .* reads those of {own}"):
            make(latents_of="123abc")
    fresh = WuerstchenDiffNeXt.from_config(autoencoder.decoder.config)  # another decoder, the same codes
    other = WuerstchenAutoencoder.from_parts(autoencoder.vqgan, fresh, compressor)
    on_autoencoder(cascade, other, latents_of=encoder_fingerprint(autoencoder))


@pytest.mark.parametrize("missing", ["decoder", "vqgan", "scheduler", "prior_prior"])
def test_a_missing_stage_is_named(cascade: Any, missing: str) -> None:
    with pytest.raises(CheckpointError, match=f"{missing}.*missing"):
        ours(cascade, **{missing: None})


def test_stages_of_other_widths_are_refused(
    cascade: Any, autoencoder: WuerstchenAutoencoder, dc: AutoencoderDC
) -> None:
    wide = WuerstchenPrior(c_in=6, c=16, c_cond=16, c_r=8, depth=1, nhead=2)
    with pytest.raises(CheckpointError, match="makes codes of 6 channels, decoder takes 4"):
        ours(cascade, prior_prior=wide)
    for vae in (autoencoder, dc):
        with pytest.raises(CheckpointError, match="makes codes of 6 channels, vae takes 4"):
            on_autoencoder(cascade, vae, prior_prior=wide)
    with pytest.raises(CheckpointError, match="Give one or the others"):
        ours(cascade, vae=dc)


# --- sizes -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs_in_diffusers(cascade: Any) -> Callable[[int], int | None]:
    """`run(side)`: the side of what diffusers' decoder makes when asked for that; None: it fails."""

    @torch.no_grad()
    def run(side: int) -> int | None:
        count = math.ceil(side / 42.67)
        latents = int(count * 10.67)
        try:
            cascade.theirs["decoder"](
                torch.zeros(1, 4, 32, latents),
                r=torch.zeros(1),
                effnet=torch.zeros(1, 4, 3, count),
                clip=torch.zeros(1, 1, 12),
            )
        except RuntimeError:
            return None
        return latents * 4

    return run


@pytest.mark.parametrize("side", [*range(64, 1345, 64), 1000, 1088, 1536])
def test_a_size_is_taken_exactly_where_diffusers_makes_it(
    side: int, runs_in_diffusers: Callable[[int], int | None]
) -> None:
    if runs_in_diffusers(side) == side:
        assert fit_size(side, side, 128) == (side, side)
        assert cells(side, 42.67) == math.ceil(side / 42.67)
        assert scaled_cells(cells(side, 42.67), 10.67) * 4 == side
    else:
        with pytest.raises(ValueError, match="nearest"):
            fit_size(128, side, 128)
        height, width = fit_size(side, side, 128, "round")
        assert height == width == runs_in_diffusers(width)
        assert abs(width - side) <= 64


@pytest.mark.parametrize(
    ("cell", "multiple"), [(42.67, 128), (128 / 3, 128), (64 / 3, 64), (21.33, 64), (32, 32), (8, 8), (1, 1)]
)
def test_the_multiple_of_a_ladder_follows_from_its_cell(cell: float, multiple: int) -> None:
    assert whole_multiple(cell) == multiple
    for times in range(1, 40):
        assert cells(multiple * times, cell) == round(multiple * times / cell)


@pytest.mark.parametrize(
    ("scale", "unit", "latents"),
    [(10.67, 3, 32), (32 / 3, 3, 32), (5.3333, 3, 16), (16 / 3, 3, 16), (8, 1, 8)],
)
def test_a_rounded_scale_loses_no_latent(scale: float, unit: int, latents: int) -> None:
    """int(3 x 5.3333) would be 15."""
    for times in range(1, 30):
        assert scaled_cells(unit * times, scale) == latents * times


def test_the_cascade_asks_for_sizes_that_every_stage_can_make(cascade: Any) -> None:
    pipeline = ours(cascade)
    assert pipeline.size_multiple == 128
    for height, width in itertools.product((128, 576), (128, 1000)):
        if (height, width) != (128, 128):
            with pytest.raises(ValueError, match="must be multiples of 128") as caught:
                pipeline("a", height=height, width=width)
            assert "\n" not in str(caught.value)


def test_a_size_may_be_rounded_when_asked(cascade: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "shoestring"):
        made = pixels(ours(cascade), "a", **{**QUICK, "width": 200}, resolution="round")
    assert made.shape == (1, 3, 128, 256)
    assert "128 x 200: made at 128 x 256" in caplog.text
    assert len(caplog.records) == 1


@pytest.mark.parametrize(("form", "kind"), [("jpg", "unknown"), ("pt", None), ("np", None), ("pil", None)])
def test_output_types_are_diffusers(cascade: Any, form: str, kind: str | None) -> None:
    if kind:
        with pytest.raises(ValueError, match="Use pil, np, pt, latent"):
            ours(cascade)("a", **QUICK, output_type=form)
        return
    (images,) = ours(cascade)("a", **QUICK, generator=seeded(), output_type=form, return_dict=False)
    wanted = pixels(ours(cascade), "a", **QUICK)[0].permute(1, 2, 0).numpy()
    got = np.asarray(images[0].permute(1, 2, 0) if form == "pt" else images[0])
    assert np.allclose(got / (255 if form == "pil" else 1), wanted, atol=0.002 if form == "pil" else 0)
