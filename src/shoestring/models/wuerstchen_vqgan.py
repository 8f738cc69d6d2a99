"""Würstchen's Stage A (arXiv 2306.00637): a VQGAN that makes pictures four times smaller along each side.

    picture (B, 3, H, W) --unshuffle, block, strided convolution, block, BatchNorm--> z (B, 4, H/4, W/4)
    picture <--shuffle, block, transposed convolution, 12 blocks-- z, or its nearest codes

Trained with codes nine times out of ten and used without: Stage B works on z / `scale_factor`. Arguments and
state-dict keys are those of diffusers' class of the same name.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.vq_model import VQEncoderOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from shoestring.models.synced_norm import SyncedBatchNorm2d
from shoestring.models.wuerstchen_layers import NORM_EPS, to_channels_first, to_channels_last
from shoestring.runtime import full_precision

COMMITMENT = 0.25
DISTANCES_AT_ONCE = 2**24
"""Distances from places to codes held at a time: 64 MB in float32."""


class MixingBlock(nn.Module):
    """A depthwise convolution and an MLP, each on a normalised, scaled and shifted input, each gated.

    All six numbers are scalars that start at zero, so the block starts as the identity.
    """

    def __init__(self, c: int) -> None:
        super().__init__()
        self.depthwise = nn.Sequential(nn.ReplicationPad2d(1), nn.Conv2d(c, c, kernel_size=3, groups=c))
        self.channelwise = nn.Sequential(nn.Linear(c, c * 4), nn.GELU(), nn.Linear(c * 4, c))
        self.gammas = nn.Parameter(torch.zeros(6))

    def forward(self, picture: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape, channels-last in memory."""
        scale_conv, shift_conv, gate_conv, scale_mlp, shift_mlp, gate_mlp = self.gammas.to(picture.dtype)
        hidden = to_channels_last(picture)
        mixed = self.depthwise(to_channels_first(_modulated_norm(hidden, scale_conv, shift_conv)))
        hidden = torch.addcmul(hidden, to_channels_last(mixed), gate_conv)
        mixed = self.channelwise(_modulated_norm(hidden, scale_mlp, shift_mlp))
        return to_channels_first(torch.addcmul(hidden, mixed, gate_mlp))


