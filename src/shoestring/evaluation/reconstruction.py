"""How well an autoencoder gives pictures back: PSNR, SSIM, scenes still right, and how much it compresses.

Pictures are (B, 3, H, W) in [0, 1]. Figures are `MetricRow`s, as everywhere in evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from shoestring.data.scenes import Scene
from shoestring.evaluation.run import mean_row, scene_accuracy
from shoestring.interfaces import MetricRow

WINDOW, SIGMA = 11, 1.5  # of SSIM's Gaussian window, in pixels
K1, K2 = 0.01, 0.03  # SSIM's constants, as shares of the range of values
PSNR_CEILING = 100.0  # dB; counted for a picture given back exactly, whose PSNR is infinite
PIXELS_AT_ONCE = 2**20  # SSIM holds about twenty numbers of eight bytes for each of them and each colour


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture in dB: -10 log10 of the mean squared error, (B,).

    Infinite for equal pictures.
    """
    return -10 * torch.log10((a - b).square().mean(dim=(1, 2, 3)))


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of each picture, (B,): 1 for equal ones, mean over colours and places.

        (2 mu_a mu_b + C1) (2 cov_ab + C2) / ((mu_a^2 + mu_b^2 + C1) (var_a + var_b + C2))

    with C = K^2 for values in [0, 1] and moments under a Gaussian window of 11 pixels, sigma 1.5, at each
    place where it lies within the picture (Wang, Bovik, Sheikh and Simoncelli 2004, equation 13). Raises
    `ValueError` for pictures smaller than the window.
    """
    if min(a.shape[-2:]) < WINDOW:
        raise ValueError(f"SSIM's window is {WINDOW} pixels wide; the pictures are {tuple(a.shape[-2:])}.")
    moments = _windowed(torch.cat([a, b, a * a, b * b, a * b]))  # 5 x (B, 3, H - 10, W - 10)
    mu_a, mu_b, square_a, square_b, product = moments.chunk(5)
    var_a, var_b, cov = square_a - mu_a**2, square_b - mu_b**2, product - mu_a * mu_b
    alike = (2 * mu_a * mu_b + K1**2) * (2 * cov + K2**2)
    most = (mu_a**2 + mu_b**2 + K1**2) * (var_a + var_b + K2**2)
    return (alike / most).mean(dim=(1, 2, 3))


@torch.no_grad()
def reconstruction_rows(
    originals: Tensor,
    reconstructions: Tensor,
    split: str,
    metric_prefix: str = "reconstruction",
    *,
    scenes: Sequence[Scene] | None = None,
) -> list[MetricRow]:
    """`<prefix>_psnr` and `<prefix>_ssim`: means over pictures (B, 3, H, W) in [0, 1], with 95 % intervals.

    Computed in float64 on the CPU. With the pictures' `scenes` also `<prefix>_accuracy`, the exact scene
    accuracy of the reconstructions by facet: the ceiling of what a model of these latents can score. SSIM of
    pictures smaller than its window is a row that says so.
    """
    if originals.shape != reconstructions.shape:
        raise ValueError(f"pictures {tuple(originals.shape)}, given back {tuple(reconstructions.shape)}")
    pairs = list(zip(_parts(originals), _parts(reconstructions), strict=True))
    ratios = torch.cat([psnr(a, b).clamp(max=PSNR_CEILING) for a, b in pairs])
    rows = [mean_row(ratios, split, "all", metric=f"{metric_prefix}_psnr")]
    if min(originals.shape[-2:]) < WINDOW:
        why = f"unavailable: pictures of {min(originals.shape[-2:])} px, a window of {WINDOW}"
        rows.append(_row(f"{metric_prefix}_ssim", split, None, why))
    else:
        likeness = torch.cat([ssim(a, b) for a, b in pairs])
        rows.append(mean_row(likeness, split, "all", metric=f"{metric_prefix}_ssim"))
    if scenes is None:
        return rows
    seen = _as_bytes(reconstructions)
    return [*rows, *scene_accuracy(seen, scenes, split, metric=f"{metric_prefix}_accuracy")[0]]


def compression(image: Sequence[int], latent: Sequence[int], split: str = "all") -> list[MetricRow]:
    """How much smaller a latent (C, h, w) is than its picture (3, H, W).

    `compression_spatial`    sqrt(H W / (h w)), pixels along a side of a cell: 42.67 for Wuerstchen
    `compression_elements`   3 H W / (C h w), numbers for a number: 341.3
    """
    places, elements = math.prod(image[1:]) / math.prod(latent[1:]), math.prod(image) / math.prod(latent)
    ratios = {"compression_spatial": math.sqrt(places), "compression_elements": elements}
    return [_row(metric, split, ratio, "exact") for metric, ratio in ratios.items()]


def _row(metric: str, split: str, value: float | None, status: str) -> MetricRow:
    """A figure that is no mean over images."""
    return MetricRow(
        metric=metric, split=split, facet="all", value=value, low=None, high=None, n=0, status=status
    )


def _windowed(pictures: Tensor) -> Tensor:
    """Means under the Gaussian window at every place where it fits: (N, C, H, W) -> (N, C, H-10, W-10)."""
    offsets = torch.arange(WINDOW, dtype=pictures.dtype, device=pictures.device) - WINDOW // 2
    weights = torch.exp(-(offsets**2) / (2 * SIGMA**2))
    weights = weights / weights.sum()
    flat = pictures.flatten(0, 1)[:, None]  # (N C, 1, H, W)
    across = F.conv2d(flat, weights.view(1, 1, 1, -1))
    return F.conv2d(across, weights.view(1, 1, -1, 1)).squeeze(1).unflatten(0, pictures.shape[:2])


def _parts(pictures: Tensor) -> list[Tensor]:
    """A few pictures at a time, as float64 on the CPU."""
    most = max(1, PIXELS_AT_ONCE // max(1, math.prod(pictures.shape[-2:])))
    return [part.cpu().double() for part in pictures.split(most)]


def _as_bytes(pictures: Tensor) -> NDArray[np.uint8]:
    """Pictures as they would be saved: (B, H, W, 3) uint8."""
    whole = pictures.detach().clamp(0, 1).mul(255).round().to(torch.uint8)
    return np.asarray(whole.permute(0, 2, 3, 1).cpu().numpy())
