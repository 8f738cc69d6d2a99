"""The critic of Stage A's pictures: `Discriminator` of the authors' vqgan.py (arXiv 2306.00637, appendix E).

picture in [0, 1] -> depth x [3x3 convolution of stride 2, spectral norm; instance norm but first; LeakyReLU]
-> 1x1 convolution -> a logit a patch. The published network ends in a sigmoid, which here is in the loss.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from shoestring.errors import RecipeError
from shoestring.runtime import full_precision


class PatchDiscriminator(nn.Module):
    """(B, 3, H, W) -> logits (B, 1, h, w) float32, h = H / 2^depth rounded up.

    Widths double up to `c_hidden`, from an eighth of it at the published depth of 6. Each weight has a
    spectral norm near 1, by one step of power iteration a call in training mode. Pictures need more than
    2^depth pixels on one side, since the last instance norm needs more than one place; forward raises
    `RecipeError` for smaller ones.
    """

    def __init__(self, c_in: int = 3, c_hidden: int = 512, depth: int = 6) -> None:
        super().__init__()
        doublings = min(max(depth - 3, 3), depth - 1)
        widths = [c_hidden // 2 ** max(doublings - layer, 0) for layer in range(depth)]
        layers: list[nn.Module] = []
        for layer, (before, after) in enumerate(zip([c_in, *widths], widths, strict=False)):
            layers.append(spectral_norm(nn.Conv2d(before, after, kernel_size=3, stride=2, padding=1)))
            if layer > 0:
                layers.append(nn.InstanceNorm2d(after))
            layers.append(nn.LeakyReLU(0.2))
        self.depth = depth
        self.encoder = nn.Sequential(*layers)
        self.head = nn.Conv2d(c_hidden, 1, kernel_size=1)

    def forward(self, pictures: Tensor) -> Tensor:
        height, width = pictures.shape[-2:]
        if max(height, width) <= 2**self.depth:
            fits = max((max(height, width) - 1).bit_length() - 1, 1)
            raise RecipeError(
                f"discriminator.depth {self.depth}: pictures of {width} x {height} px leave it one place. "
                f"Use a depth of {fits} at most, or larger crops."
            )
        with full_precision(pictures.device):  # bfloat16 would blur the power iteration
            return self.head(self.encoder(pictures.float()))
