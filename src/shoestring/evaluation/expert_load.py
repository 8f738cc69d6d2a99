"""How evenly the experts of a network are used: tokens that none or many of them take, and their routers.

Experts choose tokens, so each takes equally many and load in the usual sense is even by design. What may go
wrong is on the side of the tokens, that no expert takes some of them, and of the routers, that an expert's
weight dwindles until what it computes no longer counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from shoestring.models.experts import ExpertChoice

MANY = 3


class ExpertLoad:
    """What the layers of experts did in the forward passes of `watched_experts`."""

    def __init__(self) -> None:
        self.seen: dict[str, list[Tensor]] = {}

    def figures(self) -> dict[str, dict[str, float]]:
        """The load of each layer that ran, by the name of its block, such as "patch_mixer.1".

        unused     share of all the tokens it was given that no expert took, 0 to 1
        many       share of them that three or more experts took, 0 to 1
        heaviest   mean router weight of the expert with the largest one, over the mean of all experts; >= 1
        lightest   the same of the expert with the smallest one; 0 to 1

        An expert's mean router weight is the mean of its softmax score over all tokens, taken or not; over E
        experts they sum to 1, so their mean is 1 / E. Empty for a network without experts.
        """
        return {name: _figures(rows) for name, rows in self.seen.items()}

    def see(self, name: str, layer: ExpertChoice, logits: Tensor) -> None:
        """Count one forward pass of a layer from its router's output (B, N, E), as the layer itself does."""
        scores = logits.softmax(dim=-1)
        taken = layer.tokens_per_expert(scores.shape[1])
        chosen = scores.topk(taken, dim=1).indices.flatten(1)  # (B, k E)
        takers = chosen.new_zeros(scores.shape[:2]).scatter_add(1, chosen, torch.ones_like(chosen))  # (B, N)
        counts = [takers.numel(), (takers == 0).sum(), (takers >= MANY).sum()]
        row = torch.stack([torch.as_tensor(count, device=scores.device).float() for count in counts])
        self.seen.setdefault(name, []).append(torch.cat([row, scores.float().sum(dim=(0, 1))]))  # (3 + E,)


@contextmanager
def watched_experts(network: nn.Module) -> Iterator[ExpertLoad]:
    """Watch the layers of experts in every forward pass inside, in this process; results are unchanged.

    A network that was compiled in place runs eagerly inside, where it has experts: compiled code passes over
    what watches it.
    """
    load = ExpertLoad()
    layers = {
        name.removesuffix(".ff"): module
        for name, module in network.named_modules()
        if isinstance(module, ExpertChoice)
    }
    if not layers:
        yield load
        return
    handles = [layer.router.register_forward_hook(_hook(load, name, layer)) for name, layer in layers.items()]
    try:
        with torch.compiler.set_stance("force_eager"):
            yield load
    finally:
        for handle in handles:
            handle.remove()


def _hook(load: ExpertLoad, name: str, layer: ExpertChoice) -> Any:
    def hook(router: nn.Module, inputs: object, logits: Tensor) -> None:
        with torch.no_grad():
            load.see(name, layer, logits)

    return hook


def _figures(rows: Sequence[Tensor]) -> dict[str, float]:
    total = torch.stack([row.cpu().double() for row in rows]).sum(dim=0)
    tokens, unused, many, weights = total[0], total[1], total[2], total[3:]
    mean = weights.mean()
    return {
        "unused": float(unused / tokens),
        "many": float(many / tokens),
        "heaviest": float(weights.max() / mean),
        "lightest": float(weights.min() / mean),
    }
