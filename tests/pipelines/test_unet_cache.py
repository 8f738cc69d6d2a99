"""Deep features kept between steps: what is computed when, and that the rest is the network's own."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor

from shoestring.errors import RecipeError
from shoestring.models.unet_controlnet import controlnet_from_unet
from shoestring.pipelines.unet_cache import deep_cache
from tests.models.test_unet_controlnet import NO_MID, POOLED, WIDTH

WITH_MID: dict[str, Any] = {**NO_MID, "mid_block_type": "UNetMidBlock2DCrossAttn", "layers_per_block": 2}
OUTERMOST = {"down_blocks.0", "up_blocks.2"}


def unet(config: dict[str, Any]) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(**config).eval()


def told(batch: int = 1) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    added = {"text_embeds": torch.randn(batch, POOLED, generator=generator), "time_ids": torch.ones(batch, 6)}
    text = torch.randn(batch, 5, WIDTH, generator=generator)
    return {"encoder_hidden_states": text, "added_cond_kwargs": added}


def noise(seed: int = 2, size: int = 8) -> Tensor:
    return torch.randn(1, 4, size, size, generator=torch.Generator().manual_seed(seed))


def picture(network: UNet2DConditionModel, steps: int, scheduler: Any = EulerDiscreteScheduler) -> Tensor:
    """The stock pipeline's latents, with guidance."""
    given = told()
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    pipeline = StableDiffusionXLPipeline(
        vae=AutoencoderKL(block_out_channels=(4,) * 4, norm_num_groups=2, layers_per_block=1, **blocks),
        unet=network,
        scheduler=scheduler(),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompt_embeds=given["encoder_hidden_states"],
        negative_prompt_embeds=torch.zeros_like(given["encoder_hidden_states"]),
        pooled_prompt_embeds=given["added_cond_kwargs"]["text_embeds"],
        negative_pooled_prompt_embeds=torch.zeros(1, POOLED),
        latents=noise(),
        num_inference_steps=steps,
        output_type="latent",
    ).images


def counted(network: UNet2DConditionModel) -> Counter[str]:
    """How often each block is computed, by its first ResNet."""
    counts: Counter[str] = Counter()
    for name, module in network.named_modules():
        if name.endswith("resnets.0"):
            block = name.removesuffix(".resnets.0")
            module.register_forward_hook(lambda *_, block=block: counts.update([block]))
    return counts


@torch.no_grad()
@pytest.mark.parametrize("config", [NO_MID, WITH_MID], ids=["no mid", "mid"])
def test_interval_1_changes_no_bit(config: dict[str, Any]) -> None:
    network = unet(config)
    plain = picture(network, 3)
    with deep_cache(network, interval=1):
        assert torch.equal(picture(network, 3), plain)


@torch.no_grad()
@pytest.mark.parametrize(("interval", "whole"), [(2, 3), (3, 2), (9, 1)])
@pytest.mark.parametrize("config", [NO_MID, WITH_MID], ids=["no mid", "mid"])
def test_deep_blocks_are_computed_every_few_steps_and_outer_ones_always(
    config: dict[str, Any], interval: int, whole: int
) -> None:
    network = unet(config)
    counts = counted(network)
    with deep_cache(network, interval=interval):
        picture(network, 6)
    assert {block for block, count in counts.items() if count == 6} == OUTERMOST
    assert {count for block, count in counts.items() if block not in OUTERMOST} == {whole}
    assert len(counts) == 6 + (config is WITH_MID)
    counts.clear()
    picture(network, 6)  # outside nothing is skipped
    assert set(counts.values()) == {6}


@torch.no_grad()
def test_two_outer_stages_leave_the_innermost_alone_to_be_kept() -> None:
    network = unet(WITH_MID)
    counts = counted(network)
    with deep_cache(network, interval=2, outer=2):
        picture(network, 4)
    deep = {"down_blocks.2": 2, "mid_block": 2, "up_blocks.0": 2}
    assert counts == {"down_blocks.0": 4, "down_blocks.1": 4, "up_blocks.1": 4, "up_blocks.2": 4} | deep


