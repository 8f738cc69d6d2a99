"""ControlNets of U-Nets with and without a mid block, against diffusers' own classes and pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    EulerDiscreteScheduler,
    StableDiffusionXLControlNetPipeline,
    UNet2DConditionModel,
)
from torch import Tensor

from shoestring.errors import RecipeError
from shoestring.models.unet_controlnet import controlnet_from_unet

WIDTH, POOLED, IDS = 12, 10, 8
LIKE_SDXL: dict[str, Any] = {
    "sample_size": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (8, 16, 16),
    "layers_per_block": 1,
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (1, 2, 2),
    "cross_attention_dim": WIDTH,
    "norm_num_groups": 4,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": IDS,
    "projection_class_embeddings_input_dim": POOLED + 6 * IDS,
}
LIKE_SSD: dict[str, Any] = {
    **LIKE_SDXL,
    "layers_per_block": 2,
    "transformer_layers_per_block": (0, (1, 2), (2, 1)),
    "reverse_transformer_layers_per_block": ((1, 2, 1), (1, 1, 1), 0),
    "mid_block_type": "UNetMidBlock2D",
}
NO_MID: dict[str, Any] = {**LIKE_SDXL, "mid_block_type": None}


def unet(config: dict[str, Any], **changes: Any) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(**{**config, **changes}).eval()


def inputs(seed: int = 1, batch: int = 2) -> dict[str, Any]:
    """What U-Net and ControlNet both take; the condition is 8 times as large as the latents."""
    generator = torch.Generator().manual_seed(seed)
    added = {"text_embeds": torch.randn(batch, POOLED, generator=generator), "time_ids": torch.ones(batch, 6)}
    return {
        "sample": torch.randn(batch, 4, 8, 8, generator=generator),
        "timestep": torch.tensor([7, 900][:batch]),
        "encoder_hidden_states": torch.randn(batch, 5, WIDTH, generator=generator),
        "added_cond_kwargs": added,
    }


def condition(batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, 64, 64, generator=torch.Generator().manual_seed(2))


def controlled(network: UNet2DConditionModel, control: ControlNetModel, given: dict[str, Any]) -> Tensor:
    residuals, mid = control(**given, controlnet_cond=condition(), return_dict=False)
    return network(
        **given, down_block_additional_residuals=tuple(residuals), mid_block_additional_residual=mid
    ).sample


def trained(control: ControlNetModel) -> ControlNetModel:
    """With weights in its zero convolutions, and in the last one of its embedding of the condition."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in control.named_parameters():
            if name.startswith("controlnet_"):
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return control


# --- against diffusers -----------------------------------------------------------------------------------


def test_diffusers_cannot_build_one_without_a_mid_block() -> None:
    """Why this file exists; when it fails, diffusers' own builder may do."""
    with pytest.raises(ValueError, match="unknown mid_block_type : None"):
        ControlNetModel.from_unet(unet(NO_MID))


@pytest.mark.parametrize("config", [LIKE_SDXL, LIKE_SSD], ids=["cross-attention mid", "ssd-1b's mid"])
def test_with_a_mid_block_it_is_the_one_of_diffusers(config: dict[str, Any]) -> None:
    network = unet(config)
    torch.manual_seed(4)
    ours = controlnet_from_unet(network)
    torch.manual_seed(4)
    theirs = ControlNetModel.from_unet(network)
    private = "_use_default_values"
    assert {**ours.config, private: 0} == {**theirs.config, private: 0}
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(ours.state_dict()[name], value) for name, value in theirs.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"mid_block_scale_factor": 2.0}], ids=["plain", "mid scale 2"])
def test_without_one_it_sees_what_the_unet_sees(changes: dict[str, Any]) -> None:
    """Every skip of the U-Net and what reaches its up blocks, bit for bit: the added mid is the identity."""
    network = unet(NO_MID, **changes)
    skips: dict[str, tuple[Tensor, ...]] = {}
    network.up_blocks[0].register_forward_hook(
        lambda module, args, kwargs, out: skips.update(up=(kwargs["hidden_states"],)), with_kwargs=True
    )
    network.conv_in.register_forward_hook(lambda module, args, out: skips.update(first=(out,)))
    for number, block in enumerate(network.down_blocks):
        block.register_forward_hook(lambda module, args, out, n=number: skips.update({f"down{n}": out[1]}))
    network(**inputs())
    control = controlnet_from_unet(network)
    for convolution in [*control.controlnet_down_blocks, control.controlnet_mid_block]:
        torch.nn.init.dirac_(convolution.weight)  # each hands on what it gets
    seen, mid = control(**inputs(), controlnet_cond=condition(), return_dict=False)
    expected = [*skips["first"], *(each for n in range(3) for each in skips[f"down{n}"])]
    assert len(seen) == len(expected) == 6
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))
    assert torch.equal(mid, skips["up"][0])


@torch.no_grad()
def test_a_new_controlnet_changes_no_bit_and_a_trained_one_does() -> None:
    network = unet(NO_MID)
    control = controlnet_from_unet(network)
    plain = network(**inputs()).sample
    assert torch.equal(controlled(network, control, inputs()), plain)
    assert not torch.allclose(controlled(network, trained(control), inputs()), plain, atol=1e-3)


