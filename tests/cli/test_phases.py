"""The published four phases through the command line: own numbers each, weights carried on, exact resumes."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook

import shoestring
from shoestring.models.layers import TimeEmbedding
from shoestring.models.microdit import MicroDiT, MicroDiTBlock
from shoestring.recipes.load import load_recipe
from shoestring.runtime import keyed_normal
from shoestring.storage import read_json
from shoestring.training.checkpoint import Checkpoint
from tests.cli.conftest import run as command_line
from tests.cli.test_train import weights

RECIPE = Path(__file__).with_name("phases.yaml")
IMAGES = (64, 40, 96, 48)
STARTS = (0, 64, 104, 200)
STEPS = ((0, 4), (4, 7), (7, 13), (13, 16))  # batches of 16; the second phase ends with one of 8
TOTAL = 248


@dataclass
class Step:
    """What one optimiser step was made of, seen from inside the network and the optimiser."""

    sides: list[int] = field(default_factory=list)  # of latents, one a forward pass
    scales: list[float] = field(default_factory=list)  # of positions, one a forward pass
    rows: list[int] = field(default_factory=list)  # images, one a forward pass
    tokens: list[int] = field(default_factory=list)  # one a block and forward pass
    c_noise: list[Tensor] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)  # before the step
    lr: float = 0.0
    grad_norm: float = 0.0  # after clipping


@contextlib.contextmanager
def watched() -> Iterator[list[Step]]:
    """Every optimiser step inside, in order, as torch's own hooks see a real run's modules and optimisers."""
    steps: list[Step] = []
    now = [Step()]

    def before_forward(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        step = now[0]
        if isinstance(module, MicroDiT) and not module.patch_embed.weight.is_meta:
            step.scales.append(module.config.pos_interp_scale)
            if not step.weights:
                step.weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        if not inputs or not isinstance(inputs[0], Tensor) or inputs[0].is_meta:
            return
        if isinstance(module, nn.Conv2d):
            step.sides.append(inputs[0].shape[-1])
            step.rows.append(len(inputs[0]))
        elif isinstance(module, TimeEmbedding):
            step.c_noise.append(inputs[0].clone())
        elif isinstance(module, MicroDiTBlock):
            step.tokens.append(inputs[0].shape[1])

    def before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        groups = optimizer.param_groups
        gradients = [p.grad.flatten() for group in groups for p in group["params"] if p.grad is not None]
        now[0].lr, now[0].grad_norm = groups[0]["lr"], torch.cat(gradients).norm().item()
        steps.append(now[0])
        now[0] = Step()

    hooks = register_module_forward_pre_hook(before_forward), register_optimizer_step_pre_hook(before_step)
    try:
        yield steps
    finally:
        for hook in hooks:
            hook.remove()


@pytest.fixture(scope="module")
def unbroken(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Step]]:
    """The folder of a finished run (runs/phases), not to be changed, and its steps."""
    folder = tmp_path_factory.mktemp("phases")
    shutil.copytree(world / "parted", folder / "parted")
    with contextlib.chdir(folder), watched() as steps:
        assert command_line("train", RECIPE) == 0
    assert len(steps) == STEPS[-1][1]
    return folder / "runs/phases", steps


def steps_of(steps: list[Step], phase: int) -> list[Step]:
    return steps[slice(*STEPS[phase])]


def saved(run: Path, images: int) -> dict[str, Tensor]:
    """The tensors of the checkpoint after so many images; there is one after every step."""
    return Checkpoint(run / "checkpoints" / f"{images:012d}", {}).tensors()


def below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def network(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's own weights under the network's names."""
    return below(tensors, "model/denoiser/transformer.")


def average(tensors: dict[str, Tensor], decay: float) -> dict[str, Tensor]:
    """A checkpoint's average of one decay, likewise; empty where there is none."""
    return below(tensors, f"ema/denoiser/{decay}/transformer.")


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- each phase its own numbers --------------------------------------------------------------------------


def test_the_recipe_is_the_published_one_but_for_its_size() -> None:
    """Masks, rates, schedules, noise levels, decays and position scales come from microdit-xl."""
    small, published = load_recipe(RECIPE), load_recipe("microdit-xl")
    scaled = {"size": 0, "images": 0, "batch": 0, "warmup": 0, "microbatch": 0, "grad_clip": 0, "ema": 0}
    for ours, theirs in zip(small.phases, published.phases, strict=True):
        assert ours.model_copy(update=scaled) == theirs.model_copy(update=scaled)
        mine, other = small.ema_in(ours), published.ema_in(theirs)
        assert (mine and mine.decays) == (other and other.decays)
        assert small.objective_in(ours) == published.objective_in(theirs)
    assert small.optimizer == published.optimizer


