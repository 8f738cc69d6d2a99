"""Run by `launch`: steps of a student and its teacher, shared by the processes.

python steps_of_many.py OUT KIND ...      KIND: ddp or fsdp2
"""

from __future__ import annotations

import sys

import torch

from shoestring.processes import World, end, join
from shoestring.training.parallel import ParallelSettings, distribute, gathered
from tests.distill.networks import make_batch, make_objective

STEPS, BATCH = 3, 4


def losses(world: World, kind: str) -> list[float]:
    """The mean loss at each step over the batch of all processes, and at last the sum of all weights."""
    objective = make_objective(caption_drop=0.5, timesteps="mixed")
    teacher = [weight.clone() for weight in objective.frozen.parameters()]
    objective.trained["unet"].enable_gradient_checkpointing()
    caller = distribute(objective, ParallelSettings(kind), world, torch.device("cpu"))
    optimizer = torch.optim.SGD(objective.trained.parameters(), 0.02)
    found = []
    for step in range(STEPS):
        part = list(make_batch(BATCH, first=step * BATCH).parts(world.size))[world.rank]
        optimizer.zero_grad()
        loss = caller(part).per_sample.sum() * (world.size / BATCH)
        loss.backward()
        optimizer.step()
        found.append(world.sum(loss.detach() / world.size).item())
    assert all(map(torch.equal, teacher, objective.frozen.parameters()))
    assert all(weight.grad is None for weight in objective.frozen.parameters())
    weights = gathered(objective.trained.state_dict(), world)
    return [*found, sum(weight.double().abs().sum().item() for weight in weights.values())]


if __name__ == "__main__":
    out, *kinds = sys.argv[1:]
    with join("cpu") as (world, _):
        result = {kind: losses(world, kind) for kind in kinds}
        if world.is_main:
            torch.save(result, out)
    end(0)
