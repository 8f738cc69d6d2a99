"""Counted operations against closed forms, and the measured peak against plausibility."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import nn

from shoestring.cost.flops import forward_flops, matmul_peak, training_flops_per_image
from shoestring.interfaces import Batch, Loss, Objective
from shoestring.pipelines.memory_parts import SDXL_VAE


class Layers(Objective):
    """A linear layer from the text's C to D, then a convolution or attention, each of known cost."""

    def __init__(self, kind: str) -> None:
        super().__init__({"linear": nn.Linear(16, 24), "conv": nn.Conv2d(3, 8, 3, padding=1, bias=False)})
        self.kind = kind

    def forward(self, batch: Batch) -> Loss:
        if self.kind == "conv":
            return Loss(self.trained["conv"](batch.latents).flatten(1).mean(1))
        y = self.trained["linear"](batch.text)
        if self.kind == "attention":
            y = nn.functional.scaled_dot_product_attention(y[:, None], y[:, None], y[:, None])
        return Loss(y.flatten(1).mean(1))


LINEAR = 2 * 10 * 16 * 24  # L tokens, C -> D
CONV = 2 * 8 * 8 * 3 * 8 * 9
ATTENTION = 2 * (2 * 10 * 10 * 24)  # queries with keys, weights with values


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("linear", 2 * LINEAR),  # forward and the weights' gradient; the input needs none
        ("conv", 2 * CONV),
        ("attention", 2 * LINEAR + 3 * ATTENTION),
    ],
)
@pytest.mark.parametrize("rows", [1, 4])
def test_operations_of_one_image_equal_the_closed_form(kind: str, expected: float, rows: int) -> None:
    with torch.device("meta"):
        objective = Layers(kind)
    batch = Batch(torch.arange(rows), torch.zeros(rows, 3, 8, 8), torch.zeros(rows, 10, 16), None)
    assert training_flops_per_image(objective, batch) == expected
    assert all(parameter.grad is None for parameter in objective.parameters())


def test_the_measured_peak_is_a_rate_of_matrix_products() -> None:
    peak = matmul_peak(torch.device("cpu"), torch.float32, size=256, seconds=0.05)
    assert 1e8 < peak < 1e15


def test_a_forward_alone_is_counted_by_its_closed_form() -> None:
    with torch.device("meta"):
        layers = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16))
        assert forward_flops(layers, torch.empty(10, 16)) == 2 * LINEAR
        assert forward_flops(nn.Conv2d(3, 8, 3, padding=1), torch.empty(1, 3, 8, 8)) == CONV


def test_decoders_of_sdxl_cost_what_was_counted_elsewhere() -> None:
    """At 1024 px 10.47 and 0.565 TFLOP: the decoder of few steps is where the time goes."""
    latents = torch.empty(1, 4, 128, 128, device="meta")
    for kind, expected in ((AutoencoderKL(**SDXL_VAE), 10.47e12), (AutoencoderTiny(), 0.565e12)):
        counted = forward_flops(kind.to("meta"), latents, method="decode")
        assert counted == pytest.approx(expected, rel=0.001)
