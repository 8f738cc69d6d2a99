"""Floating-point operations of a training step, counted by torch while the objective runs on shapes alone."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from shoestring.interfaces import Batch, Objective


def training_flops_per_image(objective: Objective, batch: Batch) -> float:
    """Forward and backward operations of one image (a multiply-add is 2), on the meta device.

    `objective` must have its parameters on the meta device; only the shapes of `batch` matter. Counts matrix
    products, convolutions and attention, as torch's `FlopCounterMode` does; not elementwise work.
    """
    shapes = batch.to(torch.device("meta"))
    with FlopCounterMode(display=False) as counter:
        objective(shapes).per_sample.mean().backward()
    objective.zero_grad(set_to_none=True)
    return counter.get_total_flops() / len(batch)


@torch.no_grad()
def forward_flops(module: nn.Module, *inputs: Any, method: str = "forward", **named: Any) -> int:
    """Operations of one forward without gradients, counted likewise; `method` is called in its place.

    Module and tensors may lie on the meta device: then a network of any size is counted without memory.
    """
    call = module if method == "forward" else getattr(module, method)
    with FlopCounterMode(display=False) as counter:
        call(*inputs, **named)
    return counter.get_total_flops()


def matmul_peak(device: torch.device, dtype: torch.dtype, size: int = 2048, seconds: float = 1.0) -> float:
    """Measured FLOP/s of a size x size matrix product on this machine: best of repeated runs."""
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    best, stop = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < stop:
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best
