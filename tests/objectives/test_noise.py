"""The discrete schedules against diffusers' own, and what a U-Net is told against diffusers' pipeline."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.training_utils import compute_snr
from torch import Tensor
from torch.nn import functional as F

from shoestring.errors import CheckpointError, RecipeError
from shoestring.interfaces import Batch
from shoestring.objectives.denoising import held_out_noise
from shoestring.objectives.noise import (
    Conditioning,
    NoiseObjective,
    NoiseSchedule,
    check_weight,
    pool_tokens,
)
from shoestring.runtime import keyed_normal

SDXL_NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ZERO_SNR = {**SDXL_NOISE, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
PREDICTIONS = ("epsilon", "v_prediction", "sample")
SMALL: dict[str, Any] = {
    "sample_size": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 10 + 6 * 4,
}
PLAIN = {key: value for key, value in SMALL.items() if not key.startswith(("addition", "projection"))}


def make_unet(config: dict[str, Any] = SMALL, **changes: Any) -> UNet2DConditionModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DConditionModel(**(config | changes))


def make_batch(count: int = 4, first: int = 0, *, masked: bool = False) -> Batch:
    """5 tokens of text, 12 wide; with a mask 1 to 5 of them real and no pooled text (12 is its width)."""
    index = torch.arange(first, first + count)
    mask = torch.arange(5) <= (index % 5)[:, None]
    text = keyed_normal(7, "text", index, (5, 12))
    sizes = torch.tensor([64, 96, 0, 16, 48, 32]).repeat(count, 1) + index[:, None]
    pooled = {} if masked else {"pooled": keyed_normal(7, "pooled", index, (10,))}
    return Batch(
        index=index,
        latents=keyed_normal(7, "latents", index, (4, 8, 8)),
        text=text * mask[:, :, None] if masked else text,
        text_mask=mask if masked else None,
        extra={**pooled, "size_crop": sizes},
    )


def triple(count: int = 10) -> tuple[Tensor, Tensor, Tensor]:
    """Images, noise, and times that include both ends."""
    index = torch.arange(count)
    times = torch.linspace(0, 999, count).long()
    return keyed_normal(0, "x0", index, (4, 8, 8)), keyed_normal(0, "eps", index, (4, 8, 8)), times


@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "squaredcos_cap_v2", "laplace", "sigmoid"])
def test_noising_and_targets_are_diffusers_own(betas: str, rescaled: bool) -> None:
    config = {"beta_schedule": betas, "rescale_betas_zero_snr": rescaled, "prediction_type": "v_prediction"}
    ours, theirs = NoiseSchedule.from_config(config), DDPMScheduler(**config)
    x0, noise, t = triple()
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)
    assert torch.allclose(ours.add_noise(x0, noise, t), theirs.add_noise(x0, noise, t), rtol=0, atol=1e-6)
    assert torch.allclose(ours.target(x0, noise, t), theirs.get_velocity(x0, noise, t), rtol=0, atol=1e-6)


def test_the_other_targets_are_noise_and_image() -> None:
    x0, noise, t = triple()
    assert NoiseSchedule.from_config(SDXL_NOISE).target(x0, noise, t) is noise
    assert NoiseSchedule.from_config(SDXL_NOISE, "sample").target(x0, noise, t) is x0


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, DDIMScheduler, DPMSolverMultistepScheduler])
def test_any_scheduler_s_config_gives_its_own_schedule(scheduler: Any) -> None:
    """Trained betas too, and a length that is not 1000."""
    for config in (SDXL_NOISE, {"num_train_timesteps": 50}, {"trained_betas": [0.1, 0.2, 0.3]}):
        made = scheduler(**config)
        ours = NoiseSchedule.from_config(dict(made.config))
        assert torch.equal(ours.alphas_cumprod, made.alphas_cumprod)
        assert ours.prediction == "epsilon"


def test_a_schedule_is_real_numbers_where_networks_are_made_on_shapes_alone() -> None:
    with torch.device("meta"):
        schedule = NoiseSchedule.from_config(SDXL_NOISE)
    assert schedule.alphas_cumprod.device.type == "cpu"
    assert schedule.log_sigma(torch.zeros(3, dtype=torch.int64, device="meta")).device.type == "meta"
    assert schedule.log_sigma(torch.tensor([999])).item() == pytest.approx(2.6821, abs=1e-3)  # sigma 14.6


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_true_output_implies_the_image_and_the_noise(prediction: str) -> None:
    schedule = NoiseSchedule.from_config(SDXL_NOISE, prediction)
    theirs = DDPMScheduler(**SDXL_NOISE, prediction_type=prediction, clip_sample=False)
    x0, noise, t = triple()
    z, output = schedule.add_noise(x0, noise, t), schedule.target(x0, noise, t)
    assert torch.allclose(schedule.x0_of(output, z, t), x0, atol=1e-4)
    assert torch.allclose(schedule.noise_of(output, z, t), noise, atol=1e-4)
    wrong = output + 0.1 * keyed_normal(1, "error", torch.arange(len(t)), (4, 8, 8))
    step = [theirs.step(w, int(i), each) for w, i, each in zip(wrong, t, z, strict=True)]
    stepped = torch.stack([each.pred_original_sample for each in step])
    assert torch.allclose(schedule.x0_of(wrong, z, t), stepped, rtol=1e-4, atol=1e-5)
    again = schedule.add_noise(schedule.x0_of(wrong, z, t), schedule.noise_of(wrong, z, t), t)
    assert torch.allclose(again, z, atol=1e-4), "image and noise agree"


def test_at_zero_signal_the_noise_level_is_infinite_and_the_rest_finite() -> None:
    schedule = NoiseSchedule.from_config(ZERO_SNR)
    last = torch.tensor([999])
    assert schedule.sigma(last).item() == schedule.log_sigma(last).item() == float("inf")
    assert schedule.snr(last).item() == 0
    for kind in ("none", "min_snr", "x0"):
        assert schedule.weight(last, kind).isfinite().all()
    x0, noise, _ = triple(1)
    assert torch.equal(schedule.add_noise(x0, noise, last), noise)
    assert torch.equal(schedule.x0_of(-x0, noise, last), x0)
    assert torch.equal(schedule.noise_of(-x0, noise, last), noise)


@pytest.mark.parametrize("config", [SDXL_NOISE, ZERO_SNR])
def test_the_nearest_time_of_a_time_s_level_is_that_time(config: dict[str, Any]) -> None:
    schedule = NoiseSchedule.from_config(config)
    t = torch.arange(1000)
    assert torch.equal(schedule.nearest(schedule.log_sigma(t)), t)
    assert schedule.nearest(torch.tensor([-99.0, 99.0, float("inf"), -float("inf")])).tolist() == [
        0,
        999,
        999,
        0,
    ]
    between = schedule.log_sigma(torch.tensor([500, 501])) @ torch.tensor([0.6, 0.4])
    assert schedule.nearest(between[None]).item() == 500


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_weights_are_those_of_diffusers_scripts(prediction: str) -> None:
    schedule = NoiseSchedule.from_config(SDXL_NOISE, prediction)
    t = torch.arange(1000)
    snr = compute_snr(DDPMScheduler(**SDXL_NOISE), t)
    divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[prediction]
    for cap, given in ((5.0, None), (2.0, 2.0)):
        assert torch.allclose(schedule.weight(t, "min_snr", given), snr.clamp(max=cap) / divisor, rtol=1e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_x0_weight_makes_the_error_that_of_the_implied_image(prediction: str) -> None:
    schedule = NoiseSchedule.from_config(SDXL_NOISE, prediction)
    x0, noise, t = triple()
    z = schedule.add_noise(x0, noise, t)
    output = schedule.target(x0, noise, t) + keyed_normal(1, "error", torch.arange(len(t)), (4, 8, 8))
    error = (output - schedule.target(x0, noise, t)).square().mean(dim=(1, 2, 3))
    implied = (schedule.x0_of(output, z, t) - x0).square().mean(dim=(1, 2, 3))
    assert torch.allclose(schedule.weight(t, "x0") * error, implied, rtol=1e-3, atol=1e-6)
    capped = schedule.weight(t, "x0", 0.5)
    assert torch.allclose(capped, schedule.weight(t, "x0").clamp(max=0.5))
    assert torch.equal(schedule.weight(t, "none"), torch.ones(len(t)))


def test_uniform_numbers_draw_each_time_alike() -> None:
    schedule = NoiseSchedule.from_config(SDXL_NOISE)
    evenly = (torch.arange(2000) + 0.5) / 2000
    assert torch.equal(schedule.draw(evenly), torch.arange(1000).repeat_interleave(2))
    assert schedule.draw(torch.tensor([0.0, 1 - 2**-24])).tolist() == [0, 999]


@pytest.mark.parametrize("steps", [1, 2, 4, 7, 8, 10, 28])
def test_the_teacher_s_grid_is_diffusers_trailing_one(steps: int) -> None:
    euler = EulerDiscreteScheduler(**SDXL_NOISE, timestep_spacing="trailing")
    euler.set_timesteps(steps)
    assert NoiseSchedule.from_config(SDXL_NOISE).trailing(steps).tolist() == euler.timesteps.tolist()


def test_a_schedule_that_cannot_be_used_says_so() -> None:
    with pytest.raises(CheckpointError, match=r"beta_schedule 'wavy' is unknown. Use linear"):
        NoiseSchedule.from_config({"beta_schedule": "wavy"})
    with pytest.raises(CheckpointError, match="prediction_type 'flow_prediction' is unknown"):
        NoiseSchedule.from_config({**SDXL_NOISE, "prediction_type": "flow_prediction"})
    with pytest.raises(CheckpointError, match="'epsilon' cannot go with rescale_betas_zero_snr"):
        NoiseSchedule.from_config({**ZERO_SNR, "prediction_type": "epsilon"})
    with pytest.raises(RecipeError, match="teacher_steps 1001: the schedule has 1000 steps"):
        NoiseSchedule.from_config(SDXL_NOISE).trailing(1001)
    with pytest.raises(RecipeError, match=r"objective.weight 'p2': unknown. Use none, min_snr, x0"):
        check_weight("p2", None)
    with pytest.raises(RecipeError, match=r"objective.weight_cap 5: has no effect with weight none"):
        check_weight("none", 5.0)


def test_a_u_net_is_told_what_the_stock_pipeline_tells_it() -> None:
    """Both halves of guidance: the caption with its time ids, and zeros for no negative prompt."""
    unet, batch = make_unet(), make_batch(1)
    pipeline = StableDiffusionXLPipeline(
        vae=None, text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None, unet=unet,
        scheduler=EulerDiscreteScheduler(**SDXL_NOISE), force_zeros_for_empty_prompt=True,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    unet.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    size = batch.extra["size_crop"][0].tolist()
    pipeline(
        prompt_embeds=batch.text, pooled_prompt_embeds=batch.extra["pooled"], num_inference_steps=1,
        height=64, width=64, original_size=tuple(size[:2]), crops_coords_top_left=tuple(size[2:4]),
        target_size=tuple(size[4:]), guidance_scale=5.0, output_type="latent",
    )  # fmt: skip
    ((_, theirs),) = calls
    conditioning = Conditioning(SMALL)
    halves = [conditioning.unconditional(batch), conditioning(batch)]
    text = torch.cat([half["encoder_hidden_states"] for half in halves])
    assert torch.equal(text, theirs["encoder_hidden_states"])
    assert "encoder_attention_mask" not in halves[0]
    for name in ("text_embeds", "time_ids"):
        ours = torch.cat([half["added_cond_kwargs"][name] for half in halves])
        assert torch.equal(ours, theirs["added_cond_kwargs"][name])
    ids = pipeline._get_add_time_ids(tuple(size[:2]), tuple(size[2:4]), tuple(size[4:]), torch.float32, 10)
    assert torch.equal(halves[1]["added_cond_kwargs"]["time_ids"], ids)
    assert halves[1]["added_cond_kwargs"]["time_ids"].dtype == ids.dtype


def test_captions_are_dropped_by_their_place_in_the_run_and_never_when_looked_at() -> None:
    conditioning, batch = Conditioning(SMALL, caption_drop=0.3, seed=3), make_batch(400)
    given, kept, null = (
        conditioning(batch),
        conditioning(batch, train=False),
        conditioning.unconditional(batch),
    )
    dropped = (given["encoder_hidden_states"] == 0).all(dim=(1, 2))
    assert dropped.float().mean().item() == pytest.approx(0.3, abs=0.06)
    assert torch.equal(kept["encoder_hidden_states"], batch.text)
    for told in ("encoder_hidden_states", "text_embeds", "time_ids"):
        here, all_kept, all_dropped = (
            {**each, **each["added_cond_kwargs"]}[told] for each in (given, kept, null)
        )
        assert torch.equal(here[dropped], all_dropped[dropped])
        assert torch.equal(here[~dropped], all_kept[~dropped])
    assert not null["added_cond_kwargs"]["text_embeds"].any(), "pooled text goes with the text"
    assert torch.equal(null["added_cond_kwargs"]["time_ids"], batch.extra["size_crop"].float())
    part = conditioning(make_batch(100, first=50))
    assert torch.equal(part["encoder_hidden_states"], given["encoder_hidden_states"][50:150])


def test_without_a_pooled_state_the_scaled_mean_of_real_tokens_is_told() -> None:
    config = SMALL | {"projection_class_embeddings_input_dim": 12 + 6 * 4}
    batch = make_batch(5, masked=True)
    given = Conditioning(config)(batch)
    lengths = [1, 2, 3, 4, 5]
    expected = torch.stack([text[:n].mean(dim=0) for text, n in zip(batch.text, lengths, strict=True)])
    expected = expected / expected.pow(2).mean(dim=1, keepdim=True).sqrt()
    assert torch.allclose(given["added_cond_kwargs"]["text_embeds"], expected, atol=1e-5)
    assert torch.equal(given["encoder_attention_mask"], batch.text_mask)
    whole = pool_tokens(batch.text, None)
    assert torch.allclose(whole.pow(2).mean(dim=1), torch.ones(5), atol=1e-5)
    assert torch.allclose(F.cosine_similarity(whole, batch.text.mean(dim=1)), torch.ones(5))
    null = Conditioning(config).unconditional(batch)
    assert not null["added_cond_kwargs"]["text_embeds"].any()


def test_a_masked_caption_that_is_dropped_is_one_zero_token() -> None:
    """To the network: an image with it comes out as with a text of that one token and no mask."""
    config = PLAIN
    unet, batch = make_unet(config).eval(), make_batch(5, masked=True)
    null = Conditioning(config).unconditional(batch)
    assert null["encoder_attention_mask"].sum(dim=1).tolist() == [1] * 5
    t = torch.full((5,), 300)
    with torch.no_grad():
        masked = unet(batch.latents, t, **null).sample
        single = unet(batch.latents, t, torch.zeros(5, 1, 12)).sample
    assert torch.allclose(masked, single, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_a_dropped_caption_can_be_the_encoded_empty_one(masked: bool) -> None:
    empty, pooled = torch.randn(2 if masked else 5, 12), torch.randn(10)
    conditioning = Conditioning(
        SMALL, null="empty", null_text=empty, null_pooled=pooled, caption_drop=0.5, seed=1
    )
    batch = make_batch(40, masked=masked)
    batch = replace(batch, extra={**batch.extra, "pooled": keyed_normal(7, "pooled", batch.index, (10,))})
    given = conditioning(batch)
    dropped = (given["added_cond_kwargs"]["text_embeds"] == pooled).all(dim=1)
    assert 5 < dropped.sum() < 35
    assert (given["encoder_hidden_states"][dropped][:, : len(empty)] == empty).all()
    assert torch.equal(given["encoder_hidden_states"][~dropped], batch.text[~dropped])
    if masked:
        assert given["encoder_attention_mask"][dropped].sum(dim=1).unique().tolist() == [2]


def test_a_u_net_that_wants_more_or_other_text_is_refused() -> None:
    with pytest.raises(RecipeError, match="addition_embed_type 'image'"):
        Conditioning(PLAIN | {"addition_embed_type": "image"})
    with pytest.raises(RecipeError, match="class_embed_type 'timestep'"):
        Conditioning(PLAIN | {"class_embed_type": "timestep"})
    with pytest.raises(RecipeError, match="encoder_hid_dim_type 'image_proj'"):
        Conditioning(PLAIN | {"encoder_hid_dim_type": "image_proj"})
    with pytest.raises(RecipeError, match=r"objective.null_caption 'nothing': unknown. Use zeros or empty"):
        Conditioning(PLAIN, null="nothing")
    wide = make_batch(2)
    with pytest.raises(RecipeError, match="the store's text is 12 wide and the U-Net takes 16"):
        Conditioning(SMALL | {"cross_attention_dim": 16})(wide)
    with pytest.raises(RecipeError, match="the store's pooled text is 10 wide and the U-Net takes 9"):
        Conditioning(SMALL | {"projection_class_embeddings_input_dim": 9 + 24})(wide)


def make_objective(unet: UNet2DConditionModel | None = None, **options: Any) -> NoiseObjective:
    schedule = NoiseSchedule.from_config(SDXL_NOISE, options.pop("prediction", None))
    conditioning = Conditioning(SMALL, caption_drop=options.pop("caption_drop", 0.0))
    return NoiseObjective(unet or make_unet(), schedule, conditioning, **({"seed": 0} | options))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_loss_is_that_of_diffusers_training_scripts(prediction: str) -> None:
    objective, batch = make_objective(prediction=prediction), make_batch()
    theirs = DDPMScheduler(**SDXL_NOISE)
    noise = keyed_normal(0, "noise", batch.index, (4, 8, 8))
    loss = objective(batch)
    t = objective.schedule.nearest(loss.noise_level)
    noisy = theirs.add_noise(batch.latents, noise, t)
    added = {"text_embeds": batch.extra["pooled"], "time_ids": batch.extra["size_crop"]}
    output = objective.trained["unet"](noisy, t, batch.text, added_cond_kwargs=added).sample
    velocity = theirs.get_velocity(batch.latents, noise, t)
    target = {"epsilon": noise, "v_prediction": velocity, "sample": batch.latents}[prediction]
    assert torch.allclose(loss.per_sample.mean(), F.mse_loss(output.float(), target.float()), rtol=1e-5)
    weighted = make_objective(objective.trained["unet"], prediction=prediction, weight="min_snr")
    weights = weighted.schedule.weight(t, "min_snr")
    assert torch.allclose(weighted(batch).per_sample, weights * loss.per_sample, rtol=1e-5)


def test_an_image_s_loss_is_the_same_in_any_batch() -> None:
    objective, batch = make_objective(caption_drop=0.5), make_batch(6)
    whole = objective(batch)
    for number in (2, 6):
        parts = [objective(part) for part in batch.parts(number)]
        assert torch.allclose(torch.cat([part.per_sample for part in parts]), whole.per_sample, rtol=1e-4)
        assert torch.equal(torch.cat([part.noise_level for part in parts]), whole.noise_level)
    assert not torch.allclose(make_objective(seed=1)(batch).per_sample, whole.per_sample, rtol=0.1)


def test_the_held_out_loss_draws_nothing_of_the_run_s() -> None:
    unet, batch = make_unet(dropout=0.5), make_batch()
    level = torch.tensor([-2.0, 0.0, 1.0, 2.0])
    first = make_objective(unet, caption_drop=0.9).loss_at(batch, level)
    assert torch.equal(make_objective(unet, seed=5).loss_at(batch, level), first)
    assert unet.training
    objective = make_objective(unet)
    t = objective.schedule.nearest(level)
    unet.eval()
    expected = objective.error(batch.latents, t, held_out_noise(batch), objective.conditioning(batch))
    assert torch.equal(first, expected)


def test_dropout_is_keyed_by_the_place_in_the_run() -> None:
    objective, batch = make_objective(make_unet(dropout=0.5)), make_batch()
    first = objective(batch).per_sample
    before = torch.get_rng_state()
    torch.manual_seed(123)
    assert torch.equal(objective(batch).per_sample, first)
    torch.set_rng_state(before)
    objective.eval()
    assert not torch.equal(objective(batch).per_sample, first)
