"""Does masking pay on compressed codes? Stage C as a MicroDiT at mask 0, 0.5 and 0.75, beside the prior.

python benchmarks/masked_codes.py [--stage-b runs/wuerstchen-demo-b] [--runs runs] [--tflop 8] [--seeds 0 1]
                                  [--dense-share 0.2] [--minutes M] [--device auto] [--tiny]

Every run trains on the codes of one trained Stage B (recipe `wuerstchen-demo`) with the same operations, 1 %
at most apart, counted as the ledger does: forward and backward of matrix products, convolutions, attention.

  prior          the demo's own Stage C, its phases shortened in proportion
  mask-0, ...    recipe `demo`'s network and objective with patches of one code: images at the mask, then the
                 same number of dense ones in each, which take --dense-share of the operations; the rate falls
                 to its end in them

Optimiser, rate, batch, warm-up, steps and guidance are the same in all. Masked images are cheaper, so there
are more of them. Loss is at fixed noise levels on held-out images, dense; `x0_error` is that loss without its
weights, which makes the prior's comparable. `reconstruction_accuracy` is what the codes allow. Runs are kept
in --runs: finished ones are not trained again, stopped ones (Ctrl-C, or --minutes are over) go on when the
same command is given again. --tiny trains a Stage A and B of its own first.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from parts.figures import hardware, tell
from parts.training import STOPPED, say, train

from shoestring import build
from shoestring.data.store import Store
from shoestring.interfaces import MetricRow
from shoestring.measure import measure_run
from shoestring.objectives.cosine import alpha_bar, loss_weight, time_of
from shoestring.recipes.load import load_recipe, load_stages
from shoestring.recipes.losses import Objective
from shoestring.recipes.schema import Recipe
from shoestring.runtime import pick_device
from shoestring.storage import RunFolder, read_json

ARMS: dict[str, float | None] = {"prior": None, "mask-0": 0.0, "mask-0.5": 0.5, "mask-0.75": 0.75}
"""What is compared, by the mask of the first phase; the prior convolves, so it cannot leave codes out."""

TOLERANCE = 0.01
TINY = (
    "data.scenes.images=64",
    "data.scenes.held_out=8",
    "train.log_every=64",
    "evaluation={prompts: 4, seeds: 1, loss_images: 8, loss_levels: [-1, 1]}",
    "stages.a.model={embed_dim: 8, bottleneck_blocks: 1, num_vq_embeddings: 32, discriminator_hidden: 16, "
    "discriminator_depth: 2}",
    "stages.a.objective.adversarial_start=0",
    "stages.a.phases=[{name: only, size: 64, images: 16, batch: 8, lr: 1.0e-3}]",
    "stages.b.model={c_r: 8, c_cond: 16, c_hidden: [16, 16], nhead: [-1, 2], blocks: [1, 1], previewer: 8}",
    "stages.b.phases=[{name: only, size: 64, images: 16, batch: 8, lr: 1.0e-3}]",
    "stages.b.sampling.steps=2",
    "stages.c.model={c: 16, c_r: 8, depth: 1, nhead: 2}",
    "stages.c.sampling.steps=2",
    "stages.c.phases={0: {batch: 8, warmup: 0}, 1: {batch: 8, warmup: 0}}",
)
TINY_NETWORK = {"hidden_size": 32, "mixer_size": 32, "head_dim": 16, "depth": 1, "text_depth": 1}


@dataclass
class Comparison:
    """What all runs share."""

    stage_b: Path
    runs: Path
    tflop: float
    dense_share: float
    device: torch.device
    until: float
    tiny: bool

    def recipe(self, arm: str, seed: int, images: tuple[int, ...] | None = None) -> Recipe:
        """Stage C of an arm; without `images`, one for each phase, they are the demo's."""
        sets = [
            *(TINY if self.tiny else ()),
            f"name=codes-{arm}-{self.tflop:g}tflop-seed{seed}",
            f"seed={seed}",
            "train.preview_every=null",
            f"stages.c.data.autoencoder={json.dumps(str(self.stage_b))}",
        ]
        own = load_stages("wuerstchen-demo", sets, self.runs)["c"]
        phases = [phase.model_dump(mode="json") for phase in own.phases]
        mask = ARMS[arm]
        if mask is not None:
            phases = [{**phases[0], "name": "main", "mask": mask}, {**phases[-1], "name": "dense"}]
            sets += self._network(own)
        if images is not None:
            phases = [{**phase, "images": count} for phase, count in zip(phases, images, strict=True)]
        sets.append(f"stages.c.phases={json.dumps(phases)}")
        return load_stages("wuerstchen-demo", sets, self.runs)["c"]

    def _network(self, own: Recipe) -> list[str]:
        """Assignments that put recipe `demo`'s network in the place of the prior, sampled alike."""
        demo = load_recipe("demo")
        assert own.sampling is not None, "checked by the recipe"
        assert demo.sampling is not None, "checked by the recipe"
        same = {"steps": own.sampling.steps, "guidance": own.sampling.guidance}
        sections = {
            "model": {
                **demo.model.model_dump(mode="json"),
                "patch_size": 1,
                **(TINY_NETWORK if self.tiny else {}),
            },
            "objective": demo.objective.model_dump(mode="json"),
            "sampling": {**demo.sampling.model_dump(mode="json"), **same},
        }
        return [f"stages.c.{name}={json.dumps(values)}" for name, values in sections.items()]

    def fitted(self, arm: str, seed: int, store: Store) -> tuple[Recipe, list[float]]:
        """An arm with as many images as the operations allow, and each phase's operations.

        Ends the script where the budget is too small to be met.
        """
        recipe, budget = self.recipe(arm, seed), self.tflop * 1e12
        system = build.system_of(recipe, store)
        per_image = [build.accumulated(system, phase) / phase.images for phase in recipe.phases]
        if ARMS[arm] is None:
            own = sum(each * phase.images for each, phase in zip(per_image, recipe.phases, strict=True))
            images = [round(budget / own * phase.images) for phase in recipe.phases]
        else:
            dense = round(self.dense_share * budget / per_image[1])
            images = [round((budget - dense * per_image[1]) / per_image[0]), dense]
        if min(images) < 1:
            sys.exit(f"--tflop {self.tflop:g}: too few for an image of each phase of {arm}. Give more.")
        recipe = self.recipe(arm, seed, tuple(images))
        flops = [build.accumulated(build.system_of(recipe, store), phase) for phase in recipe.phases]
        if abs(sum(flops) / budget - 1) > TOLERANCE:
            sys.exit(f"--tflop {self.tflop:g}: {arm} would take {sum(flops):.4g} operations. Give more.")
        return recipe, flops


