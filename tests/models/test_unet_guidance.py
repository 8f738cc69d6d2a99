"""U-Nets that are told the guidance scale, against diffusers' own pipelines and networks."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

from shoestring.models.unet_guidance import guidance_embedding, with_guidance_embedding
from tests.distill.small_sdxl import given, make_batch, make_unet


@pytest.mark.parametrize("dimension", [256, 512, 33])
def test_the_embedding_has_the_bits_of_the_pipelines(dimension: int) -> None:
    w = torch.linspace(0, 15, 61)
    theirs = StableDiffusionXLPipeline.get_guidance_scale_embedding(None, w, dimension)
    assert torch.equal(guidance_embedding(w, dimension), theirs)


def test_a_network_that_is_given_the_embedding_puts_out_what_it_did() -> None:
    unet, batch = make_unet(), make_batch(2)
    t, w = torch.tensor([10, 900]), torch.tensor([3.0, 11.0])
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    told = with_guidance_embedding(unet, 32)
    assert told.config.time_cond_proj_dim == 32
    assert unet.config.time_cond_proj_dim is None
    with torch.no_grad():
        theirs = unet(batch.latents, t, **given(batch)).sample
        ours = told(batch.latents, t, timestep_cond=guidance_embedding(w, 32), **given(batch)).sample
        assert torch.equal(ours, theirs)
        for weight in told.parameters():
            weight.add_(1.0)
    assert all(torch.equal(before[name], tensor) for name, tensor in unet.state_dict().items())


def test_the_embedding_learns_from_its_first_step() -> None:
    told, batch = with_guidance_embedding(make_unet()), make_batch(2)
    w = guidance_embedding(torch.tensor([3.0, 11.0]), 256)
    told(
        batch.latents, torch.tensor([10, 900]), timestep_cond=w, **given(batch)
    ).sample.square().sum().backward()
    assert told.time_embedding.cond_proj.weight.grad.abs().max() > 0


def test_a_network_that_has_an_embedding_keeps_it() -> None:
    unet = make_unet(time_cond_proj_dim=16)
    again = with_guidance_embedding(unet, 256)
    assert again.config.time_cond_proj_dim == 16
    assert torch.equal(again.time_embedding.cond_proj.weight, unet.time_embedding.cond_proj.weight)


def test_a_shape_gets_the_embedding_too() -> None:
    with torch.device("meta"):
        told = with_guidance_embedding(make_unet())
    assert told.time_embedding.cond_proj.weight.is_meta
    told.load_state_dict(with_guidance_embedding(make_unet()).state_dict(), assign=True)
    assert isinstance(told, UNet2DConditionModel)
