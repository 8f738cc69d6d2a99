"""Three ways to compute the same expert-choice feed-forward: speed, and by how much results differ.

python benchmarks/experts.py [--tiny] [--threads 1 2] [--rounds 5] [--device auto]

  gather   ours: each expert gathers its tokens, two Linear layers, scatter-add (models/experts.py)
  batched  gathers all experts' tokens at once and multiplies by stacked weights: one batched product a layer
  one_hot  the published way: tokens picked and put back by products with one-hot matrices (B, E, k, N)

Sizes are a small block and the last expert block of XL/2 with the tokens of 256 px under 75 % masking, of
256 px and of 512 px. `forward` is as in sampling, `training` is forward and backward.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from parts.figures import alternated, hardware, tell
from torch import Tensor

from shoestring.models.experts import ExpertChoice
from shoestring.models.microdit import MicroDiT, expert_positions, spaced
from shoestring.runtime import pick_device

Method = Callable[[ExpertChoice, Tensor, Tensor, Tensor], Tensor]


class Size(NamedTuple):
    """A block and its input: images, tokens of each, width, feed-forward ratio, rounding."""

    batch: int
    tokens: int
    width: int
    ratio: float
    multiple_of: int


def sizes(tiny: bool) -> dict[str, Size]:
    """What is measured, by name; XL/2's own numbers are the network's defaults."""
    if tiny:
        return {"tiny": Size(2, 16, 32, 4.0, 32)}
    with torch.device("meta"):
        config = MicroDiT().config
    last = max(expert_positions(config.expert_blocks, config.depth, last=False))
    ratio = spaced(config.mlp_ratio, config.depth)[last]
    block = (config.hidden_size, ratio, config.multiple_of)
    return {
        "small": Size(16, 64, 128, 4.0, 32),
        "XL/2 256 px masked": Size(4, 64, *block),
        "XL/2 256 px": Size(1, 256, *block),
        "XL/2 512 px": Size(1, 1024, *block),
    }


def gather(block: ExpertChoice, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Ours."""
    result: Tensor = block(x)
    return result


def batched(block: ExpertChoice, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """(E, B k, D) through stacked weights (E, D, F) and (E, F, D)."""
    batch, tokens, width = x.shape
    experts = up.shape[0]
    weights, chosen = _choose(block, x)  # (B, E, k)
    index = chosen.flatten(1)[..., None].expand(-1, -1, width)  # (B, E k, D)
    picked = x.gather(1, index).unflatten(1, (experts, -1)).transpose(0, 1).flatten(1, 2)
    fed = torch.bmm(F.gelu(torch.bmm(picked, up)), down)
    fed = fed.unflatten(1, (batch, -1)).transpose(0, 1) * weights[..., None]  # (B, E, k, D)
    return x.new_zeros(batch, tokens, width).scatter_add(1, index, fed.flatten(1, 2))


def one_hot(block: ExpertChoice, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The published products."""
    weights, chosen = _choose(block, x)
    place = F.one_hot(chosen, x.shape[1]).to(x.dtype)  # (B, E, k, N)
    picked = torch.einsum("bekn,bnd->bekd", place, x)
    fed = torch.einsum("bekf,efd->bekd", F.gelu(torch.einsum("bekd,edf->bekf", picked, up)), down)
    return torch.einsum("bekn,bekd->bnd", place, weights[..., None] * fed)


def _choose(block: ExpertChoice, x: Tensor) -> tuple[Tensor, Tensor]:
    scores = block.router(x).softmax(dim=-1).transpose(1, 2)
    return scores.topk(block.tokens_per_expert(x.shape[1]), dim=-1)


METHODS: dict[str, Method] = {"gather": gather, "batched": batched, "one_hot": one_hot}


def forward(method: Method, *inputs: ExpertChoice | Tensor) -> Tensor:
    """One evaluation without gradients."""
    with torch.no_grad():
        return method(*inputs)  # type: ignore[arg-type]


def training(method: Method, block: ExpertChoice, x: Tensor, up: Tensor, down: Tensor) -> None:
    """Forward and backward; gradients of weights and tokens are thrown away."""
    weights = list(block.parameters()) if method is gather else [block.router.weight, up, down]
    torch.autograd.grad(method(block, x, up, down).square().sum(), [x, *weights])


def measure(name: str, size: Size, threads: int, rounds: int, device: torch.device) -> None:
    """Tell the three methods' times at one size, and how far they are from ours."""
    torch.manual_seed(0)
    block = ExpertChoice(size.width, size.ratio, size.multiple_of, 8, 2.0).to(device)
    x = torch.randn(size.batch, size.tokens, size.width, device=device, requires_grad=True)
    with torch.no_grad():
        up = torch.stack([expert.up.weight.T for expert in block.experts]).contiguous()
        down = torch.stack([expert.down.weight.T for expert in block.experts]).contiguous()
    inputs = (block, x, up.requires_grad_(), down.requires_grad_())
    settings = {**size._asdict(), "block": name, "hidden": up.shape[2], "experts": 8, "threads": threads}
    ours = forward(gather, *inputs)
    for part in (forward, training):
        works = {each: partial(part, method, *inputs) for each, method in METHODS.items()}
        for each, taken in alternated(works, rounds, device).items():
            difference = float((forward(METHODS[each], *inputs) - ours).abs().max())
            tell(
                "experts",
                part.__name__,
                1000 * taken,
                "ms",
                method=each,
                max_difference=difference,
                largest=float(ours.abs().max()),
                **settings,
                hardware=hardware(device),
            )


def main() -> None:
    """Measure every size on every number of threads."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="one tiny block, 2 rounds, 1 thread")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    for threads in [1] if arguments.tiny else arguments.threads:
        torch.set_num_threads(threads)
        for name, size in sizes(arguments.tiny).items():
            measure(name, size, threads, 2 if arguments.tiny else arguments.rounds, device)


if __name__ == "__main__":
    main()
