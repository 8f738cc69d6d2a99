"""Distances between pictures nearer to the eye than squared error: LPIPS from given weights, or none needed.

Each takes two pictures (B, 3, H, W) in [0, 1] and gives a distance (B,), 0 for equal ones. Which network gave
Würstchen's Stage A its perceptual term is not published; LPIPS on VGG16 is a guess.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shoestring.errors import CheckpointError, RecipeError
from shoestring.models.checkpoint_files import SUFFIXES, read_checkpoint
from shoestring.runtime import full_precision

VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Widths of VGG16's convolutions, by block (Simonyan and Zisserman 2014, arXiv 1409.1556, D)."""

EPSILON = 1e-10


class VGG16Features(nn.ModuleDict):
    """Activations after the last ReLU of each of VGG16's five blocks: (B, 3, H, W) -> five tensors.

    Convolutions have torchvision's numbers, which count ReLUs and pools too: 0, 2, 5, 7, 10, ... 28.
    """

    def __init__(self) -> None:
        super().__init__()
        self.blocks: list[list[str]] = []
        number, before = 0, 3
        for widths in VGG16:
            names = []
            for width in widths:
                names.append(str(number))
                self[str(number)] = nn.Conv2d(before, width, kernel_size=3, padding=1)
                number, before = number + 2, width
            self.blocks.append(names)
            number += 1  # the pool

    def forward(self, x: Tensor) -> list[Tensor]:
        found = []
        for block, names in enumerate(self.blocks):
            if block > 0:
                x = F.max_pool2d(x, 2)
            for name in names:
                x = F.relu(self[name](x))
            found.append(x)
        return found


class LPIPS(nn.Module):
    """Learned perceptual distance (Zhang et al. 2018, arXiv 1801.03924, version 0.1, on VGG16).

    d(x, y) = sum over blocks of the mean over places of sum_c w_c (x_c / |x| - y_c / |y|)^2   (equation 1)

    Keys are torchvision's for VGG16 (`features.N.weight`, `features.N.bias`) and the lpips package's for w
    (`lin0.model.1.weight` to `lin4.model.1.weight`, each (1, C, 1, 1)). Pictures need 16 pixels a side.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.features = VGG16Features()
        for block, widths in enumerate(VGG16):
            # model.0 is a dropout in the lpips package, for training the weights.
            linear = nn.Conv2d(widths[-1], 1, kernel_size=1, bias=False)
            self.add_module(f"lin{block}", nn.ModuleDict({"model": nn.ModuleDict({"1": linear})}))
        # lpips shifts and scales pictures in [-1, 1]; these are the same numbers for [0, 1].
        shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
        self.register_buffer("mean", ((shift + 1) / 2).view(3, 1, 1), persistent=False)
        self.register_buffer("deviation", (scale / 2).view(3, 1, 1), persistent=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        # One after the other: of a picture that needs no gradient no activations are kept.
        of_x, of_y = (self.features((picture - self.mean) / self.deviation) for picture in (x, y))
        distance = x.new_zeros(len(x), dtype=torch.float32)
        for block, (a, b) in enumerate(zip(of_x, of_y, strict=True)):
            weight = self.get_parameter(f"lin{block}.model.1.weight").float()
            difference = unit_length(a.float()) - unit_length(b.float())
            distance = distance + (difference.square() * weight).sum(dim=1).mean(dim=(1, 2))
        return distance

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], place: str = "weights") -> LPIPS:
        """From published tensors under torchvision's and lpips' names, or all under those of lpips' module.

        What is not needed (the classifier of VGG16) is left out. Raises `RecipeError` naming what is missing
        or of another shape.
        """
        network = cls()
        given = {re.sub(r"^net\.slice\d\.", "features.", key): tensor for key, tensor in tensors.items()}
        wanted = network.state_dict()
        if missing := [key for key in wanted if key not in given]:
            raise RecipeError(
                f"perceptual {place}: no {missing[0]} ({len(missing)} of {len(wanted)} missing). It takes "
                "VGG16's features.N.weight and .bias (torchvision) and lin0..4.model.1.weight (lpips, vgg)."
            )
        for key, tensor in wanted.items():
            if given[key].shape != tensor.shape:
                raise RecipeError(
                    f"perceptual {place}: {key} is {tuple(given[key].shape)}, not {tuple(tensor.shape)}. "
                    "Use LPIPS of VGG16."
                )
        network.load_state_dict({key: given[key] for key in wanted})
        return network


def unit_length(features: Tensor) -> Tensor:
    """Features (B, C, H, W) divided by their length over C; where they are all 0, so is the gradient."""
    return features / (features.square().sum(dim=1, keepdim=True) + EPSILON**2).sqrt()


class PyramidDistance(nn.Module):
    """Distance of Laplacian pyramids, which needs no weights (Bojanowski et al. 2018, arXiv 1707.05776).

    d(x, y) = sum over levels j of 4^j |L_j(x) - L_j(y)|_1 / pixels, that is of the mean difference a level

    The pyramid is Burt and Adelson's (1983): binomial 5-tap filter; the last level is what is left, smoothed.
    Every level, from edges to broad areas, weighs the same, and faint differences are not squared away.
    Small pictures have fewer than `levels` levels: no level is smaller than 4 pixels a side.
    """

    kernel: Tensor

    def __init__(self, levels: int = 5) -> None:
        super().__init__()
        self.levels = levels
        taps = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
        self.register_buffer("kernel", torch.outer(taps, taps)[None, None], persistent=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        with full_precision(x.device):
            # The pyramid is linear: that of the difference is the difference of the two.
            bands = self.pyramid(x.float() - y.float())
            return torch.stack([band.abs().flatten(1).mean(dim=1) for band in bands]).sum(dim=0)

    def pyramid(self, x: Tensor) -> list[Tensor]:
        """Bands from fine to coarse, each half the size of the one before: their upsampled sum is x."""
        bands = []
        for _ in range(self.levels - 1):
            if min(x.shape[-2:]) < 8:
                break
            coarse = self.blur(x)[..., ::2, ::2]
            bands.append(x - self.expand(coarse, x))
            x = coarse
        return [*bands, x]

    def blur(self, x: Tensor) -> Tensor:
        """Each channel smoothed, borders mirrored."""
        kernel = self.kernel.expand(x.shape[1], 1, 5, 5)
        return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), kernel, groups=x.shape[1])

    def expand(self, coarse: Tensor, like: Tensor) -> Tensor:
        """A coarse level at the size of `like`."""
        return F.interpolate(coarse, like.shape[-2:], mode="bilinear")


def load_perceptual(name_or_path: str) -> nn.Module:
    """`laplacian`, or LPIPS from a file (safetensors, .pth, .pt) or a folder of such files, in eval mode.

    A folder serves the published pair as it comes: torchvision's VGG16 and lpips' vgg.pth. Nothing is
    unpickled but tensors. Raises `RecipeError` for a file that cannot be read or does not serve.
    """
    if name_or_path == "laplacian":
        return PyramidDistance()
    path = Path(name_or_path)
    if not path.exists():
        raise RecipeError(
            f"perceptual {name_or_path!r}: neither `laplacian` nor a file or folder. Give LPIPS weights."
        )
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            found = read_checkpoint(file)
        except CheckpointError as error:
            raise RecipeError(f"perceptual {error}") from error
        if not isinstance(found, Mapping):
            raise RecipeError(f"perceptual {file}: holds a {type(found).__name__}. Give tensors by name.")
        tensors.update({str(key): value for key, value in found.items() if isinstance(value, Tensor)})
    return LPIPS.from_tensors(tensors, name_or_path).eval().requires_grad_(False)