@pytest.mark.parametrize(
    ("phase", "side", "patches", "kept", "passes", "clip"),
    [
        (0, 16, 64, 16, 2, 0.01),
        (1, 16, 64, 64, 4, 0.01),
        (2, 32, 256, 64, 1, 0.02),
        (3, 32, 256, 256, 1, 0.02),
    ],
)
def test_each_phase_has_its_size_mask_passes_and_clip(
    phase: int, side: int, patches: int, kept: int, passes: int, clip: float, unbroken: Any
) -> None:
    """The mixer's 2 blocks see every patch, the backbone's 3 those that are kept."""
    steps = steps_of(unbroken[1], phase)
    assert sum(sum(step.rows) for step in steps) == IMAGES[phase]
    for step in steps:
        count = passes if sum(step.rows) == 16 else passes // 2
        assert step.sides == [side] * count
        assert step.scales == [side / 16] * count
        assert step.tokens == ([patches] * 2 + [kept] * 3) * count
        assert step.grad_norm == pytest.approx(clip, rel=1e-3), "the limit, which every step here exceeds"


@pytest.mark.parametrize(
    ("phase", "mean", "deviation"), [(0, -0.6, 1.2), (1, -0.6, 1.2), (2, 0, 0.6), (3, 0, 0.6)]
)
def test_each_phase_draws_its_own_noise_levels(
    phase: int, mean: float, deviation: float, unbroken: Any
) -> None:
    """log sigma = 4 c_noise ~ Normal(mean, deviation), from one stream of draws through all phases."""
    log_sigma = 4 * torch.cat([c for step in steps_of(unbroken[1], phase) for c in step.c_noise])
    index = torch.arange(STARTS[phase], STARTS[phase] + IMAGES[phase])
    assert torch.allclose((log_sigma - mean) / deviation, keyed_normal(18, "noise_level", index), atol=1e-5)


def test_each_phase_has_its_rate(unbroken: Any, metrics: Any) -> None:
    """Warm-up and cosine to a third, constant, warm-up, constant; in the optimiser and in the records."""
    rates = [[step.lr for step in steps_of(unbroken[1], phase)] for phase in range(4)]
    cosine = 2.4e-4 * (0.33 + 0.67 * 0.5)  # half way from the end of the warm-up to the end of the phase
    assert rates[0] == pytest.approx([0, 1.2e-4, 2.4e-4, cosine])
    assert rates[1] == [8e-5] * 3
    assert rates[2] == [0] + [8e-5] * 5
    assert rates[3] == [8e-5] * 3
    told = [line for line in metrics(unbroken[0]) if line["kind"] == "train"]
    assert [line["phase"] for line in told if line["images"] in (64, 104, 200, 248)] == [
        *("masked-256", "dense-256", "masked-512", "dense-512")
    ]
    masks = {line["phase"]: line["mask"] for line in told}
    assert masks == {"masked-256": 0.75, "dense-256": 0.0, "masked-512": 0.75, "dense-512": 0.0}


# --- what is carried on ----------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", [1, 2, 3])
def test_a_phase_begins_with_the_weights_that_the_last_one_ended_with(phase: int, unbroken: Any) -> None:
    """Bit for bit, also to the other size: own weights, not averages."""
    run, steps = unbroken
    assert same(steps_of(steps, phase)[0].weights, network(saved(run, STARTS[phase])))


def test_moments_are_carried_on_but_into_the_phase_that_begins_afresh(unbroken: Any) -> None:
    """AdamW's count of steps: 4 + 3, then anew 6 + 3, as the authors' runs loaded each other."""
    run, _ = unbroken
    for images, steps in ((64, 4), (104, 7), (120, 1), (200, 6), (248, 9)):
        tensors = saved(run, images)
        counts = {
            float(t) for name, t in tensors.items() if name.startswith("optimizer") and name.endswith("/step")
        }
        assert counts == {steps}, f"after {images} images"


