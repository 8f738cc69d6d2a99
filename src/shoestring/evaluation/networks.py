"""Networks side by side: parameters, operations and time of one forward pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from shoestring.interfaces import MetricRow

ROUNDS = 9


@torch.no_grad()
def network_rows(
    networks: Mapping[str, nn.Module], forward: Callable[[nn.Module], Any], device: torch.device
) -> list[MetricRow]:
    """Rows `parameters`, `forward_flops` and `forward_ms`, a facet for each network.

    `forward` runs one pass. Times are medians of rounds in which every network takes its turn, so that what
    else the machine does falls on all alike; operations as torch's `FlopCounterMode` counts them.
    """
    taken: dict[str, list[float]] = {name: [] for name in networks}
    rows = []
    for name, network in networks.items():
        with FlopCounterMode(display=False) as counter:  # the warm-up, too
            forward(network)
        rows.append(_row("parameters", name, sum(each.numel() for each in network.parameters())))
        rows.append(_row("forward_flops", name, counter.get_total_flops()))
    for _ in range(ROUNDS):
        for name, network in networks.items():
            started = time.perf_counter()
            forward(network)
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            taken[name].append(time.perf_counter() - started)
    return [*rows, *(_row("forward_ms", name, 1000 * median(times)) for name, times in taken.items())]


def _row(metric: str, facet: str, value: float) -> MetricRow:
    return MetricRow(
        metric=metric,
        split="network",
        facet=facet,
        value=float(value),
        low=None,
        high=None,
        n=1,
        status="exact" if metric != "forward_ms" else "real",
    )
