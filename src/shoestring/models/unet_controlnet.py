"""A ControlNet for any U-Net, those without a mid block included.

    U-Net:      conv_in -> down blocks ------------------> (mid) ---------------> up blocks
                              | skips + zero conv             | + zero conv
    ControlNet: conv_in -> down blocks (the U-Net's, copied) -> mid -> its own zero convs
                  + condition

diffusers' `ControlNetModel.from_unet` stops at a U-Net whose `mid_block_type` is None, though the U-Net adds
the mid residual to whatever reaches its up blocks. What is built here is a plain `ControlNetModel`, so that
stock pipelines and training scripts take it: a missing mid becomes one residual block (`UNetMidBlock2D`) that
starts as the identity.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import nn

from shoestring.errors import RecipeError

_MID_BLOCKS = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None)

_UNKNOWN_TO_CONTROLNETS = (
    *("attention_type", "center_input_sample", "class_embeddings_concat", "conv_in_kernel"),
    *("cross_attention_norm", "dual_cross_attention", "mid_block_only_cross_attention"),
    *("resnet_out_scale_factor", "resnet_skip_time_act", "time_embedding_act_fn", "time_embedding_dim"),
    *("time_embedding_type", "timestep_post_act"),
)
"""Settings that change a U-Net's encoder and that `ControlNetModel` does not have."""

_NOT_ENCODER = ("time_embedding.cond_proj",)
"""The guidance embedding of latent consistency models: pipelines give it to the U-Net alone."""


def controlnet_from_unet(
    unet: UNet2DConditionModel,
    *,
    conditioning_channels: int = 3,
    conditioning_embedding_out_channels: Sequence[int] = (16, 32, 96, 256),
) -> ControlNetModel:
    """A `ControlNetModel` with the weights of the encoder of `unet`, in float32 and ready to be trained.

    It starts without any effect: its outputs pass through convolutions that are zero (Zhang et al. 2023,
    arXiv 2302.05543, eq. 2). The condition is an image (B, `conditioning_channels`, H f, W f) with
    f = 2 ** (len(`conditioning_embedding_out_channels`) - 1) for latents of H x W: 8 by default, as most
    autoencoders; one entry for a U-Net on pixels. `ControlNetModel` takes no `encoder_attention_mask`: texts
    are padded, as in Stable Diffusion.

    Raises `RecipeError` for a U-Net whose encoder no `ControlNetModel` can hold, `TypeError` for what is no
    `UNet2DConditionModel`.
    """
    if not isinstance(unet, UNet2DConditionModel):
        raise TypeError(
            f"unet: of the class {type(unet).__name__}, not UNet2DConditionModel. Give the pipeline's unet."
        )
    config = _fitting(unet.config)
    own = {
        "conditioning_channels": conditioning_channels,
        "conditioning_embedding_out_channels": tuple(conditioning_embedding_out_channels),
    }
    known = inspect.signature(ControlNetModel.__init__).parameters.keys() - {"self"}
    network = ControlNetModel(**{name: value for name, value in config.items() if name in known} | own)
    if unet.mid_block is None:
        _start_as_identity(network.mid_block)
    _copy_encoder(network, unet)
    return network


def _fitting(config: Mapping[str, Any]) -> dict[str, Any]:
    """The U-Net's config with a mid block in it; `RecipeError` where a ControlNet's encoder would differ."""
    defaults = inspect.signature(UNet2DConditionModel.__init__).parameters
    for name in _UNKNOWN_TO_CONTROLNETS:
        default = defaults[name].default
        if (config.get(name) or None) not in (default or None, None):  # False is as good as None
            raise RecipeError(
                f"{name} {config[name]!r}: diffusers has no ControlNet with such a setting, and without "
                f"it the encoder is another. Give a U-Net with {name} {default!r}."
            )
    for name in ("layers_per_block", "cross_attention_dim"):
        if not isinstance(config[name], int):
            raise RecipeError(
                f"{name} {list(config[name])}: a ControlNet has one {name} for all blocks. "
                "Give a U-Net with a single number there."
            )
    if config["mid_block_type"] not in _MID_BLOCKS:
        names = ", ".join(str(each) for each in _MID_BLOCKS)
        raise RecipeError(f"mid_block_type {config['mid_block_type']!r}: a ControlNet can have {names}.")
    if config["mid_block_type"] is None:  # the scale would act on a block that is the identity
        return {**config, "mid_block_type": "UNetMidBlock2D", "mid_block_scale_factor": 1}
    return dict(config)


def _start_as_identity(mid: nn.Module) -> None:
    """A residual block returns its input while its last convolution is zero."""
    for parameter in mid.get_submodule("resnets.0.conv2").parameters():
        nn.init.zeros_(parameter)


@torch.no_grad()
def _copy_encoder(network: ControlNetModel, unet: UNet2DConditionModel) -> None:
    """Copy every tensor that the two share by name; what is left over must be one of the two's own."""
    theirs, ours = unet.state_dict(), network.state_dict()
    own = ("controlnet_", "mid_block.") if unet.mid_block is None else ("controlnet_",)
    missing = [name for name in ours if name not in theirs and not name.startswith(own)]
    encoder = {name.split(".")[0] for name in ours}
    left = [name for name in theirs if name not in ours and name.split(".")[0] in encoder]
    left = [name for name in left if not name.startswith(_NOT_ENCODER)]
    if missing or left:
        raise RecipeError(
            f"{(missing + left)[0]}: is in only one of the U-Net and its ControlNet, whose encoders differ. "
            "Give a UNet2DConditionModel without adapters or added modules."
        )
    for name in ours.keys() & theirs.keys():
        ours[name].copy_(theirs[name])
