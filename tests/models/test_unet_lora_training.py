"""Adapters on U-Nets, against diffusers' own saving, loading and fusing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor

from shoestring.errors import RecipeError
from shoestring.models.unet_lora_training import TARGETS, add_lora, has_lora, lora_state, merged
from tests.distill.small_sdxl import CONFIG, given, make_batch, make_pipeline, make_unet

T = torch.tensor([10, 900])


def output(unet: UNet2DConditionModel) -> Tensor:
    batch = make_batch(2)
    conditions = given(batch)
    to = {"encoder_hidden_states": conditions["encoder_hidden_states"].to(unet.dtype)}
    added = {name: tensor.to(unet.dtype) for name, tensor in conditions["added_cond_kwargs"].items()}
    with torch.no_grad():
        return unet(batch.latents.to(unet.dtype), T, **to, added_cond_kwargs=added).sample


def shake(unet: UNet2DConditionModel, seed: int = 0) -> UNet2DConditionModel:
    """The adapter as if it had been trained: B is no longer zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in unet.parameters():
        if parameter.requires_grad:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return unet


def test_only_the_adapter_trains_and_it_changes_nothing_at_first() -> None:
    unet = make_unet()
    before, names = output(unet), set(unet.state_dict())
    add_lora(unet, 4)
    assert has_lora(unet)
    assert torch.allclose(output(unet), before, atol=1e-6)
    trained = {name for name, weight in unet.named_parameters() if weight.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    base = {name.replace(".base_layer", "") for name in unet.state_dict() if "lora_" not in name}
    assert base == names


def test_every_attention_feed_forward_and_residual_layer_is_adapted() -> None:
    unet = make_unet()
    layers = {
        name
        for name, module in unet.named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))
        and not name.startswith(("conv_in", "conv_out", "time_embedding", "add_embedding"))
    }
    adapted = {name.removeprefix("unet.").split(".lora_")[0] for name in lora_state(add_lora(unet, 2))}
    assert adapted == layers
    assert len(TARGETS) == 14


@pytest.mark.parametrize("alpha", [None, 2, 16])
def test_folding_is_exact_and_leaves_a_plain_network(alpha: int | None) -> None:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**CONFIG).double()
    plain_before = output(unet)
    shake(add_lora(unet, 4, alpha))
    for weight in unet.parameters():
        weight.data = weight.data.double()
    before = output(unet)
    plain = merged(unet)
    assert (before - plain_before).abs().max() > 0.1
    assert torch.allclose(output(plain), before, atol=1e-12)
    assert set(plain.state_dict()) == set(make_unet().state_dict())
    assert dict(plain.config) == dict(unet.config)
    assert not has_lora(plain)
    assert not any(weight.requires_grad for weight in plain.parameters())
    assert torch.equal(output(unet), before)
    assert has_lora(unet)


def test_a_folded_network_is_saved_and_opened_by_diffusers(tmp_path: Path) -> None:
    plain = merged(shake(add_lora(make_unet(), 4)))
    plain.save_pretrained(tmp_path)
    assert torch.equal(output(UNet2DConditionModel.from_pretrained(tmp_path)), output(plain))


@pytest.mark.parametrize("alpha", [None, 2])
def test_stock_pipelines_save_and_load_the_adapter(alpha: int | None, tmp_path: Path) -> None:
    unet = shake(add_lora(make_unet(), 4, alpha))
    state = lora_state(unet)
    layers = {name.removeprefix("unet."): tensor for name, tensor in state.items()}
    StableDiffusionXLPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers)
    saved = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert saved.keys() == state.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in state.items())
    pipeline = make_pipeline(make_unet(), LCMScheduler())
    pipeline.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    assert torch.allclose(output(pipeline.unet), output(unet), atol=1e-5)


def test_a_shape_is_adapted_too_and_takes_the_weights() -> None:
    unet = shake(add_lora(make_unet(), 4))
    with torch.device("meta"):
        shape = add_lora(make_unet(), 4)
    shape.load_state_dict(unet.state_dict(), assign=True)
    assert torch.equal(output(merged(shape)), output(merged(unet)))


def test_an_adapter_on_bfloat16_weights_is_float32() -> None:
    unet = add_lora(make_unet().to(torch.bfloat16), 4)
    types = {weight.requires_grad: weight.dtype for weight in unet.parameters()}
    assert types == {True: torch.float32, False: torch.bfloat16}


def test_mistakes_are_refused_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match="must be 1 or more"):
        add_lora(make_unet(), 0)
    with pytest.raises(RecipeError, match="no such module"):
        add_lora(make_unet(), 4, targets=("qkv",))
    with pytest.raises(RecipeError, match="an adapter already"):
        add_lora(add_lora(make_unet(), 4), 4)
    with pytest.raises(RecipeError, match="no adapter"):
        lora_state(make_unet())
    with pytest.raises(RecipeError, match="no adapter"):
        merged(make_unet())
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(RecipeError, match=r'pip install "shoestring\[lora\]"'):
        add_lora(make_unet(), 4)
