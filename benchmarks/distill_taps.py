"""What should a student learn from? Every kind of tap on both cuts of one teacher, at equal images.

python benchmarks/distill_taps.py [--teacher runs/koala-demo-teacher] [--runs runs] [--images 4800]
                                  [--seeds 0 1] [--cuts mid no-mid] [--taps task output ...]
                                  [--minutes M] [--device auto] [--tiny]

The teacher is that of `shoestring demo --system koala`. Students are cut as the demo's, with the middle block
(as KOALA-1B) and without (as KOALA-700M), and differ in what they learn from alone: order of the images,
noise and times are the same for one seed. All but `task` and `output` learn their task and the features, as
in the paper's comparisons; `koala` is its final choice: task, output, self-attention everywhere and the two
outer blocks.

`teacher_error` is the mean square between the student's and the teacher's outputs on held-out images over
fixed noise levels; `ratio_to_task` compares it with learning the task alone, same cut and seed. Runs are kept
in --runs: finished ones are not trained again, stopped ones (Ctrl-C, or --minutes are over) go on when the
same command is given again. --tiny trains a teacher of its own first.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from parts.figures import hardware, tell
from parts.training import STOPPED, say, train

from shoestring import build
from shoestring.recipes.fields import parse_images
from shoestring.recipes.load import load_stages
from shoestring.recipes.schema import Recipe
from shoestring.runtime import pick_device
from shoestring.storage import RunFolder, read_json, write_json

CUTS = {"mid": "keep", "no-mid": "drop"}
"""Cuts by what becomes of the middle block."""

FEATURES = ("self_attention", "cross_attention", "feed_forward", "resnet", "block")
NO_FEATURES: dict[str, Any] = {"feature_weight": 0, "feature_scale": "none", "taps": []}
LEARNED: dict[str, dict[str, Any]] = {
    "task": {"output_weight": 0, **NO_FEATURES},
    "output": {"output_weight": 1, **NO_FEATURES},
    **{each: {"output_weight": 0, "taps": [each]} for each in FEATURES},
    "koala": {"output_weight": 1, "taps": ["self_attention", "outer_blocks"]},
}
"""What a student learns from beside its task, as settings of the objective."""

FOUND = "teacher_error.json"

TINY = (
    "data.scenes.images=64",
    "data.scenes.held_out=8",
    "train.log_every=64",
    "evaluation={prompts: 4, seeds: 1, loss_images: 8, loss_levels: [-1, 1]}",
    "stages.teacher.model={block_out_channels: [8, 8, 16], norm_groups: 4, head_dim: 8}",
    "stages.teacher.phases=[{name: only, size: 32, images: 16, batch: 8, lr: 1.0e-3}]",
)


@dataclass
class Comparison:
    """What all students share."""

    teacher: Path
    runs: Path
    images: int
    device: torch.device
    until: float
    tiny: bool

    def recipe(self, cut: str, learned: str, seed: int) -> Recipe:
        """A student's recipe: the demo's, with its cut, what it learns from and its seed."""
        phases = [{**each, "images": self.images} for each in self._phases()]
        sets = [
            *(TINY if self.tiny else ()),
            f"name=taps-{cut}-{learned.replace('_', '-')}-{self.images}-seed{seed}",
            f"seed={seed}",
            "train.preview_every=null",
            *(() if self.tiny else ("evaluation.loss_images=256",)),
            f"stages.features.teacher={json.dumps(str(self.teacher))}",
            f"stages.features.model.mid={CUTS[cut]}",
            f"stages.features.phases={json.dumps(phases)}",
            *(
                f"stages.features.objective.{key}={json.dumps(value)}"
                for key, value in LEARNED[learned].items()
            ),
        ]
        return load_stages("koala-demo", sets, self.runs)["features"]

    def _phases(self) -> list[dict[str, Any]]:
        """The demo's last phase of a student, alone."""
        own = load_stages("koala-demo", [*(TINY if self.tiny else ())], self.runs)["features"]
        last = own.phases[-1].model_dump(mode="json")
        return [{**last, "warmup": 0, **({"batch": 8} if self.tiny else {})}]

    def error(self, recipe: Recipe) -> dict[str, float]:
        """A finished student's error to the teacher by split, measured once; that of its cut under `cut`."""
        run = RunFolder(self.runs / recipe.name)
        train(recipe, run, self.device, self.until)
        kept = run.root / FOUND
        if not kept.is_file():
            store = build.open_store(recipe, device=self.device, log=say)
            system = build.system_of(recipe, store)
            networks = {"unet": system.opened(run).networks["unet"].eval().requires_grad_(False)}
            parts = system.parts(networks)
            for part in parts:
                part.objective.to(self.device)
            size, found = recipe.phases[-1].size, {}
            for split in (name for name in store.splits if name != "train"):
                for row in system.held_out_rows(parts, split, size, self.device):
                    if row["facet"] == "all" and row["metric"].endswith("teacher_error"):
                        found[f"{row['metric'].removesuffix('teacher_error')}{split}"] = row["value"]
            write_json(kept, found)
        return dict(read_json(kept))


