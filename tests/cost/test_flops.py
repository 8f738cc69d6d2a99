"""Counted operations against closed forms, and the measured peak against plausibility."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shoestring.cost.flops import matmul_peak, training_flops_per_image
from shoestring.interfaces import Batch, Loss, Objective


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
