"""Batch norm over processes: on one it is torch's, on several it sees the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shoestring.models.synced_norm import SyncedBatchNorm2d, _Normalise
from tests.models.synced_norm_of_many import VARIANTS, found_by

HERE = Path(__file__).parent

Found = dict[str, Tensor]
Launch = Callable[..., list[Any]]


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"eps": 1e-3, "momentum": None}])
@pytest.mark.parametrize("training", [True, False])
def test_on_one_process_it_is_torchs_bit_for_bit(options: dict[str, Any], training: bool) -> None:
    torch.manual_seed(0)
    ours, theirs = SyncedBatchNorm2d(6, **options), nn.BatchNorm2d(6, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    for norm in (ours, theirs):
        norm.train(training)
    for _ in range(2):
        x = torch.randn(3, 6, 5, 4)
        one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, expected = ours(one), theirs(other)
        assert torch.equal(y, expected)
        y.square().sum().backward()
        expected.square().sum().backward()
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad)
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[name]), name


@pytest.fixture(scope="module")
def found(launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    """What two processes find together, by variant."""
    folder = tmp_path_factory.mktemp("norms")
    done = launch(2, HERE / "synced_norm_of_many.py", folder / "found.pt", cwd=folder, timeout=60)
    assert [each.returncode for each in done] == [0, 0], done[0].stderr
    return torch.load(folder / "found.pt", weights_only=True)  # type: ignore[no-any-return]


@pytest.mark.parametrize("variant", ["unequal", "one has nothing", "exact"])
def test_two_processes_equal_one_on_the_whole_batch(variant: str, found: dict[str, Found]) -> None:
    """Outputs, gradients of inputs and weights, running statistics, and evaluation with them.

    To 1e-5 of each tensor's size in float32, to 1e-11 in float64.
    """
    starts, *options = VARIANTS[variant]
    alone = found_by((0, starts[-1]), *options)
    assert set(found[variant]) == set(alone)
    for name, expected in alone.items():
        limit = (1e-11 if variant == "exact" else 1e-5) * expected.abs().max().clamp(min=1)
        assert (found[variant][name] - expected).abs().max() <= limit, name


def test_statistics_are_float32_under_autocast(found: dict[str, Found]) -> None:
    """In bfloat16, two processes equal one to bfloat16's rounding, their running statistics to float32's."""
    starts, *options = VARIANTS["autocast"]
    ours, alone = found["autocast"], found_by((0, starts[-1]), *options)
    assert ours["0.y"].dtype == torch.bfloat16
    torch.testing.assert_close(ours["0.y"], alone["0.y"], rtol=0.02, atol=0.05)
    for name in ("1.running_mean", "1.running_var"):
        assert ours[name].dtype == torch.float32
        torch.testing.assert_close(ours[name], alone[name], rtol=1e-5, atol=1e-5)


def test_the_backward_pass_is_the_derivative_of_the_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """On one process `_Normalise` must give torch's own derivative of a norm by batch statistics."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)  # a world of one
    torch.manual_seed(0)
    x, weight, bias = torch.randn(4, 3, 5, 2) * 3 + 1, torch.randn(3), torch.randn(3)
    mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    ours, theirs = ([each.clone().requires_grad_() for each in (x, weight, bias)] for _ in range(2))
    y = _Normalise.apply(*ours, mean, torch.rsqrt(variance + 1e-5), torch.tensor(40.0))
    expected = nn.functional.batch_norm(theirs[0], None, None, *theirs[1:], training=True)
    torch.testing.assert_close(y, expected)
    y.sin().sum().backward()
    expected.sin().sum().backward()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-5)