def _modulated_norm(hidden: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """LayerNorm over the channels, times (1 + scale), plus shift; both scalars."""
    size = hidden.shape[-1]
    return F.layer_norm(hidden, (size,), (1 + scale).expand(size), shift.expand(size), NORM_EPS)


class Codebook(nn.Module):
    """The codes; see `PaellaVQModel.quantize`."""

    def __init__(self, num_codes: int, channels: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_codes, channels)

    def nearest(self, points: Tensor) -> Tensor:
        """The nearest code of each point: (N, C) -> (N,) int64.

        Always in float32, since a new codebook's codes lie within 1 / num_codes of each other; and without
        the points' own norms, which change no order.
        """
        with full_precision(points.device):
            codes = self.embedding.weight.float()
            half_norms = codes.square().sum(dim=1) / 2
            parts = points.float().split(max(1, DISTANCES_AT_ONCE // len(codes)))
            return torch.cat([(half_norms - part @ codes.T).argmin(dim=1) for part in parts])


class PaellaVQModel(ModelMixin, ConfigMixin):
    """The Stage A autoencoder; see the module's diagram.

    Args:
        in_channels, out_channels: colours.
        up_down_scale_factor: side of the squares of pixels that go into channels first.
        levels: resolutions; each one after the first halves the side.
        bottleneck_blocks: blocks of the decoder at the lowest resolution.
        embed_dim: width there; half of it at each level above.
        latent_channels: channels of z.
        num_vq_embeddings: codes.
        scale_factor: Stage B's latents are z divided by this; see `latent_scale`.
    """

    _supports_gradient_checkpointing = False
    _no_split_modules = ["MixingBlock"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        up_down_scale_factor: int = 2,
        levels: int = 2,
        bottleneck_blocks: int = 12,
        embed_dim: int = 384,
        latent_channels: int = 4,
        num_vq_embeddings: int = 8192,
        scale_factor: float = 0.3764,
    ) -> None:
        super().__init__()
        widths = [embed_dim // 2**i for i in reversed(range(levels))]
        factor = up_down_scale_factor
        self.in_block = nn.Sequential(
            nn.PixelUnshuffle(factor), nn.Conv2d(in_channels * factor**2, widths[0], kernel_size=1)
        )
        down: list[nn.Module] = [MixingBlock(widths[0])]
        for before, width in pairwise(widths):
            down += [nn.Conv2d(before, width, kernel_size=4, stride=2, padding=1), MixingBlock(width)]
        projection = nn.Conv2d(widths[-1], latent_channels, kernel_size=1, bias=False)
        down.append(nn.Sequential(projection, SyncedBatchNorm2d(latent_channels)))
        self.down_blocks = nn.Sequential(*down)

        self.vquantizer = Codebook(num_vq_embeddings, latent_channels)

        up: list[nn.Module] = [nn.Sequential(nn.Conv2d(latent_channels, widths[-1], kernel_size=1))]
        up += [MixingBlock(widths[-1]) for _ in range(bottleneck_blocks)]
        for before, width in pairwise(reversed(widths)):
            up += [nn.ConvTranspose2d(before, width, kernel_size=4, stride=2, padding=1), MixingBlock(width)]
        self.up_blocks = nn.Sequential(*up)
        self.out_block = nn.Sequential(
            nn.Conv2d(widths[0], out_channels * factor**2, kernel_size=1), nn.PixelShuffle(factor)
        )
        self.reset_parameters()

    @property
    def boundary(self) -> list[nn.Module]:
        """Where signals enter, leave and change resolution: to an optimiser, no hidden matrices."""
        inner = [*self.down_blocks, *self.up_blocks]
        return [self.in_block, *(b for b in inner if not isinstance(b, MixingBlock)), self.out_block]

    @property
    def norm(self) -> nn.BatchNorm2d:
        """The batch norm whose output is z."""
        return self.down_blocks[-1][1]  # type: ignore[index]

    def reset_parameters(self) -> None:
        """The authors' initialisation: Xavier and zero biases within the blocks, torch's own around them."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d)):
                module.reset_parameters()
        for module in self.modules():
            if isinstance(module, MixingBlock):
                nn.init.zeros_(module.gammas)
                layers: list[Any] = [module.depthwise[1], module.channelwise[0], module.channelwise[2]]
                for layer in layers:
                    nn.init.xavier_uniform_(layer.weight)
                    nn.init.zeros_(layer.bias)
        bound = 1 / self.config.num_vq_embeddings
        nn.init.uniform_(self.vquantizer.embedding.weight, -bound, bound)

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """Pictures (B, 3, H, W) in [0, 1] -> `.latents` z (B, 4, h, w), not divided by `scale_factor`.

        In training mode the batch norm uses the statistics of the batch, of all processes' together.
        """
        hidden = self.in_block(x).contiguous(memory_format=torch.channels_last)
        latents = self.down_blocks(hidden)
        return VQEncoderOutput(latents=latents) if return_dict else (latents,)

    @apply_forward_hook
    def decode(self, h: Tensor, force_not_quantize: bool = True, return_dict: bool = True) -> Any:
        """z (B, 4, h, w) -> `.sample`, pictures (B, 3, H, W) in about [0, 1], not clamped.

        z goes in as it is, or, unless `force_not_quantize`, as its nearest codes.
        """
        codes = h if force_not_quantize else self.quantize(h)[0]
        hidden = self.up_blocks(codes.contiguous(memory_format=torch.channels_last))
        sample = self.out_block(hidden)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def quantize(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """z (B, 4, h, w) -> (its nearest codes (B, 4, h, w), loss of each picture (B,)).

        Gradients of the codes pass straight through to z. The loss, a mean over elements, draws the codes
        to z and, at a quarter of the strength, z to its codes.
        """
        points = to_channels_last(h)
        indices = self.vquantizer.nearest(points.detach().reshape(-1, points.shape[-1]))
        codes = self.vquantizer.embedding(indices).view(points.shape)
        to_codes = (points.detach() - codes).square() + COMMITMENT * (points - codes.detach()).square()
        straight_through = points + (codes - points).detach()
        return to_channels_first(straight_through), to_codes.mean(dim=(1, 2, 3))

    def settle_scale(self) -> None:
        """Have the configuration say the scale that training has led to."""
        self.register_to_config(scale_factor=self.latent_scale())

    def latent_scale(self) -> float:
        """The standard deviation of z over the training data: a `scale_factor` that makes z / it unit.

        From the batch norm alone, whose channels have mean beta and deviation gamma.
        """
        mean, deviation = self.norm.bias.detach().double(), self.norm.weight.detach().double()
        return math.sqrt((deviation.square() + mean.square()).mean() - mean.mean().square())

    def forward(self, sample: Tensor, return_dict: bool = True) -> Any:
        """Pictures in [0, 1] through `encode` and `decode`, without the codes."""
        return self.decode(self.encode(sample).latents, return_dict=return_dict)
