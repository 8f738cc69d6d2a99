"""How benchmarks measure and tell: medians of alternated runs, one JSON line a figure.

{"benchmark", "metric", "value", "unit", ...settings, "hardware"}
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from shoestring.runtime import cpu_name


def tell(benchmark: str, metric: str, value: float, unit: str, hardware: str = "", **settings: Any) -> None:
    """Print one figure, rounded to four significant digits."""
    figure = {"benchmark": benchmark, "metric": metric, "value": float(f"{value:.4g}"), "unit": unit}
    print(json.dumps({**figure, **settings, "hardware": hardware or cpu_name()}), flush=True)


def hardware(device: torch.device) -> str:
    """What a figure was measured on."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that the clock shows work done and not work asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(
    work: Callable[[], object],
    device: torch.device | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Wall time of one call, or what another clock says."""
    start = clock()
    work()
    if device is not None:
        synchronize(device)
    return clock() - start


def alternated(
    works: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of each work, the works taking turns so that a slow moment of the machine hits all.

    Every work runs once before the clock starts.
    """
    for work in works.values():
        seconds(work, device)
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            times[name].append(seconds(work, device, clock))
    return {name: statistics.median(taken) for name, taken in times.items()}
