"""Figures of networks side by side: counted by hand, and timed when the device is done."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from shoestring.evaluation.networks import ROUNDS, network_rows

NETWORKS = {"small": nn.Linear(3, 5), "large": nn.Linear(3, 50)}


def ask(network: nn.Module) -> Any:
    return network(torch.ones(2, 3))


def test_parameters_and_operations_are_counted() -> None:
    rows = network_rows(NETWORKS, ask, torch.device("cpu"))
    found = {(row["metric"], row["facet"]): row["value"] for row in rows}
    assert found["parameters", "small"] == 3 * 5 + 5
    assert found["forward_flops", "large"] == 2 * (2 * 3 * 50)
    assert found["forward_ms", "large"] > 0


@pytest.mark.parametrize(("device", "waits"), [("cpu", 0), ("mps", 2 * ROUNDS), ("cuda:1", 2 * ROUNDS)])
def test_a_time_ends_when_the_device_has_computed(
    device: str, waits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every accelerator only takes note of what it is to do."""
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    network_rows(NETWORKS, ask, torch.device(device))
    assert waited == [torch.device(device)] * waits