@torch.no_grad()
@pytest.mark.parametrize("config", [NO_MID, WITH_MID], ids=["no mid", "mid"])
def test_a_step_in_between_is_the_outer_stage_on_the_kept_feature(config: dict[str, Any]) -> None:
    """The second call against the same layers called by hand, bit for bit."""
    network, given = unet(config), told()
    deep: list[Tensor] = []
    kept = network.up_blocks[1].register_forward_hook(lambda module, args, out: deep.append(out))
    network(noise(2), 900, **given)
    kept.remove()
    with deep_cache(network, interval=2):
        network(noise(2), 900, **given)
        found = network(noise(3), 700, **given).sample
    time = network.time_embedding(network.get_time_embed(sample=noise(3), timestep=700))
    added = {"added_cond_kwargs": given["added_cond_kwargs"], "encoder_hidden_states": None}
    time = time + network.get_aug_embed(emb=time, **added)
    first = network.conv_in(noise(3))
    _, skips = network.down_blocks[0](first, temb=time)
    layers = len(network.up_blocks[-1].resnets)
    hidden = network.up_blocks[-1](
        hidden_states=deep[0], temb=time, res_hidden_states_tuple=(first, *skips)[:layers]
    )
    expected = network.conv_out(network.conv_act(network.conv_norm_out(hidden)))
    assert torch.equal(found, expected)
    assert not torch.equal(found, network(noise(3), 700, **given).sample)


@torch.no_grad()
def test_every_picture_begins_with_a_whole_step() -> None:
    """Pictures one after the other are as each would be alone: also of one step, and of another size."""
    network, given = unet(NO_MID), told()
    with deep_cache(network, interval=4):
        first = picture(network, 5)
        assert torch.equal(picture(network, 5), first)
        network(noise(3), 500, **given)
        again = network(noise(2), 500, **given).sample
        network(noise(2), 900, **given)
        larger = network(noise(2, size=16), 800, **given).sample
    assert torch.equal(again, network(noise(2), 500, **given).sample)
    assert torch.equal(larger, network(noise(2, size=16), 800, **given).sample)


@torch.no_grad()
def test_solvers_that_call_twice_at_a_timestep_run() -> None:
    """Heun's second call of a step is whole; the one after it, at a lower timestep, may be kept."""
    network = unet(NO_MID)
    counts = counted(network)
    with deep_cache(network, interval=2):
        assert picture(network, 4, HeunDiscreteScheduler).isfinite().all()
    assert counts["up_blocks.2"] == 7
    assert 3 < counts["up_blocks.0"] < 7


@torch.no_grad()
@pytest.mark.parametrize("config", [NO_MID, WITH_MID], ids=["no mid", "mid"])
def test_controlnets_go_with_it(config: dict[str, Any]) -> None:
    network, given = unet(config), told()
    control = controlnet_from_unet(network)
    condition = torch.rand(1, 3, 64, 64)
    counts = counted(network)
    with deep_cache(network, interval=2):
        for timestep in (900, 700):
            skips, mid = control(
                noise(), torch.tensor([timestep]), **given, controlnet_cond=condition, return_dict=False
            )
            residuals = {"down_block_additional_residuals": skips, "mid_block_additional_residual": mid}
            network(noise(), timestep, **given, **residuals)
    assert (counts["up_blocks.0"], counts["up_blocks.2"]) == (1, 2)


def test_it_goes_when_what_runs_within_fails() -> None:
    network = unet(NO_MID)
    counts = counted(network)
    with pytest.raises(ZeroDivisionError), deep_cache(network, interval=2):
        raise ZeroDivisionError
    with torch.no_grad():
        for timestep in (900, 700):
            network(noise(), timestep, **told())
    assert set(counts.values()) == {2}


def test_what_it_refuses() -> None:
    network = unet(NO_MID)
    for options, words in (
        ({"interval": 0}, "interval 0: must be 1 or more"),
        ({"outer": 0}, "outer 0: this U-Net has 3 stages. Use 1 to 2"),
        ({"outer": 3}, "outer 3"),
    ):
        with pytest.raises(RecipeError, match=words), deep_cache(network, **options):
            pass
    for given, options, words in (
        (
            AutoencoderKL(block_out_channels=(4,), norm_num_groups=2),
            {},
            "class AutoencoderKL, which is no U-Net",
        ),
        (network, {"interval": "3"}, "interval '3': must be a whole number"),
    ):
        with pytest.raises(TypeError, match=words), deep_cache(given, **options):
            pass
    with deep_cache(network), pytest.raises(RecipeError, match="is on already"), deep_cache(network):
        pass
