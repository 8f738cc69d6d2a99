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


def test_applied_lends_the_average_and_gives_the_weights_back() -> None:
    model = torch.nn.Linear(3, 2)
    ema = EMA(model, [0.9])
    own = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    moved = [p.detach().clone() for p in model.parameters()]
    with ema.applied():
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), own, strict=True))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), moved, strict=True))


def test_the_state_comes_back() -> None:
    model = torch.nn.Linear(3, 2)
    first = EMA(model, [0.9, 0.99])
    torch.nn.init.ones_(model.weight)
    first.update()
    second = EMA(model, [0.9, 0.99])
    second.load_state(first.state())
    pairs = zip(first.state().values(), second.state().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
