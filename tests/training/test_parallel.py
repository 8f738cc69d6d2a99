"""Several processes: the same run as one, whatever their number; and one voice when one of them fails."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shoestring.errors import RecipeError
from shoestring.processes import ALONE, World
from shoestring.training.muon import orthogonalised
from shoestring.training.optimizers import OptimizerSettings, make_optimizers
from shoestring.training.parallel import blocks, check_batches, passes

HERE = Path(__file__).parent
RECIPE = HERE.parent / "cli" / "tiny.yaml"
DENSE = "train.microbatch=6,phases.0.images=480,optimizer.kind=adamw"
MUON = "train.microbatch=6,phases.0.images=480,optimizer.kind=muon"
EXPERTS = "phases.0.images=480,model.depth=3,model.num_experts=4"
FSDP2 = ",parallel.kind=fsdp2"

Launch = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def steps(launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """`steps(processes, variants)`: figures of twenty steps of each variant."""
    folder = tmp_path_factory.mktemp("steps")

    def run(processes: int, variants: tuple[str, ...]) -> dict[str, Any]:
        out = folder / f"{processes}-{len(list(folder.iterdir()))}.json"
        done = launch(processes, HERE / "steps_of_many.py", RECIPE, out, *variants, cwd=folder)
        assert [each.returncode for each in done] == [0] * processes, done[0].stderr
        found: dict[str, Any] = json.loads(out.read_text())
        return found

    return run


@pytest.fixture(scope="module")
def alone(steps: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return steps(1, (DENSE, MUON, EXPERTS))


def furthest(one: dict[str, Any], other: dict[str, Any], what: str = "losses") -> float:
    return max(abs(a - b) for a, b in zip(one[what], other[what], strict=True))


def check_same_run(found: dict[str, Any], alone: dict[str, Any], sharded: str) -> None:
    """The promises of docs/cluster.md."""
    for variant, base, limit in (
        (DENSE, DENSE, 1e-5),
        (DENSE + sharded, DENSE, 1e-5),
        (MUON, MUON, 1e-3),
        (MUON + sharded, MUON, 1e-3),
        (EXPERTS + sharded, EXPERTS, 1e-2),  # a token may go to another expert for a rounding error
    ):
        one, other = found[variant], alone[base]
        assert one["seen"] == other["seen"], "the same global batches"
        assert one["levels"] == other["levels"], "the same noise levels"
        assert furthest(one, other) < limit, variant
        assert furthest(one, other, "norms") < 100 * limit, variant
        assert one["weights"] == pytest.approx(other["weights"], rel=100 * limit)


def test_two_processes_take_the_same_steps_as_one(
    steps: Callable[..., dict[str, Any]], alone: dict[str, Any]
) -> None:
    """DDP and FSDP2, AdamW and Muon, dense and with experts."""
    variants = (DENSE, DENSE + FSDP2, MUON, MUON + FSDP2, EXPERTS + FSDP2)
    check_same_run(steps(2, variants), alone, FSDP2)


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["", ",parallel.shard=2"])
def test_four_processes_take_the_same_steps_as_one(
    steps: Callable[..., dict[str, Any]], alone: dict[str, Any], shard: str
) -> None:
    """Over all four, and in two groups of two."""
    sharded = FSDP2 + shard
    variants = (DENSE, DENSE + sharded, MUON, MUON + sharded, EXPERTS + sharded)
    check_same_run(steps(4, variants), alone, sharded)


def test_recomputed_activations_change_no_bit(
    steps: Callable[..., dict[str, Any]], alone: dict[str, Any]
) -> None:
    recomputed = DENSE + ",train.activation_checkpointing=true"
    found = steps(1, (recomputed,))[recomputed]
    assert found["losses"] == alone[DENSE]["losses"]
    assert found["weights"] == alone[DENSE]["weights"]


# --- pieces ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 8), (4, 12), (12, 4)])
def test_our_iteration_is_the_one_of_torch(shape: tuple[int, int]) -> None:
    """One step of torch's Muon on a zero matrix shows its iteration: equal bit for bit."""
    torch.manual_seed(0)
    matrix = nn.Parameter(torch.zeros(shape))
    matrix.grad = torch.randn(shape)
    torch.optim.Muon([matrix], lr=1.0, momentum=0.0, weight_decay=0.0).step()
    ours = -math.sqrt(max(1, shape[0] / shape[1])) * orthogonalised(matrix.grad.bfloat16()).float()
    assert torch.equal(matrix, ours)


def test_state_is_prepared_as_it_was_saved() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2))
    one = make_optimizers(model, OptimizerSettings(kind="muon"))
    model(torch.ones(1, 3)).sum().backward()
    one.step()
    saved = {name: tensor.clone() for name, tensor in one.state().items()}
    other = make_optimizers(model, OptimizerSettings(kind="muon"))
    other.prepare(list(saved))
    shapes = {name: (tensor.shape, tensor.dtype, tensor.device) for name, tensor in other.state().items()}
    assert shapes == {name: (tensor.shape, tensor.dtype, tensor.device) for name, tensor in saved.items()}


@pytest.mark.parametrize(
    ("count", "microbatch", "size", "number"),
    [(48, None, 1, 1), (48, 16, 1, 3), (48, 16, 4, 1), (10, 2, 4, 2), (7, None, 4, 1), (50, 16, 2, 2)],
)
def test_every_process_makes_as_many_passes(
    count: int, microbatch: int | None, size: int, number: int
) -> None:
    world = World(size=size)
    assert passes(count, microbatch, world) == number
    for rank in range(size):
        images = count * (rank + 1) // size - count * rank // size
        assert images >= number
        assert microbatch is None or -(-images // number) <= microbatch


def test_a_batch_too_small_for_the_processes_is_refused() -> None:
    check_batches("phases.0.batch", [8, 4], None, World(size=4))
    with pytest.raises(RecipeError, match=r"phases\.0\.batch: a batch of 3 images .* 4 processes.*multiple"):
        check_batches("phases.0.batch", [8, 3], None, World(size=4))
    check_batches("phases.0.batch", [1], 1, ALONE)


def test_blocks_are_what_the_outermost_lists_hold() -> None:
    inner = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    block = nn.Sequential(nn.Linear(2, 2), inner)
    model = nn.ModuleDict({"a": nn.ModuleList([block, nn.Identity()]), "b": nn.Linear(2, 2)})
    assert list(blocks(model)) == [block]
