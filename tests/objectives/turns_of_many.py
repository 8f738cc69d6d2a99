"""Run by `launch`: steps of Stage A's two turns, shared by the processes. Its one argument is a file."""

from __future__ import annotations

import sys

import torch
from torch import nn

from shoestring.interfaces import Batch
from shoestring.models.patch_discriminator import PatchDiscriminator
from shoestring.models.wuerstchen_vqgan import PaellaVQModel
from shoestring.objectives.reconstruction import DiscriminatorObjective, ReconstructionObjective
from shoestring.processes import World, end, join
from shoestring.training.parallel import ParallelSettings, distribute

STEPS, BATCH = 6, 4


def losses(world: World) -> list[list[float]]:
    """The mean loss of each turn at each step, and at last the sum of all weights of each network."""
    torch.manual_seed(0)
    vqgan = PaellaVQModel(embed_dim=8, bottleneck_blocks=1, num_vq_embeddings=16)
    vqgan.norm.eval()  # its statistics are those of a process's own images
    discriminator = PatchDiscriminator(c_hidden=16, depth=3)
    makes = ReconstructionObjective(vqgan, seed=0, discriminator=discriminator, crop=24, adversarial_weight=1)
    judges = DiscriminatorObjective(discriminator, vqgan, seed=0, crop=24)
    makes.adversarial = True
    found = []
    callers = [distribute(each, ParallelSettings(), world, torch.device("cpu")) for each in (makes, judges)]
    rates = [torch.optim.SGD(each.trained.parameters(), 0.05) for each in (makes, judges)]
    for step in range(STEPS):
        index = torch.arange(step * BATCH, (step + 1) * BATCH)
        images = torch.rand(BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(step)) * 2 - 1
        whole = Batch(index, images, torch.zeros(BATCH, 1, 2), None)
        batch = list(whole.parts(world.size))[world.rank]
        row = []
        for caller, optimizer in zip(callers, rates, strict=True):
            optimizer.zero_grad()
            loss = caller(batch).per_sample.sum() * (world.size / BATCH)
            loss.backward()
            optimizer.step()
            row.append(world.sum(loss.detach() / world.size).item())
        found.append(row)
    return [*found, [weight_sum(vqgan), weight_sum(discriminator)]]


def weight_sum(network: nn.Module) -> float:
    return sum(weight.double().abs().sum().item() for weight in network.state_dict().values())


if __name__ == "__main__":
    with join("cpu") as (world, _):
        result = losses(world)
        if world.is_main:
            torch.save(result, sys.argv[1])
    end(0)