def test_averages_begin_at_their_image_and_anew_with_another_decay(unbroken: Any) -> None:
    """None; none; 0.99975 from image 48 of the third phase; 0.9975 from image 16 of the last.

    Each starts as the weights of its moment and follows its equation from step to step.
    """
    run, _ = unbroken
    ends = [0, 64, 104, 200, 248]
    for phase, (decay, start) in {2: (0.99975, 48), 3: (0.9975, 16)}.items():
        expected: dict[str, Tensor] = {}
        for images in range(ends[phase] + 16, ends[phase + 1] + 1, 16):
            tensors = saved(run, images)
            own = network(tensors)
            if images - ends[phase] > start:
                expected = {n: t.lerp(own[n], 1 - decay) for n, t in expected.items()} if expected else own
            found = average(tensors, decay)
            assert found.keys() == expected.keys(), f"after {images} images"
            assert all(torch.allclose(found[n], t, rtol=0, atol=1e-7) for n, t in expected.items())
            assert len(below(tensors, "ema/")) == len(expected), "no other average"
    for images in (64, 80, 104):
        assert not below(saved(run, images), "ema/")


def test_the_pipeline_is_of_the_last_size_and_averaged(unbroken: Any) -> None:
    run, _ = unbroken
    pipeline = shoestring.load(run)
    config = pipeline.transformer.config
    assert (config.sample_size, config.pos_interp_scale) == (32, 2)
    assert pipeline("some grey noise").images[0].size == (32, 32)
    assert same(weights(run), average(saved(run, TOTAL), 0.9975))


# --- stopping and going on -------------------------------------------------------------------------------


