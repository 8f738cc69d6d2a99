"""Wuerstchen's Stage C and B against diffusers' classes with the same weights: speed, and time at bfloat16.

python benchmarks/wuerstchen.py [--part prior decoder time] [--kinds eager cached ...] [--threads 2]
                                [--rounds 5] [--device cpu] [--tiny]

  diffusers   its class as it comes, with its default attention; all conditions computed anew in each step
  eager       ours, called the same way
  cached      ours, with what no step changes computed once (`project`: text keys and values, mapped codes)
  compiled    cached, under torch.compile (inductor; left out where there is no C++ compiler)
  bfloat16    cached, with weights in bfloat16, time and the last division in float32
  diffusers_bfloat16   diffusers' class in bfloat16: one evaluation at the smaller size alone, being slow

Widths are the published ones, depths less, so that both fit a small CPU: Stage C 2 of 32 blocks at batch 2
(guidance) with 77 tokens, Stage B blocks 1, 1, 2, 1 of 4, 4, 14, 4 at batch 1 with text. Weights are random,
the same in both. `difference` is that of outputs to diffusers' in float32, its norm over theirs. The kinds
take turns in each round, so that a slow moment hits all; figures are medians, `speed_up` diffusers' seconds
over ours. `sampling` is 8 steps of diffusers' DDPMWuerstchenScheduler in float32 with `project` in it, for an
eighth of the rounds. Compiling is no part of the times and told beside them.

`time`: diffusers casts t to the model's type before the sines; ours computes them in float32. Told are the
cosine of the time embedding with float32's over the 30 default times, and by how much eps_hat at bfloat16
differs from float32's, on a small prior of random weights.
"""

from __future__ import annotations

import argparse
import copy
import shutil
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMWuerstchenScheduler
from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_diffnext import (
    WuerstchenDiffNeXt as TheirDecoder,
)
from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_prior import (
    WuerstchenPrior as TheirPrior,
)
from diffusers.pipelines.deprecated.wuerstchen.pipeline_wuerstchen_prior import (
    DEFAULT_STAGE_C_TIMESTEPS,
)
from parts.figures import alternated, hardware, seconds, tell
from torch import Tensor, nn

from shoestring.models.wuerstchen_decoder import WuerstchenDiffNeXt
from shoestring.models.wuerstchen_prior import WuerstchenPrior
from shoestring.runtime import pick_device

STEPS = 8
PARTS = ("prior", "decoder", "time")
THEIRS, THEIR_BFLOAT16 = "diffusers", "diffusers_bfloat16"
KINDS = ("eager", "cached", "compiled", "bfloat16", THEIR_BFLOAT16)

PRIOR = {"c_in": 16, "c": 1536, "c_cond": 1280, "c_r": 64, "depth": 2, "nhead": 24}
DECODER = {"blocks": [1, 1, 2, 1]}  # all else as published
SMALL_PRIOR = {"c_in": 16, "c": 256, "c_cond": 64, "c_r": 64, "depth": 8, "nhead": 4}
TINY_PRIOR = {"c_in": 4, "c": 32, "c_cond": 16, "c_r": 8, "depth": 2, "nhead": 2}
TINY_DECODER = {
    "c_r": 8,
    "c_cond": 16,
    "c_hidden": [16, 32],
    "nhead": [-1, 2],
    "blocks": [1, 1],
    "level_config": ["CT", "CTA"],
    "inject_effnet": [False, True],
    "effnet_embd": 4,
    "clip_embd": 16,
}

Denoise = Callable[[Tensor, Tensor], Tensor]
"""(x, t (B,)) -> eps_hat."""


@dataclass
class Case:
    """One network at one size: both classes with the same weights, and their input."""

    name: str
    about: dict[str, Any]
    ours: Any
    theirs: Any
    x: Tensor
    conditions: dict[str, Tensor]  # keyword arguments of a plain call
    project: Callable[[Any], Any]  # our network -> what no step changes

    def network(self, kind: str) -> Any:
        """The network that a kind runs."""
        if kind == "compiled":
            return torch.compile(self.ours, dynamic=False)
        if kind in ("bfloat16", THEIR_BFLOAT16):
            return copy.deepcopy(self.ours if kind == "bfloat16" else self.theirs).bfloat16()
        return self.theirs if kind == THEIRS else self.ours

    def ready(self, kind: str, network: Any) -> Denoise:
        """How a kind denoises, its conditions made ready as a pipeline would before the first step."""
        if kind in (THEIRS, "eager"):
            return lambda x, t: network(x, t, **self.conditions)
        if kind == THEIR_BFLOAT16:
            halves = {name: value.bfloat16() for name, value in self.conditions.items()}
            return lambda x, t: network(x.bfloat16(), t.bfloat16(), **halves).float()
        projected = self.project(network)
        return lambda x, t: network(x, t, projected=projected)


