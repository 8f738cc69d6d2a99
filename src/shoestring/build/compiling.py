"""`torch.compile` for the networks of a run, with room for every graph that its recipe can need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from shoestring.recipes.schema import Recipe


def compile_network(
    recipe: Recipe, network: nn.Module, parts: Sequence[nn.Module] = (), *, backend: str = "inductor"
) -> None:
    """`torch.compile` a network, or each of its `parts` alone (where FSDP2 gathers weights between them).

    Every phase, mask ratio and size of microbatch gets a graph of its own shapes: the fastest, and the same
    graphs in a resumed run. Only the length of text varies within one. dynamo's limit on graphs, beyond which
    it would run uncompiled with no more than a warning, is raised to what the recipe can need.
    """
    lengths_are_marked = not parts  # by the objective, on what it hands the whole network
    fixed = lengths_are_marked or recipe.data.padded
    for module in parts or (network,):
        module.compile(dynamic=False if fixed else None, backend=backend)
    limit = most_graphs(recipe) * max(1, len(parts))
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, limit)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, limit)


def most_graphs(recipe: Recipe) -> int:
    """How many graphs training can need: one for each mask ratio, number of images and kind of text length.

    A batch falls into parts of at most two sizes, and so does the last, shorter one; a text of one token is
    a graph apart from all longer ones.
    """
    return sum(len(phase.masks) * 4 * 2 for phase in recipe.phases)
