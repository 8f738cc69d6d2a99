"""Peak memory counted on shapes: against closed forms and against what torch's profiler sees allocated."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from shoestring.pipelines.live_memory import convolution_workspace, forward_peak
from tests.pipelines import stock_parts as parts


class Forward(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


def kept(x: Tensor) -> Tensor:
    skip = x + 1
    return (skip * 2).exp() + skip


def dropped(x: Tensor) -> Tensor:
    for _ in range(5):
        x = x + 1
    return x


def in_place(x: Tensor) -> Tensor:
    y = x + 1
    return y.mul_(2).view(-1, 4).transpose(0, 1)


@pytest.mark.parametrize(("function", "tensors"), [(kept, 3), (dropped, 2), (in_place, 1)])
def test_what_python_holds_is_what_counts(function: Callable[[Tensor], Tensor], tensors: int) -> None:
    """A skip held by name stays, what is overwritten goes, views and in-place operations cost nothing."""
    x = torch.empty(8, 32, device="meta")
    assert forward_peak(Forward(function), x) == tensors * 8 * 32 * 4
    assert forward_peak(Forward(function), x.half()) == tensors * 8 * 32 * 2


def test_weights_and_inputs_are_not_counted() -> None:
    with torch.device("meta"):
        layer = nn.Linear(64, 8)
    assert forward_peak(layer, torch.empty(16, 64, device="meta")) == 16 * 8 * 4


def test_attention_is_the_fused_kernels() -> None:
    """The result alone, and a projection that follows reads it without a copy: never (N, N) weights."""
    query = torch.empty(2, 4, 4096, 16, device="meta")
    size = query.numel() * 4
    assert forward_peak(Forward(F.scaled_dot_product_attention), query, query, query) == size

    def joined(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, key=x, value=x).transpose(1, 2).reshape(2, 4096, 64)

    assert forward_peak(Forward(joined), query) == size


def test_a_huge_network_costs_nothing_to_count() -> None:
    with torch.device("meta"):
        network = nn.Sequential(*(nn.Linear(100_000, 100_000) for _ in range(3)))  # 120 GB
    assert forward_peak(network, torch.empty(5, 100_000, device="meta")) == 2 * 5 * 100_000 * 4


def allocated(work: Callable[[], Any]) -> int:
    """Peak bytes that torch's allocator handed out, oneDNN's copies included, by its profiler."""
    with torch.no_grad():
        work()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            work()
    now = peak = 0
    for event in seen.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


@pytest.mark.parametrize("channels", [(32, 32), (64, 16), (16, 64)])
def test_the_workspace_of_a_convolution_is_onednns(channels: tuple[int, int]) -> None:
    layer, x = nn.Conv2d(*channels, 3, padding=1), torch.randn(1, channels[0], 64, 64)
    result = channels[1] * 64 * 64 * 4
    workspace = convolution_workspace(x.numel() * 4, result, layer.weight.numel() * 4)
    assert forward_peak(copy.deepcopy(layer).to("meta"), x.to("meta")) == result + workspace
    assert allocated(lambda: layer(x)) == pytest.approx(result + workspace, rel=0.03)


def test_a_unet_takes_what_is_counted() -> None:
    unet = parts.sdxl_unet(block_out_channels=(32, 64))
    inputs: dict[str, Any] = {
        "sample": torch.randn(2, 4, 64, 64),
        "timestep": torch.tensor(5),
        "encoder_hidden_states": torch.randn(2, 77, 2 * parts.WIDTH),
    }
    added = {"text_embeds": torch.randn(2, parts.POOLED), "time_ids": torch.randn(2, 6)}
    shapes = {name: value.to("meta") for name, value in inputs.items()}
    counted = forward_peak(
        copy.deepcopy(unet).to("meta"),
        **shapes,
        added_cond_kwargs={name: value.to("meta") for name, value in added.items()},
    )
    assert counted == pytest.approx(allocated(lambda: unet(**inputs, added_cond_kwargs=added)), rel=0.05)


@pytest.mark.parametrize("tiled", [False, True])
def test_a_decode_takes_what_is_counted(tiled: bool) -> None:
    kinds = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (32, 64),
    }
    vae, latents = AutoencoderKL(**kinds, sample_size=32).eval(), torch.randn(1, 4, 48, 48)
    if tiled:  # of 16 cells, and in tiles of 32 px
        vae.enable_tiling()
    counted = forward_peak(copy.deepcopy(vae).to("meta"), latents.to("meta"), method="decode")
    assert counted == pytest.approx(allocated(lambda: vae.decode(latents)), rel=0.05)
