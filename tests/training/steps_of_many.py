"""Twenty steps of a small recipe on as many processes as the environment names; their figures as JSON.

python steps_of_many.py RECIPE OUT VARIANT ...      VARIANT: comma-separated --set assignments, or "-"
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from shoestring import build
from shoestring.cost.ledger import Ledger
from shoestring.processes import World, end, join
from shoestring.recipes.load import load_recipe
from shoestring.storage import RunFolder, write_json
from shoestring.training.checkpoint import Saver
from shoestring.training.loop import LoopSettings, Training
from shoestring.training.parallel import gathered
from shoestring.training.progress import LEVELS
from shoestring.training.tracking import Trackers

STEPS = 20
CPU = torch.device("cpu")


def steps(recipe_path: str, variant: str, world: World) -> dict[str, object]:
    """Losses, gradient norms, image positions, images by noise level, and the sizes of the final weights."""
    recipe = load_recipe(recipe_path, [] if variant == "-" else variant.split(","))
    store = build.open_store(recipe, device=CPU, log=lambda text: None, world=world)
    phase = recipe.phases[0]
    system = build.system_of(recipe, store)
    parts = system.parts(system.networks(phase))
    (turn,) = build.make_turns(recipe, parts, device=CPU, world=world)
    ledger = Ledger("", "", 0, "", 0)
    plan = build.plan_phases(system, parts, ledger, world)[0]
    saver = Saver(Path("none"), keep=1, keep_every=None, background=False, world=world)
    settings = LoopSettings(CPU)
    training = Training([turn], [plan], RunFolder(Path("none")), Trackers([]), settings, ledger, saver, world)
    plan.enter()
    batches = plan.batches(0)
    losses, norms, seen, levels = [], [], [], []
    for _ in range(STEPS):
        batch = next(batches)
        seen.append([int(i) for part in world.gather(batch.index.tolist()) for i in part])
        figures, norm = training.step(plan, batch)
        losses.append(figures[0].item() / phase.batch)
        norms.append(norm.item())
        levels.append(figures[1 + len(LEVELS) :].tolist())
        training.progress.phase_images += phase.batch
    batches.close()
    weights = gathered(turn.objective.trained.state_dict(), world)
    shares = {name: tensor.double().abs().sum().item() for name, tensor in weights.items()}
    return {"losses": losses, "norms": norms, "seen": seen, "levels": levels, "weights": shares}


if __name__ == "__main__":
    torch.set_num_threads(1)
    recipe_path, out, *variants = sys.argv[1:]
    with join("cpu") as (everyone, _):
        found = {variant: steps(recipe_path, variant, everyone) for variant in variants}
        if everyone.is_main:
            write_json(Path(out), found)
    end(0)
