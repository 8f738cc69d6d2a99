"""PSNR and SSIM equal closed forms and their definition; a reconstruction's scenes are read exactly."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from shoestring.data.scenes import ScenesSource, render_many
from shoestring.evaluation import reconstruction
from shoestring.evaluation.reconstruction import (
    PSNR_CEILING,
    compression,
    psnr,
    reconstruction_rows,
    ssim,
)
from shoestring.interfaces import MetricRow

Floats = NDArray[np.floating[Any]]
SCENES = [ScenesSource(images=48).scene(row) for row in range(48)]


def pictures(count: int, height: int = 24, width: int = 32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, height, width, generator=generator, dtype=torch.float64)


def rendered(size: int = 32) -> torch.Tensor:
    return torch.from_numpy(render_many(SCENES, size)).permute(0, 3, 1, 2).float() / 255


def direct_ssim(a: Floats, b: Floats) -> float:
    """SSIM of one picture by its definition: at every place, moments under an explicit 11 x 11 window."""
    y, x = np.mgrid[-5:6, -5:6]
    window = np.exp(-(x**2 + y**2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for colour_a, colour_b in zip(a, b, strict=True):
        for top in range(a.shape[1] - 10):
            for left in range(a.shape[2] - 10):
                place = (slice(top, top + 11), slice(left, left + 11))
                p, q = colour_a[place], colour_b[place]
                mean_p, mean_q = (window * p).sum(), (window * q).sum()
                var_p, var_q = (window * (p - mean_p) ** 2).sum(), (window * (q - mean_q) ** 2).sum()
                cov = (window * (p - mean_p) * (q - mean_q)).sum()
                light = (2 * mean_p * mean_q + 1e-4) / (mean_p**2 + mean_q**2 + 1e-4)
                values.append(light * (2 * cov + 9e-4) / (var_p + var_q + 9e-4))
    return float(np.mean(values))


def find(rows: list[MetricRow], metric: str, facet: str = "all") -> MetricRow:
    return next(row for row in rows if (row["metric"], row["facet"]) == (metric, facet))


# --- PSNR ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("offset", "decibels"), [(0.1, 20.0), (-0.01, 40.0), (1.0, 0.0)])
def test_psnr_of_a_constant_offset_is_minus_twenty_log_of_it(offset: float, decibels: float) -> None:
    picture = pictures(2)
    assert psnr(picture, picture + offset).tolist() == pytest.approx([decibels] * 2)


def test_psnr_is_of_each_picture_alone() -> None:
    """Errors of +-0.05 in one, half the pixels off by 0.2 in the other."""
    picture = pictures(2)
    changed = picture.clone()
    changed[0] += torch.where(pictures(1, seed=1)[0] < 0.5, -0.05, 0.05)
    changed[1, ..., ::2] += 0.2
    noise, half = psnr(picture, changed).tolist()
    assert noise == pytest.approx(-20 * math.log10(0.05))
    assert half == pytest.approx(-10 * math.log10(0.02))
    assert psnr(picture, picture).tolist() == [math.inf] * 2


# --- SSIM ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["noise", "blur", "unrelated", "inverted"])
def test_ssim_equals_its_definition(kind: str) -> None:
    a = pictures(2, 13, 17)
    other = {
        "noise": a + 0.1 * torch.randn(a.shape, generator=torch.Generator().manual_seed(2)).double(),
        "blur": torch.nn.functional.avg_pool2d(a, 3, 1, 1),
        "unrelated": pictures(2, 13, 17, seed=9),
        "inverted": 1 - a,
    }[kind]
    expected = [direct_ssim(p.numpy(), q.numpy()) for p, q in zip(a, other, strict=True)]
    assert ssim(a, other).tolist() == pytest.approx(expected, abs=1e-12)
    assert ssim(a.float(), other.float()).tolist() == pytest.approx(expected, abs=1e-5)


def test_ssim_of_equal_pictures_is_one() -> None:
    assert ssim(pictures(3), pictures(3)).tolist() == pytest.approx([1.0] * 3, abs=1e-14)


def test_ssim_of_two_plain_pictures_is_its_light_term() -> None:
    """Without structure, (2 p q + C1) / (p^2 + q^2 + C1)."""
    a, b = torch.full((1, 3, 16, 16), 0.3).double(), torch.full((1, 3, 16, 16), 0.5).double()
    assert ssim(a, b).item() == pytest.approx((2 * 0.15 + 1e-4) / (0.09 + 0.25 + 1e-4), rel=1e-6)


def test_ssim_of_a_constant_offset_keeps_structure_and_loses_light() -> None:
    """Variances and covariance are equal, so the structure term is 1 everywhere and SSIM is near, below 1."""
    a = pictures(1) * 0.5 + 0.25
    assert 0.9 < ssim(a, a + 0.1).item() < 1
    assert ssim(a, a + 0.1).item() > ssim(a, a + 0.2).item()


def test_ssim_refuses_pictures_smaller_than_its_window() -> None:
    with pytest.raises(ValueError, match=r"11 pixels wide; the pictures are \(10, 40\)"):
        ssim(pictures(1, 10, 40), pictures(1, 10, 40))
    assert ssim(pictures(1, 11, 11), pictures(1, 11, 11)).item() == pytest.approx(1.0)


# --- rows ------------------------------------------------------------------------------------------------


def test_rows_are_means_with_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts of two pictures as in one."""
    a = pictures(5)
    b = (a + torch.arange(1, 6).view(-1, 1, 1, 1) * 0.02).float()
    expected = psnr(a, b.double())
    monkeypatch.setattr(reconstruction, "PIXELS_AT_ONCE", 2 * 24 * 32)
    ratio, likeness = reconstruction_rows(a.float(), b, "held_out", "stage_a")
    assert (ratio["metric"], likeness["metric"]) == ("stage_a_psnr", "stage_a_ssim")
    assert ratio["value"] == pytest.approx(expected.mean().item(), rel=1e-6)
    reach = 1.959964 * expected.std().item() / math.sqrt(5)
    assert ratio["low"] is not None
    assert ratio["high"] is not None
    assert (ratio["value"] - ratio["low"], ratio["high"] - ratio["value"]) == pytest.approx((reach, reach))
    assert likeness["value"] == pytest.approx(ssim(a, b.double()).mean().item(), rel=1e-6)
    for row in (ratio, likeness):
        assert (row["split"], row["facet"], row["n"], row["status"]) == ("held_out", "all", 5, "exact")


