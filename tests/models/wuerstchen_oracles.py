"""What the tests of Würstchen's networks share: random weights everywhere, and comparisons with diffusers."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def randomize(network: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every parameter and every running statistic, also what is zero at the start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if not tensor.is_floating_point():
                continue
            drawn = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(drawn.abs() + 0.5 if name.endswith("running_var") else 0.2 * drawn)
    return network


def shake(network: nn.Module, small: float) -> None:
    """Random numbers in every tensor, so that none is without effect; signals keep their size.

    `small` is the deviation of what is no matrix or kernel.
    """
    torch.manual_seed(0)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif tensor.ndim in (2, 4) and len(tensor) > 1:
                tensor.normal_(std=tensor[0].numel() ** -0.5)
            elif tensor.is_floating_point():
                tensor.normal_(std=small)


def relative(ours: Tensor, theirs: Tensor) -> float:
    """The distance of two tensors in units of the second."""
    assert ours.shape == theirs.shape
    return float(((ours - theirs).norm() / theirs.norm()).detach())


def shapes(network: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in network.state_dict().items()}


def arguments(network_class: Any) -> dict[str, Any]:
    """Names of a constructor's arguments, in order, with their defaults; a tuple counts as a list."""
    signature = inspect.signature(network_class.__init__)
    defaults = {name: p.default for name, p in signature.parameters.items() if name != "self"}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in defaults.items()}


def gradients(network: nn.Module, run: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Gradients of a fixed random function of what `run` gives, by parameter."""
    network.zero_grad()
    output = run()
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(7))
    (output * weights).sum().backward()
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def largest_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Of the gradients of two networks with the same parameters, relative to the largest gradient."""
    assert ours.keys() == theirs.keys()
    scale = max(float(gradient.norm()) for gradient in theirs.values())
    return max(float((ours[name] - theirs[name]).norm()) for name in theirs) / scale


def assert_dropout_is_the_same(ours: nn.Module, theirs: nn.Module, given: Any) -> None:
    """In training mode and from one seed both drop the same, and another draw drops something else."""
    theirs.load_state_dict(ours.state_dict())
    outputs = []
    for network in (ours.train(), theirs.train(), ours):
        if network is theirs or not outputs:
            torch.manual_seed(0)
        outputs.append(network(*given))
    assert relative(outputs[0], outputs[1]) < 1e-5
    assert relative(outputs[2], outputs[1]) > 1e-2


def saved_numbers(run: Callable[[], Tensor]) -> int:
    """How many numbers a forward pass keeps for the backward pass, weights and all."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = run()
    assert output.requires_grad
    return sum(kept.values())