def measured(run: RunFolder, device: torch.device) -> list[MetricRow]:
    """The rows of a finished run, measured once."""
    if not run.evaluation.is_file():
        measure_run(run, device=device, log=say)
    rows: list[MetricRow] = read_json(run.evaluation)["rows"]
    return rows


def x0_weight(objective: Objective, log_sigma: float) -> float:
    """What the squared error of x_0 is multiplied by in a loss at a noise level."""
    level = torch.tensor(log_sigma, dtype=torch.float64)
    if objective.kind == "flow":
        assert objective.prediction == "x0", "a velocity's error has another meaning"
        return min(float(level.sigmoid()) ** -2, objective.weight_cap or math.inf)
    assert objective.kind == "prior", "the demo's own"
    abar = alpha_bar(time_of(level))
    return float(loss_weight(abar, objective.weight, objective.weight_cap) * abar / (1 - abar))


def x0_error(recipe: Recipe, rows: list[MetricRow], split: str) -> float:
    """The mean squared error of x_0 over the recipe's noise levels, from the rows of its loss."""
    losses = {row["facet"]: row["value"] for row in rows if _is(row, "held_out_loss", split)}
    levels = recipe.evaluation.loss_levels
    return statistics.fmean(
        losses[f"log_sigma={level}"] / x0_weight(recipe.objective, level) for level in levels
    )


def overall(rows: list[MetricRow], metric: str, split: str) -> dict[str, Any]:
    """A metric's value over everything with its interval and count."""
    row = next(row for row in rows if _is(row, metric, split) and row["facet"] == "all")
    low, high = (None if each is None else float(f"{each:.4g}") for each in (row["low"], row["high"]))
    return {"value": row["value"], "low": low, "high": high, "n": row["n"]}


