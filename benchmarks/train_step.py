"""How fast a training step is: images/s, FLOP/s, share of the machine's peak, masked against dense.

python benchmarks/train_step.py [--recipe demo] [--batch 48] [--steps 15] [--device auto] [--dtype auto]
                                [--compile] [--threads 1] [--tiny]

A step is forward, backward, gradient clip and optimiser, with the recipe's own network, loss and optimiser;
data are read beforehand, and averages of the weights are left out. Masked and dense steps of one size take
turns, so that a slow moment of the machine hits both; figures are medians. The peak is a large matrix
product measured just before. Recipes of scenes run on scenes, others on random latents and text of their
shapes. On a GPU, without --recipe: XL/2 at 256 and 512 px, plain and compiled.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from parts.figures import alternated, hardware, tell
from parts.stores import latents_store

from shoestring import build
from shoestring.cost.flops import matmul_peak
from shoestring.cost.ledger import Ledger
from shoestring.data.store import Store
from shoestring.interfaces import Batch
from shoestring.recipes.load import load_recipe
from shoestring.recipes.schema import Phase, Recipe
from shoestring.runtime import PeakMemory, pick_device, pick_dtype
from shoestring.storage import RunFolder
from shoestring.training.checkpoint import Saver
from shoestring.training.loop import LoopSettings, PhasePlan, Training
from shoestring.training.tracking import Trackers

TINY = ("model.hidden_size=32", "model.mixer_size=32", "model.depth=2", "model.head_dim=16")
BATCHES = {"demo": 48, "microdit-tiny": 2, "microdit-xl": 1, "microdit-xl-rope": 1}
GPU_BATCHES = {256: 64, 512: 16}
LATENTS = {256: (4, 32, 32), 512: (4, 64, 64)}
WARM_UP = 3


@dataclass
class Settings:
    """What all figures of a call share."""

    device: torch.device
    dtype: torch.dtype
    steps: int
    peak: float


class Case:
    """One phase, ready to be stepped."""

    def __init__(self, training: Training, plan: PhasePlan, batches: Sequence[Batch]) -> None:
        self.training, self.plan = training, plan
        self.batches = cycle(batches)
        self.memory = PeakMemory(training.settings.device)
        self.peak_bytes = 0

    def step(self) -> None:
        """One optimiser step."""
        self.plan.enter()
        self.training.step(self.plan, next(self.batches))

    def watched_step(self) -> None:
        """One more, with an eye on memory."""
        self.memory.reset()
        self.step()
        self.peak_bytes = max(self.peak_bytes, self.memory.bytes())


def open_store(recipe: Recipe, folder: Path, rows: int) -> Store:
    """A few scenes, or random latents and text of the published shapes."""
    if recipe.data.scenes is None:
        return latents_store(folder / "latents", rows, sizes=LATENTS, pad=recipe.data.pad)
    few = recipe.data.scenes.model_copy(update={"images": rows, "held_out": 1})
    return build.scenes_store(recipe, few, folder, torch.device("cpu"), lambda line: None)


def phases_of(recipe: Recipe, size: int, batch: int) -> list[Phase]:
    """The recipe's first masked and first dense phase of one size."""
    phases = {phase.mask_at(0) > 0: phase for phase in reversed(recipe.phases) if phase.size == size}
    return [
        phases[masked].model_copy(update={"batch": batch, "warmup": 0, "microbatch": None})
        for masked in (True, False)
        if masked in phases
    ]


def make_cases(
    recipe: Recipe, store: Store, phases: Sequence[Phase], compiled: bool, s: Settings
) -> list[Case]:
    """The phases' steps on one network and one optimiser."""
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"compile": compiled})})
    system = build.system_of(recipe.model_copy(update={"phases": tuple(phases)}), store)
    parts = system.parts({name: each.to(s.device) for name, each in system.networks(phases[0]).items()})
    ledger = Ledger("", "", 0, "", 0)
    plans = [build.plan_phase(system, phase, parts, ledger) for phase in phases]
    settings = LoopSettings(s.device, s.dtype)
    turns = build.make_turns(recipe, parts, device=s.device, dtype=s.dtype)
    nowhere = RunFolder(Path())
    saver = Saver(nowhere.checkpoints, keep=1, keep_every=None, background=False)
    training = Training(turns, plans, nowhere, Trackers([]), settings, ledger, saver)
    cases = []
    for plan in plans:
        batches = plan.batches(0)
        cases.append(Case(training, plan, [next(batches).to(s.device) for _ in range(2)]))
        batches.close()
    return cases


