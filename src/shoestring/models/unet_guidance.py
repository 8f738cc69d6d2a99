"""U-Nets that are told the guidance scale (Meng et al. 2210.03142; latent consistency models, 2310.04378).

Such a network sees w beside the time step and gives the guided prediction in one pass:

    prediction = conditional + w (conditional - unconditional)        w = guidance_scale - 1

diffusers' `UNet2DConditionModel` has the place for it, `time_cond_proj_dim`, and its Stable Diffusion
pipelines fill it with an embedding of `guidance_scale - 1`.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

DIMENSION = 256
"""Width of the embedding in the published latent consistency models."""


def guidance_embedding(w: Tensor, dimension: int) -> Tensor:
    """Sines and cosines of 1000 w at falling frequencies: (B,) -> (B, dimension) float32.

    The same bits as the pipelines' `get_guidance_scale_embedding(w, dimension)`: angles go up to 15,000,
    where an exponential rounded otherwise is seen in the third digit.
    """
    half = dimension // 2
    step = torch.tensor(10000.0, device=w.device).log() / (half - 1)
    frequencies = (torch.arange(half, dtype=torch.float32, device=w.device) * -step).exp()
    angles = (w * 1000.0).float()[:, None] * frequencies  # (B, half)
    embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.nn.functional.pad(embedding, (0, dimension % 2))


def guidance_width(unet: nn.Module) -> int | None:
    """Width of the guidance embedding that a U-Net takes; None for one that is not told the scale."""
    config: Any = unet.config
    width: int | None = config.get("time_cond_proj_dim")
    return width


def with_guidance_embedding(unet: UNet2DConditionModel, dimension: int = DIMENSION) -> UNet2DConditionModel:
    """A copy of a U-Net that takes a guidance embedding too, and does not heed it yet.

    The new projection is zero, so the output is the original's for every w until it is trained. A network
    that has such an embedding keeps its width. The original is left as it is.
    """
    config = {name: value for name, value in unet.config.items() if not name.startswith("_")}
    config["time_cond_proj_dim"] = config["time_cond_proj_dim"] or dimension
    weights = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    hidden = unet.time_embedding.linear_1.weight
    zeros = hidden.new_zeros(hidden.shape[1], config["time_cond_proj_dim"])
    weights.setdefault("time_embedding.cond_proj.weight", zeros)
    with torch.device("meta"):  # else weights would be drawn, to be overwritten at once
        made: UNet2DConditionModel = UNet2DConditionModel.from_config(config)
    made.load_state_dict(weights, assign=True)
    return made.train(unet.training)