def compare(comparison: Comparison, cuts: list[str], learned: list[str], seeds: list[int]) -> None:
    """Train and tell every student, one seed of all before the next; then means over the seeds."""
    errors: dict[tuple[str, str, str], list[float]] = {}
    common = {"images": comparison.images, "hardware": hardware(comparison.device)}
    for seed in seeds:
        for cut in cuts:
            for each in learned:
                recipe = comparison.recipe(cut, each, seed)
                for split, value in comparison.error(recipe).items():
                    about = {"cut": cut, "taps": each, "seed": seed, "split": split.removeprefix("cut_")}
                    if split.startswith("cut_"):
                        if each == learned[0] and seed == seeds[0]:
                            tell("distill_taps", "teacher_error_before", value, "mse", **about, **common)
                        continue
                    tell("distill_taps", "teacher_error", value, "mse", **about, **common)
                    errors.setdefault((cut, each, split), []).append(value)
    for (cut, each, split), values in errors.items():
        task = errors.get((cut, "task", split))
        ratios = [value / base for value, base in zip(values, task, strict=True)] if task else []
        about = {"cut": cut, "taps": each, "split": split, "seeds": seeds}
        tell("distill_taps", "mean_teacher_error", statistics.fmean(values), "mse", **about, **common)
        if ratios:
            rounded = [float(f"{ratio:.4g}") for ratio in ratios]
            tell(
                "distill_taps",
                "ratio_to_task",
                statistics.fmean(ratios),
                "ratio",
                each=rounded,
                **about,
                **common,
            )


def main() -> None:
    """Compare on a teacher that is there, or with --tiny on one made for it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", type=Path, default=Path("runs/koala-demo-teacher"), help="its run")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where runs are kept")
    parser.add_argument("--images", type=parse_images, default=4_800, help="a student's training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--cuts", nargs="+", choices=CUTS, default=list(CUTS))
    parser.add_argument("--taps", nargs="+", choices=LEARNED, default=list(LEARNED))
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop training after so many")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--tiny", action="store_true", help="tiny networks, one seed, in a folder of its own")
    arguments = parser.parse_args()
    device, until = pick_device(arguments.device), time.monotonic() + 60 * arguments.minutes
    try:
        if arguments.tiny:
            with tempfile.TemporaryDirectory() as folder, chdir(folder):
                runs = Path("runs")
                teacher = load_stages("koala-demo", TINY, runs)["teacher"]
                train(teacher, RunFolder(runs / teacher.name), device, math.inf)
                own = Comparison(runs / teacher.name, runs, 16, device, until, True)
                compare(own, list(CUTS), ["task", "koala"], [0])
            return
        if not RunFolder(arguments.teacher).pipeline.is_dir():
            told = "no trained teacher. Train one: shoestring train koala-demo --stage teacher"
            parser.error(f"--teacher {arguments.teacher}: {told}")
        asked = Comparison(arguments.teacher, arguments.runs, arguments.images, device, until, False)
        compare(asked, arguments.cuts, arguments.taps, arguments.seeds)
    except KeyboardInterrupt:
        say("Stopped. What was trained is kept: give the same command again to go on.")
        sys.exit(STOPPED)


if __name__ == "__main__":
    main()