def measure(recipe: Recipe, store: Store, size: int, batch: int, compiled: bool, s: Settings) -> None:
    """Tell the figures of one size's phases, and of one against the other."""
    phases = phases_of(recipe, size, batch)
    cases = make_cases(recipe, store, phases, compiled, s)
    for _ in range(WARM_UP if s.steps > 1 else 1):
        for case in cases:
            case.watched_step()
    medians = alternated({case.plan.name: case.step for case in cases}, s.steps, s.device)
    common: dict[str, Any] = {
        "recipe": recipe.name,
        "size": size,
        "batch": batch,
        "dtype": str(s.dtype).removeprefix("torch."),
        "compiled": compiled,
        "threads": torch.get_num_threads(),
        "steps": s.steps,
        "hardware": hardware(s.device),
    }
    say = partial(tell, "train_step")
    for phase, case in zip(phases, cases, strict=True):
        speed = batch / medians[phase.name]
        flops = case.plan.flops_per_image(0)
        about = {"phase": phase.name, "mask": phase.mask_at(0), **common}
        say("speed", speed, "images/s", **about)
        say("flops_per_image", flops, "FLOP", **about)
        say("flops_per_second", speed * flops, "FLOP/s", **about)
        say("share_of_peak", speed * flops / s.peak, "share", **about)
        say("peak_memory", case.peak_bytes / 2**20, "MiB", **about)
    if len(cases) == 2:
        masked, dense = (phase.name for phase in phases)
        per_image = [case.plan.flops_per_image(0) for case in cases]
        say("masked_over_dense_speed", medians[dense] / medians[masked], "times", **common)
        say("dense_over_masked_flops", per_image[1] / per_image[0], "times", **common)


def run(recipe: Recipe, batch: int | None, compiled: Sequence[bool], s: Settings) -> None:
    """Every size of a recipe."""
    gpu = s.device.type == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(recipe, Path(folder), 256)
        for size in sorted({phase.size for phase in recipe.phases}):
            own = GPU_BATCHES.get(size) if gpu else None
            for each in compiled:
                measure(recipe, store, size, batch or own or BATCHES.get(recipe.name, 8), each, s)
                if gpu:
                    torch.compiler.reset()
                    torch.cuda.empty_cache()


def main() -> None:
    """Measure the machine's peak, then the recipe's steps."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", help="a built-in recipe or a file; demo, or on a GPU microdit-xl")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of it")
    parser.add_argument("--batch", type=int, help="images a step")
    parser.add_argument("--steps", type=int, default=15, help="steps of each kind")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16 (autocast)")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's choice unless given")
    parser.add_argument("--compile", action="store_true", help="torch.compile the network")
    parser.add_argument("--tiny", action="store_true", help="a tiny network, one step of each kind")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = pick_device(arguments.device)
    gpu, tiny = device.type == "cuda", arguments.tiny
    dtype = pick_dtype(arguments.dtype, device)
    peak = matmul_peak(device, dtype, 8192 if gpu else 256 if tiny else 2048, 0.1 if tiny else 2.0)
    about = {"dtype": str(dtype).removeprefix("torch."), "threads": torch.get_num_threads()}
    tell("train_step", "matmul_peak", peak, "FLOP/s", **about, hardware=hardware(device))
    name = arguments.recipe or ("microdit-xl" if gpu and not tiny else "demo")
    recipe = load_recipe(name, [*(TINY if tiny else ()), *arguments.set])
    both = gpu and not tiny and arguments.recipe is None
    settings = Settings(device, dtype, 1 if tiny else arguments.steps, peak)
    run(recipe, 4 if tiny else arguments.batch, (False, True) if both else (arguments.compile,), settings)


if __name__ == "__main__":
    main()