@pytest.fixture
def here(unbroken: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the store alone, as the current one."""
    shutil.copytree(unbroken[0].parents[1] / "parted", tmp_path / "parted")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def back_to(run: Path, images: int) -> None:
    """Take away what came after so many images, as if the run had been killed then."""
    for later in (run / "checkpoints").iterdir():
        if int(later.name) > images:
            shutil.rmtree(later)


def assert_equal_runs(one: Path, other: Path, metrics: Any) -> None:
    assert metrics(one) == metrics(other)
    assert same(weights(one), weights(other))
    assert same(saved(one, TOTAL), saved(other, TOTAL)), "weights, averages and moments"


@pytest.mark.parametrize(
    "images",
    [
        pytest.param(48, id="in-the-first", marks=pytest.mark.slow),
        pytest.param(64, id="between-first-and-second", marks=pytest.mark.slow),
        pytest.param(80, id="in-the-second", marks=pytest.mark.slow),
        pytest.param(104, id="between-the-sizes"),
        pytest.param(184, id="in-the-third-averaging", marks=pytest.mark.slow),
        pytest.param(200, id="between-third-and-last", marks=pytest.mark.slow),
        pytest.param(216, id="in-the-last-before-averaging", marks=pytest.mark.slow),
        pytest.param(232, id="in-the-last-averaging", marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_equals_the_unbroken_one(
    images: int, unbroken: Any, here: Path, command: Any, metrics: Any
) -> None:
    """Within each phase and at each boundary, bit for bit."""
    shutil.copytree(unbroken[0], here / "runs/phases")
    back_to(here / "runs/phases", images)
    said = command("train", "runs/phases", "--resume")
    assert said.code == 0
    assert f"Resuming runs/phases after {images} images." in said.err
    assert_equal_runs(here / "runs/phases", unbroken[0], metrics)


@pytest.mark.slow
def test_until_averaging_begins_the_pipeline_has_the_networks_own_weights(
    unbroken: Any, here: Path, command: Any, metrics: Any
) -> None:
    """Stopped in the third phase, before image 48; then it goes on to the unbroken run's end."""

    def stop(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        trained = isinstance(module, nn.Conv2d) and module.weight.requires_grad
        if trained and inputs[0].shape[-1] == 32 and not inputs[0].is_meta:
            os.kill(os.getpid(), signal.SIGTERM)

    run, hook = here / "runs/phases", register_module_forward_pre_hook(stop)
    try:
        said = command("train", RECIPE)
    finally:
        hook.remove()
    assert said.code == 130
    assert "Stopped after 120 images" in said.err
    tensors = saved(run, 120)
    assert not below(tensors, "ema/")
    assert same(weights(run), network(tensors))
    assert shoestring.load(run).transformer.config.sample_size == 32
    assert command("train", "runs/phases", "--resume").code == 0
    assert_equal_runs(run, unbroken[0], metrics)


# --- a mask ratio that anneals ---------------------------------------------------------------------------

RAMP = "{start: 0.75, steps: 4, schedule: cosine}"
ANNEALED = f"[{{name: annealed, size: 16, images: 56, batch: 8, lr: 1.0e-3, mask: {RAMP}}}]"
KEPT = [16, 16, 28, 28, 52, 52, 64]  # of 64: ratios 0.75, 0.5625, 0.1875, 0, each for a quarter of 56 images


def test_an_annealed_mask_keeps_more_patches_step_by_step_and_costs_what_it_does(
    here: Path, command: Any, metrics: Any
) -> None:
    sets = ("--set", f"phases={ANNEALED}", "--set", "train.grad_clip=null", "--set", "train.log_every=8")
    with watched() as steps:
        assert command("train", RECIPE, *sets, "--set", "train.checkpoint_every=8").code == 0
    assert [step.tokens[-1] for step in steps] == KEPT
    assert {step.tokens[0] for step in steps} == {64}, "the mixer sees every patch"
    run = here / "runs/phases"
    told = [line for line in metrics(run) if line["kind"] == "train"]
    assert [line["images"] for line in told] == list(range(8, 57, 8))
    costs = [line["flops"] for line in told]
    increases = [b - a for a, b in zip([0, *costs], costs, strict=False)]
    assert increases == sorted(increases)
    assert len(set(increases)) == 4
    ledger = read_json(run / "ledger.json")
    (entry,) = ledger["phases"]
    assert (entry["mask"], entry["mask_end"], entry["flops"]) == (0.75, 0.0, costs[-1])
    planned = command("train", RECIPE, *sets, "--dry-run").out
    assert f"56 images of 16 px, mask 0.75 to 0: {costs[-1] / 56 / 1e6:.3g} MFLOP an image" in planned

    shutil.copytree(run, here / "unbroken")
    back_to(run, 24)
    with watched() as steps:
        assert command("train", "runs/phases", "--resume").code == 0
    assert [step.tokens[-1] for step in steps] == KEPT[3:], "in the middle of a ratio"
    assert metrics(run) == metrics(here / "unbroken")
    assert same(saved(run, 56), saved(here / "unbroken", 56))


# --- resuming with a changed recipe ----------------------------------------------------------------------


def test_what_is_kept_and_told_may_change_in_the_middle_and_no_weight_does(
    unbroken: Any, here: Path, command: Any
) -> None:
    run = here / "runs/phases"
    shutil.copytree(unbroken[0], run)
    back_to(run, 184)
    changed = [
        *("keep=1", "keep_every=100", "checkpoint_every=32", "async_checkpoints=true", "log_every=8"),
        *("spike=null", "preview_every=64", "preview_prompts=[noise]"),
    ]
    sets = [word for each in changed for word in ("--set", f"train.{each}")]
    said = command("train", "runs/phases", "--resume", *sets, "--set", "evaluation.loss_images=4")
    assert said.code == 0
    assert "rounding" not in said.err
    assert same(saved(run, TOTAL), saved(unbroken[0], TOTAL))
    kept = sorted(int(path.name) for path in (run / "checkpoints").iterdir())
    assert kept == [104, 200, 248], "the first at or beyond each 100, and the last"
    assert [path.stem for path in (run / "previews").glob("*.png")] == ["000000200"]
    assert load_recipe(run / "recipe.yaml").train.keep == 1


def test_a_change_of_roundings_is_allowed_and_said(unbroken: Any, here: Path, command: Any) -> None:
    run = here / "runs/phases"
    shutil.copytree(unbroken[0], run)
    back_to(run, 232)
    said = command("train", "runs/phases", "--resume", "--set", "phases.3.microbatch=5")
    assert said.code == 0
    assert (
        "From here on equal to rounding only, no longer bit for bit: phases.3.microbatch: None -> 5."
        in said.err
    )
    ours, theirs = network(saved(run, TOTAL)), network(saved(unbroken[0], TOTAL))
    assert not same(ours, theirs)
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-5) for name in ours)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("phases.3.mask=0.5", "phases.3.mask: 0.0 -> 0.5."),
        ("phases.3.ema.decays=[0.9]", "phases.3.ema.decays: [0.9975] -> [0.9]."),
        ("phases.3.position_scale=1", "phases.3.position_scale: 2.0 -> 1.0."),
        ("train.dtype=bfloat16", "train.dtype: 'float32' -> 'bfloat16'."),
        ("sampling.guidance=5", "sampling.guidance: 2.0 -> 5.0."),
    ],
)
def test_what_is_learned_by_may_not_change(
    change: str, told: str, unbroken: Any, here: Path, command: Any
) -> None:
    shutil.copytree(unbroken[0], here / "runs/phases")
    error = command("train", "runs/phases", "--resume", "--set", change).refused()
    assert f"the recipe has changed since the run began: {told} Resume with the same recipe, or" in error