def randomised(network: nn.Module) -> nn.Module:
    """Weights that all matter: a fresh network's last layer is zero, and says x whatever lies before.

    The last layer's are small, as a trained one's: Stage C divides by |1 - B|.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 and len(parameter) > 1 else 100
            gain = 0.1 if name.startswith(("out.", "clf.")) else 1.0
            parameter.normal_(0, gain * fan_in**-0.5, generator=generator)
    return network.eval().requires_grad_(False)


def paired(ours: nn.Module, their_class: Any, config: Mapping[str, Any], device: torch.device) -> Any:
    """(our network, diffusers') that share one set of random weights."""
    randomised(ours).to(device)
    with torch.device("meta"):
        theirs = their_class(**config)
    theirs.load_state_dict(ours.state_dict(), strict=True, assign=True)
    return ours, theirs.eval().requires_grad_(False)


def prior_cases(tiny: bool, device: torch.device) -> Iterator[Case]:
    """Stage C at 512 and 1,024 px."""
    config = TINY_PRIOR if tiny else PRIOR
    ours, theirs = paired(WuerstchenPrior(**config), TheirPrior, config, device)
    batch, tokens = 2, 5 if tiny else 77
    for side in (6, 12) if tiny else (12, 24):
        draw = drawer(device)
        text = draw(batch, tokens, config["c_cond"])
        about = {"depth": config["depth"], "width": config["c"], "latent": side, "batch": batch}
        yield Case(
            "prior",
            about,
            ours,
            theirs,
            draw(batch, config["c_in"], side, side),
            {"c": text},
            lambda network, text=text: network.project(text),
        )


def decoder_cases(tiny: bool, device: torch.device) -> Iterator[Case]:
    """Stage B at 256 and 512 px."""
    config: dict[str, Any] = TINY_DECODER if tiny else DECODER
    ours, theirs = paired(WuerstchenDiffNeXt(**config), TheirDecoder, config, device)
    full = theirs.config
    for side in (16, 32) if tiny else (64, 128):
        draw = drawer(device)
        codes = draw(1, full.effnet_embd, side * 3 // 32 or 1, side * 3 // 32 or 1)
        text = draw(1, 5 if tiny else 77, full.clip_embd)
        yield Case(
            "decoder",
            {"blocks": full.blocks, "widths": full.c_hidden, "latent": side, "batch": 1},
            ours,
            theirs,
            draw(1, full.c_in, side, side),
            {"effnet": codes, "clip": text},
            lambda network, codes=codes, text=text, side=side: network.project(
                codes, text, size=(side, side)
            ),
        )


def drawer(device: torch.device) -> Callable[..., Tensor]:
    """Normal draws, the same in every call of this."""
    generator = torch.Generator().manual_seed(1)
    return lambda *shape: torch.randn(*shape, generator=generator).to(device)


def forward(case: Case, kind: str, network: Any) -> Callable[[], Tensor]:
    """One evaluation; what `project` makes is ready before the clock starts."""
    denoise = case.ready(kind, network)
    times = torch.full((len(case.x),), 0.5, device=case.x.device)
    return lambda: denoise(case.x, times)


def sampling(case: Case, kind: str, network: Any) -> Callable[[], Tensor]:
    """Eight steps from noise, conditions included."""

    def sample() -> Tensor:
        denoise = case.ready(kind, network)
        scheduler, generator = DDPMWuerstchenScheduler(), torch.Generator(case.x.device).manual_seed(0)
        scheduler.set_timesteps(STEPS, device=case.x.device)
        x = case.x
        for t in scheduler.timesteps[:-1]:
            times = t.expand(len(x))
            x = scheduler.step(denoise(x, times), times, x, generator=generator, return_dict=False)[0]
        return x

    return sample


@torch.no_grad()
def measure(case: Case, kinds: Sequence[str], rounds: int, device: torch.device) -> None:
    """Tell the times of one case, ratios and differences."""
    torch.compiler.reset()
    networks = {kind: case.network(kind) for kind in kinds}
    about = {"network": case.name, **case.about, "threads": torch.get_num_threads()}
    say = partial(tell, "wuerstchen", hardware=hardware(device), **about)
    if "compiled" in kinds:
        say("compile", seconds(forward(case, "compiled", networks["compiled"]), device), "s")
    for what, make in (("forward", forward), ("sampling", sampling)):
        works = {kind: make(case, kind, network) for kind, network in networks.items()}
        if what == "sampling":
            works.pop(THEIR_BFLOAT16, None)
        made: dict[str, Tensor] = {}
        keeping = {kind: partial(keep, made, kind, work) for kind, work in works.items()}
        medians = alternated(keeping, rounds if what == "forward" else max(1, rounds // STEPS), device)
        for kind, seconds_taken in medians.items():
            say(what, seconds_taken, "s", kind=kind)
            if kind != THEIRS:
                apart = (made[kind] - made[THEIRS]).norm() / made[THEIRS].norm()
                say(f"{what}_speed_up", medians[THEIRS] / seconds_taken, "times", kind=kind)
                say(f"{what}_difference", apart.item(), "share", kind=kind)


def keep(made: dict[str, Tensor], kind: str, work: Callable[[], Tensor]) -> None:
    """Do a kind's work and put what it makes into `made`."""
    made[kind] = work()


def can_compile() -> bool:
    """Whether inductor has a compiler for this machine's CPU."""
    return any(shutil.which(name) for name in ("c++", "g++", "clang++"))


@torch.no_grad()
def time_accuracy(tiny: bool, device: torch.device) -> None:
    """Tell how true time is at bfloat16, in both classes."""
    config = TINY_PRIOR if tiny else SMALL_PRIOR
    networks = {
        "float32": paired(WuerstchenPrior(**config), TheirPrior, config, device)[0],
        "ours": paired(WuerstchenPrior(**config), TheirPrior, config, device)[0].bfloat16(),
        THEIRS: paired(WuerstchenPrior(**config), TheirPrior, config, device)[1].bfloat16(),
    }
    draw, side = drawer(device), 6 if tiny else 12
    x, text = draw(1, config["c_in"], side, side), draw(1, 5 if tiny else 77, config["c_cond"])
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for kind, network in networks.items():
        seen: list[Tensor] = []
        first = network.blocks[1].mapper  # a Linear of the time embedding, by this name in both
        first.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0][0].float()))
        found[kind] = [(evaluate(kind, network, x, t, text), seen[-1]) for t in DEFAULT_STAGE_C_TIMESTEPS]
    say = partial(tell, "wuerstchen", network="prior", depth=config["depth"], width=config["c"])
    for kind in (THEIRS, "ours"):
        pairs = list(zip(found[kind], found["float32"], strict=True))
        cosines = [F.cosine_similarity(own[1], true[1], dim=0).item() for own, true in pairs]
        errors = [((own[0] - true[0]).norm() / true[0].norm()).item() for own, true in pairs]
        about = {"kind": kind, "dtype": "bfloat16", "times": len(pairs), "hardware": hardware(device)}
        say("time_cosine_mean", statistics.mean(cosines), "cosine", **about)
        say("time_cosine_least", min(cosines), "cosine", **about)
        say("eps_error_median", statistics.median(errors), "share", **about)
        say("eps_error_most", max(errors), "share", **about)


def evaluate(kind: str, network: Any, x: Tensor, t: float, text: Tensor) -> Tensor:
    """eps_hat as a pipeline asks for it: diffusers casts t to the model's type, ours leaves it float32."""
    dtype = next(network.parameters()).dtype
    times = torch.tensor([t], device=x.device, dtype=dtype if kind == THEIRS else torch.float32)
    result: Tensor = network(x.to(dtype), times, text.to(dtype))
    return result.float()


def main() -> None:
    """Measure the parts asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS, help="what to measure; all")
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, help="against diffusers; all, or with --tiny not compiled"
    )
    parser.add_argument("--threads", type=int, help="CPU threads; torch's choice unless given")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each kind")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:N or mps")
    parser.add_argument("--tiny", action="store_true", help="tiny networks, one round")
    arguments = parser.parse_args()
    device, tiny = pick_device(arguments.device), arguments.tiny
    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    kinds = [THEIRS, *(arguments.kinds or (kind for kind in KINDS if not (tiny and kind == "compiled")))]
    if device.type == "cpu" and "compiled" in kinds and not can_compile():
        print("wuerstchen: no C++ compiler, so nothing is compiled", file=sys.stderr)
        kinds.remove("compiled")
    for part, cases in (("prior", prior_cases), ("decoder", decoder_cases)):
        for number, case in enumerate(cases(tiny, device) if part in arguments.part else ()):
            some = [kind for kind in kinds if kind != THEIR_BFLOAT16 or number == 0]
            measure(case, some, 1 if tiny else arguments.rounds, device)
    if "time" in arguments.part:
        time_accuracy(tiny, device)


if __name__ == "__main__":
    main()