def figures(recipe: Recipe, run: RunFolder, rows: list[MetricRow]) -> dict[tuple[str, str], dict[str, Any]]:
    """(metric, split) -> value, unit and, for shares of pictures, the interval."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for split in dict.fromkeys(row["split"] for row in rows):
        for metric, unit in (("scene_accuracy", "share"), ("held_out_loss", "loss")):
            found[metric, split] = overall(rows, metric, split) | {"unit": unit}
        found["x0_error", split] = {"value": x0_error(recipe, rows, split), "unit": "variance"}
    ledger = read_json(run.ledger)
    for metric, unit in (("flops", "FLOP"), ("images", "images"), ("seconds", "s")):
        found[f"training_{metric}", "train"] = {"value": ledger["total"][metric], "unit": unit}
    found["parameters", "train"] = {"value": ledger["parameters"], "unit": "parameters"}
    return found


def compare(comparison: Comparison, seeds: list[int]) -> None:
    """Train, measure and tell every arm.

    One seed of all before the next, so that a stop leaves something to compare.
    """
    device = comparison.device
    store = build.open_store(comparison.recipe("prior", seeds[0]), device=device, log=say)
    common = {"tflop": comparison.tflop, "hardware": hardware(device)}
    values: dict[tuple[str, str, str, str], list[float]] = defaultdict(list)
    for seed in seeds:
        for arm, mask in ARMS.items():
            recipe, flops = comparison.fitted(arm, seed, store)
            run = RunFolder(comparison.runs / recipe.name)
            train(recipe, run, device, comparison.until)
            rows = measured(run, device)
            if not values:  # the same codes in all
                for split in [name for name in store.splits if name != "train"]:
                    ceiling = overall(rows, "reconstruction_accuracy", split)
                    tell(
                        "masked_codes",
                        "reconstruction_accuracy",
                        unit="share",
                        split=split,
                        **ceiling,
                        **common,
                    )
            phases = {
                phase.name: {"images": phase.images, "flops_per_image": float(f"{each / phase.images:.4g}")}
                for phase, each in zip(recipe.phases, flops, strict=True)
            }
            about = {"arm": arm, "mask": mask, "seed": seed, "phases": phases, **common}
            for (metric, split), figure in figures(recipe, run, rows).items():
                tell("masked_codes", metric, split=split, **figure, **about)
                values[arm, metric, split, figure["unit"]].append(figure["value"])
    for (arm, metric, split, unit), each in values.items():
        if split != "train" or metric == "training_seconds":
            about = {"arm": arm, "seeds": seeds, "each": [float(f"{value:.4g}") for value in each]}
            tell(
                "masked_codes", f"mean_{metric}", statistics.fmean(each), unit, split=split, **about, **common
            )


def tiny_stages(runs: Path, device: torch.device) -> Path:
    """A Stage A and B of a few steps; the run of the latter."""
    stages = load_stages("wuerstchen-demo", TINY, runs)
    for stage in ("a", "b"):
        train(stages[stage], RunFolder(runs / stages[stage].name), device, math.inf)
    return runs / stages["b"].name


def _is(row: MetricRow, metric: str, split: str) -> bool:
    return row["metric"] == metric and row["split"] == split


def main() -> None:
    """Compare on a Stage B that is there, or with --tiny on one made for it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage-b", type=Path, default=Path("runs/wuerstchen-demo-b"), help="its run")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where runs are kept")
    parser.add_argument("--tflop", type=float, default=8.0, help="10^12 operations of a run's training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--dense-share", type=float, default=0.2, help="of the operations, after the mask")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop training after so many")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--tiny", action="store_true", help="tiny networks, one seed, in a folder of its own")
    arguments = parser.parse_args()
    device, until = pick_device(arguments.device), time.monotonic() + 60 * arguments.minutes
    if not 0 < arguments.dense_share < 1:
        parser.error("--dense-share must be between 0 and 1")
    try:
        if arguments.tiny:
            with tempfile.TemporaryDirectory() as folder, chdir(folder):
                runs = Path("runs")
                stage_b = tiny_stages(runs, device)
                compare(Comparison(stage_b, runs, 2e-3, arguments.dense_share, device, until, True), [0])
            return
        if not RunFolder(arguments.stage_b).pipeline.is_dir():
            told = "no trained Stage B. Train one: shoestring demo --system wuerstchen"
            parser.error(f"--stage-b {arguments.stage_b}: {told}")
        asked = (arguments.tflop, arguments.dense_share, device, until, False)
        compare(Comparison(arguments.stage_b, arguments.runs, *asked), arguments.seeds)
    except KeyboardInterrupt:
        say("Stopped. What was trained is kept: give the same command again to go on.")
        sys.exit(STOPPED)


if __name__ == "__main__":
    main()
