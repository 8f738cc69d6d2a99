"""LatentPreviewer: a picture of Stage C's latents at once, without Stages B and A.

    latents (B, 16, h, w) --convolutions, three doublings--> picture (B, 3, 8 h, 8 w)

Layers and names (`blocks.N`) are those of Stable Cascade's `Previewer` (Stability-AI/StableCascade,
modules/previewer.py), whose weights load with `c_hidden` 512 and the defaults.
"""

from __future__ import annotations

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from shoestring.models.synced_norm import SyncedBatchNorm2d


class LatentPreviewer(ModelMixin, ConfigMixin):
    """The compressor's codes z (B, c_in, h, w), unscaled, to pictures (B, c_out, 8 h, 8 w) in [0, 1].

    Eight pixels a cell, where the full decoder makes about 43: enough to see what comes. Widths go
    c_hidden, /2, /4 (3.9 M parameters at 512). `c_hidden` must be a multiple of 4.
    """

    @register_to_config
    def __init__(self, c_in: int = 16, c_hidden: int = 512, c_out: int = 3) -> None:
        super().__init__()
        half, quarter = c_hidden // 2, c_hidden // 4
        self.blocks = nn.Sequential(
            *_layer(nn.Conv2d(c_in, c_hidden, 1)),
            *_layer(nn.Conv2d(c_hidden, c_hidden, 3, padding=1)),
            *_layer(nn.ConvTranspose2d(c_hidden, half, 2, 2)),  # 2 h
            *_layer(nn.Conv2d(half, half, 3, padding=1)),
            *_layer(nn.ConvTranspose2d(half, quarter, 2, 2)),  # 4 h
            *_layer(nn.Conv2d(quarter, quarter, 3, padding=1)),
            *_layer(nn.ConvTranspose2d(quarter, quarter, 2, 2)),  # 8 h
            *_layer(nn.Conv2d(quarter, quarter, 3, padding=1)),
            nn.Conv2d(quarter, c_out, 1),
        )

    def forward(self, latents: Tensor) -> Tensor:
        """Pictures, clamped to [0, 1] in evaluation; in training as they come, for the sake of gradients."""
        pictures: Tensor = self.blocks(latents)
        return pictures if self.training else pictures.clamp(0, 1)


def _layer(convolution: nn.Conv2d | nn.ConvTranspose2d) -> tuple[nn.Module, ...]:
    return convolution, nn.GELU(), SyncedBatchNorm2d(convolution.out_channels)
