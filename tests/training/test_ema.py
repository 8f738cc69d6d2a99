"""Averages of weights against the closed form."""

from __future__ import annotations

import torch

from shoestring.training.ema import EMA


def test_averages_have_their_closed_form() -> None:
    """After weights 1, 2, 3 from 0: sum over k of (1 - d) d^(3 - k) k, for each decay."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    ema = EMA(model, [0.9, 0.5])
    for value in (1.0, 2.0, 3.0):
        torch.nn.init.constant_(model.weight, value)
        ema.update()
    for decay, average in zip(ema.decays, ema.averages, strict=True):
        expected = sum((1 - decay) * decay ** (3 - k) * k for k in (1, 2, 3))
        assert torch.allclose(average[0], torch.tensor([[expected]]))


def test_averages_and_their_state_go_by_the_names_of_what_is_trained() -> None:
    model = torch.nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    ema = EMA(model, [0.9, 0.99])
    torch.nn.init.ones_(model.weight)
    ema.update()
    assert list(ema.state()) == ["0.9/weight", "0.99/weight"]
    assert torch.equal(ema.average(1)["weight"], ema.state()["0.99/weight"])
    ema.state()["0.9/weight"].zero_()
    assert not ema.average(0)["weight"].any(), "the state is alive, to be filled from a checkpoint"
