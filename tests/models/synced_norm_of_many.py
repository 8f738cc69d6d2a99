"""Run by `launch`: one batch through a small network with synced norms, in parts. Its one argument is a file.

Process r takes rows [starts[r], starts[r + 1]) of each variant's batch; what all find goes to the file.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shoestring.models.synced_norm import SyncedBatchNorm2d
from shoestring.processes import end, join

VARIANTS: dict[str, tuple[tuple[int, int, int], float | None, torch.dtype]] = {
    "unequal": ((0, 3, 7), 0.1, torch.float32),
    "exact": ((0, 5, 7), 0.1, torch.float64),
    "one has nothing": ((0, 7, 7), None, torch.float32),
    "autocast": ((0, 3, 7), 0.1, torch.bfloat16),
}
"""Name -> rows of each of two processes, momentum, type of the arithmetic."""


def found_by(starts: tuple[int, ...], momentum: float | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """Two training steps, and an evaluation after them.

    Outputs and input gradients of all rows, weight gradients averaged as data parallelism does, running
    statistics.
    """
    world = len(starts) - 1
    rank = dist.get_rank() if world > 1 else 0
    mine = slice(starts[rank], starts[rank + 1])
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 5, 3),
        SyncedBatchNorm2d(5, eps=1e-3, momentum=momentum),
        nn.SiLU(),
        nn.Conv2d(5, 4, 1, bias=False),
        SyncedBatchNorm2d(4, affine=False, momentum=momentum),
    )
    with torch.no_grad():
        assert network[0].bias is not None
        # So far from 0 that sums of squares would lose the variance. The norm takes it away again: its own
        # gradient is nothing but rounding.
        network[0].bias.fill_(30).requires_grad_(False)
        network[1].weight.normal_(1, 0.3)
        network[1].bias.normal_()
    images, targets = torch.randn(7, 3, 8, 6), torch.randn(7, 4, 6, 4)
    if dtype == torch.float64:
        network, images, targets = network.double(), images.double(), targets.double()
    found: dict[str, Tensor] = {}
    for step in range(2):
        x = images[mine].clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = network(x)
        network.zero_grad()
        # A row is one of 7 in the average over processes.
        ((y.to(targets.dtype) - targets[mine]).square().sum() * world / 7).backward()
        for name, parameter in network.named_parameters():
            if not parameter.requires_grad:
                continue
            assert parameter.grad is not None
            found[f"{step}.{name}"] = _sum(parameter.grad, world) / world
        assert x.grad is not None
        for name, rows in (("y", y.detach()), ("x", x.grad / world)):
            whole = rows.new_zeros(starts[-1], *rows.shape[1:])
            whole[mine] = rows
            found[f"{step}.{name}"] = _sum(whole, world)
    found |= dict(network.named_buffers())
    network.eval()
    found["evaluated"] = network(images).detach()
    return found


def _sum(tensor: Tensor, world: int) -> Tensor:
    if world > 1:
        dist.all_reduce(tensor)
    return tensor


if __name__ == "__main__":
    with join("cpu") as (everyone, _):
        found = {name: found_by(*variant) for name, variant in VARIANTS.items()}
        if everyone.is_main:
            torch.save(found, sys.argv[1])
    end(0)
