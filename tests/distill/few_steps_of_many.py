"""Run by `launch`: steps of a few-step student and its target, shared by the processes.

python few_steps_of_many.py OUT KIND        KIND: ddp or fsdp2
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from shoestring.distill.few_step import LcmObjective
from shoestring.models.unet_guidance import with_guidance_embedding
from shoestring.objectives.noise import Conditioning, NoiseSchedule
from shoestring.processes import World, end, join
from shoestring.training.parallel import ParallelSettings, distribute, gathered
from tests.distill.small_sdxl import BETAS, CONFIG, make_batch, make_unet

STEPS, BATCH = 3, 4


def train(world: World, kind: str = "ddp") -> dict[str, Tensor]:
    """The weights of student and target after three steps."""
    objective = LcmObjective(
        with_guidance_embedding(make_unet(), 16),
        make_unet(),
        NoiseSchedule.from_config(BETAS),
        Conditioning(CONFIG),
        seed=0,
        target_decay=0.7,
    )
    caller = distribute(objective, ParallelSettings(kind), world, torch.device("cpu"))
    optimizer = torch.optim.SGD([w for w in objective.trained.parameters() if w.requires_grad], 0.05)
    for step in range(STEPS):
        batch = list(make_batch(BATCH, BATCH * step).parts(world.size))[world.rank]
        optimizer.zero_grad()
        (caller(batch).per_sample.sum() * (world.size / BATCH)).backward()
        optimizer.step()
        objective.after_step()
    return gathered(objective.trained.state_dict(), world)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with join("cpu") as (everyone, _):
        weights = train(everyone, sys.argv[2])
        if everyone.is_main:
            torch.save(weights, sys.argv[1])
    end(0)