def test_exact_reconstructions_count_as_the_ceiling() -> None:
    """So that figures stay finite, and one exact picture does not hide the others' errors."""
    a = pictures(2).float()
    b = a.clone()
    b[0] += 0.1
    assert find(reconstruction_rows(a, a, "train"), "reconstruction_psnr")["value"] == PSNR_CEILING
    row = find(reconstruction_rows(a, b, "train"), "reconstruction_psnr")
    assert row["value"] == pytest.approx((PSNR_CEILING + 20) / 2, abs=1e-3)


def test_small_pictures_have_no_ssim_and_none_have_no_figures() -> None:
    small = reconstruction_rows(pictures(2, 8, 8), pictures(2, 8, 8), "train")
    row = find(small, "reconstruction_ssim")
    assert (row["value"], row["status"]) == (None, "unavailable: pictures of 8 px, a window of 11")
    assert all(
        row["value"] is None and row["status"] == "unavailable: no images"
        for row in reconstruction_rows(pictures(0), pictures(0), "train")
    )
    one = reconstruction_rows(pictures(1), pictures(1), "train")
    assert all(row["low"] is None and row["n"] == 1 for row in one)


def test_pictures_of_two_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="given back"):
        reconstruction_rows(pictures(2), pictures(2, 32, 24), "train")


def test_scenes_are_read_in_the_reconstructions_and_not_in_the_originals() -> None:
    """A third is blank: accuracy 2/3; a perfect autoencoder scores 1, even from a half-byte off."""
    originals = rendered()
    changed = originals + 0.4 / 255
    rows = reconstruction_rows(originals, changed, "unseen_scenes", scenes=SCENES)
    assert find(rows, "reconstruction_accuracy")["value"] == 1.0
    changed[::3] = 1.0
    rows = reconstruction_rows(originals, changed, "unseen_scenes", scenes=SCENES)
    row = find(rows, "reconstruction_accuracy")
    assert (row["value"], row["n"], row["split"]) == (pytest.approx(2 / 3), 48, "unseen_scenes")
    assert find(rows, "reconstruction_accuracy", "shape")["value"] == pytest.approx(2 / 3)


def test_compression_is_the_published_one() -> None:
    """1024 px to 16 x 24 x 24: 42.67 along a side, 341 in elements; 1024 x 1536 is the same."""
    for image, latent in (((3, 1024, 1024), (16, 24, 24)), ((3, 1024, 1536), (16, 24, 36))):
        spatial, elements = compression(image, latent)
        assert (spatial["metric"], elements["metric"]) == ("compression_spatial", "compression_elements")
        assert spatial["value"] == pytest.approx(128 / 3)
        assert elements["value"] == pytest.approx(1024 / 3)
        assert (spatial["status"], spatial["n"], spatial["low"]) == ("exact", 0, None)