def test_gradients_reach_every_weight_of_it() -> None:
    """At the start through the zero convolutions alone; after they moved, everywhere, the added mid too."""
    network = unet(NO_MID).requires_grad_(False)
    control = controlnet_from_unet(network)
    controlled(network, control, inputs()).square().sum().backward()
    reached = {name for name, p in control.named_parameters() if p.grad is not None and p.grad.any()}
    zero = ("controlnet_down_blocks", "controlnet_mid_block")
    assert reached == {name for name, _ in control.named_parameters() if name.startswith(zero)}
    control = trained(control)
    torch.nn.init.normal_(control.mid_block.resnets[0].conv2.weight, std=0.1)
    control.zero_grad()
    controlled(network, control, inputs()).square().sum().backward()
    dead = [name for name, p in control.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []


@torch.no_grad()
def test_saved_it_opens_in_the_stock_class(tmp_path: Path) -> None:
    control = trained(controlnet_from_unet(unet(NO_MID), conditioning_channels=3)).eval()
    control.save_pretrained(tmp_path)
    opened = ControlNetModel.from_pretrained(tmp_path)
    assert opened.config.mid_block_type == "UNetMidBlock2D"
    residuals = control(**inputs(), controlnet_cond=condition(), return_dict=False)
    again = opened(**inputs(), controlnet_cond=condition(), return_dict=False)
    assert all(torch.equal(a, b) for a, b in zip(residuals[0], again[0], strict=True))
    assert torch.equal(residuals[1], again[1])


def pipeline(network: UNet2DConditionModel, control: ControlNetModel) -> StableDiffusionXLControlNetPipeline:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    torch.manual_seed(5)
    made = StableDiffusionXLControlNetPipeline(
        vae=AutoencoderKL(block_out_channels=(4,) * 4, norm_num_groups=2, layers_per_block=1, **blocks),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=network,
        controlnet=control,
        scheduler=EulerDiscreteScheduler(),
        add_watermarker=False,
    )
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize("guess", [False, True])
def test_stock_sdxl_pipeline_runs_it_with_a_mid_less_unet(guess: bool) -> None:
    """Untrained it changes nothing whatever the condition; trained, two conditions give two pictures."""
    network = unet(NO_MID)
    generator = torch.Generator().manual_seed(6)
    texts = {
        "prompt_embeds": torch.randn(1, 5, WIDTH, generator=generator),
        "negative_prompt_embeds": torch.zeros(1, 5, WIDTH),
        "pooled_prompt_embeds": torch.randn(1, POOLED, generator=generator),
        "negative_pooled_prompt_embeds": torch.zeros(1, POOLED),
        "latents": torch.randn(1, 4, 8, 8, generator=generator),
    }

    def sample(control: ControlNetModel, value: float) -> Tensor:
        image = torch.full((1, 3, 64, 64), value)
        options = {"num_inference_steps": 2, "output_type": "latent", "guess_mode": guess}
        return pipeline(network, control)(image=image, **texts, **options).images

    control = controlnet_from_unet(network)
    assert torch.equal(sample(control, 0.1), sample(control, 0.9))
    control = trained(control)
    assert (sample(control, 0.1) - sample(control, 0.9)).abs().max() > 1e-3


@torch.no_grad()
def test_a_unet_on_pixels_takes_conditions_of_its_own_size_and_channels() -> None:
    network = unet(NO_MID)
    control = trained(
        controlnet_from_unet(network, conditioning_channels=1, conditioning_embedding_out_channels=(8,))
    )
    residuals, _ = control(**inputs(), controlnet_cond=torch.rand(2, 1, 8, 8), return_dict=False)
    assert [tuple(each.shape[1:]) for each in residuals[:2]] == [(8, 8, 8), (8, 8, 8)]


@torch.no_grad()
def test_a_student_of_latent_consistency_keeps_its_guidance_embedding_to_itself() -> None:
    network = unet(NO_MID, time_cond_proj_dim=6)
    control = controlnet_from_unet(network)
    given = {**inputs(), "timestep_cond": torch.ones(2, 6)}
    residuals, mid = control(**inputs(), controlnet_cond=condition(), return_dict=False)
    out = network(
        **given, down_block_additional_residuals=residuals, mid_block_additional_residual=mid
    ).sample
    assert torch.equal(out, network(**given).sample)


# --- what it refuses -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"center_input_sample": True}, "center_input_sample True"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type 'fourier'"),
        ({"layers_per_block": (1, 2, 1)}, r"layers_per_block \[1, 2, 1\]"),
        ({"cross_attention_dim": (WIDTH,) * 3}, "cross_attention_dim"),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "UNetMidBlock2DSimpleCrossAttn"),
    ],
)
def test_it_refuses_a_unet_whose_encoder_it_cannot_hold(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        controlnet_from_unet(unet(LIKE_SDXL, **changes))


def test_it_refuses_what_is_no_unet() -> None:
    with pytest.raises(TypeError, match="class AutoencoderKL, not UNet2DConditionModel"):
        controlnet_from_unet(AutoencoderKL(block_out_channels=(4,), norm_num_groups=2))


def test_it_refuses_a_unet_with_an_adapter_in_its_encoder() -> None:
    network = unet(NO_MID)
    network.conv_in = torch.nn.Sequential(network.conv_in)
    with pytest.raises(RecipeError, match=r"conv_in\.weight: is in only one"):
        controlnet_from_unet(network)
