"""The previewer: Stable Cascade's layers, and what comes out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shoestring.models.latent_previewer import LatentPreviewer

PUBLISHED = {
    0: (512, 16, 1, 1),
    3: (512, 512, 3, 3),
    6: (512, 256, 2, 2),  # a transposed convolution has its input first
    9: (256, 256, 3, 3),
    12: (256, 128, 2, 2),
    15: (128, 128, 3, 3),
    18: (128, 128, 2, 2),
    21: (128, 128, 3, 3),
    24: (3, 128, 1, 1),
}
"""Place in `blocks` -> shape of the convolution, in Stability-AI/StableCascade, modules/previewer.py."""


def test_names_and_shapes_are_stable_cascades() -> None:
    """Nine convolutions, with a norm two places after each but the last."""
    with torch.device("meta"):
        state = LatentPreviewer().state_dict()
    expected: dict[str, tuple[int, ...]] = {}
    for place, shape in PUBLISHED.items():
        width = shape[1] if place in (6, 12, 18) else shape[0]
        expected |= {f"blocks.{place}.weight": shape, f"blocks.{place}.bias": (width,)}
        if place != 24:
            norm = f"blocks.{place + 2}"
            expected |= {f"{norm}.{n}": (width,) for n in ("weight", "bias", "running_mean", "running_var")}
            expected[f"{norm}.num_batches_tracked"] = ()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected


@pytest.mark.parametrize("shape", [(2, 16, 4, 6), (1, 4, 3, 3)])
def test_a_cell_becomes_eight_by_eight_pixels_in_range(shape: tuple[int, ...], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LatentPreviewer(c_in=shape[1], c_hidden=32).eval()
    latents = 30 * torch.randn(shape)
    with torch.no_grad():
        pictures = model(latents)
        assert pictures.shape == (shape[0], 3, 8 * shape[2], 8 * shape[3])
        assert pictures.min() >= 0
        assert pictures.max() <= 1
        model.save_pretrained(tmp_path)
        assert torch.equal(LatentPreviewer.from_pretrained(tmp_path)(latents), pictures)


def test_it_learns_a_picture_from_its_code() -> None:
    """In training nothing is clamped, so that a pixel that is out of range can come back."""
    torch.manual_seed(0)
    model = LatentPreviewer(c_in=4, c_hidden=16)
    latents, pictures = torch.randn(4, 4, 2, 2), torch.rand(4, 3, 16, 16).round()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = (model(latents) - pictures).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
