"""`shoestring demo`: the whole path in one command, fitted into minutes, resumed and measured again."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from shoestring import estimate
from shoestring.recipes.load import load_recipe

TINY = (
    *("data.scenes.images=96", "data.scenes.held_out=16"),
    *("model.hidden_size=32", "model.mixer_size=32", "model.depth=1", "model.text_depth=1"),
    *("model.head_dim=16", "phases.0.images=96", "phases.0.warmup=24", "phases.1.images=96"),
    *("sampling.steps=2", "evaluation.prompts=4", "evaluation.seeds=1", "evaluation.loss_images=8"),
)
SETS = tuple(word for each in TINY for word in ("--set", each))
CLOSING = re.compile(
    r"scene accuracy [01]\.\d{3} on 4 pictures of unseen scenes \([01]\.\d{3} of unseen pairs\), "
    r"([\d,]+) images seen, \d+\.\d minutes, report: (\S+)\n"
)


def test_one_command_trains_scores_and_reports_and_is_not_done_twice(empty: Path, command: Any) -> None:
    said = command("demo", *SETS)
    assert said.code == 0
    closing = CLOSING.fullmatch(said.out)
    assert closing, said.out
    assert closing.groups() == ("192", "runs/demo/report.html")
    assert (empty / "runs/demo/evaluation.json").is_file()
    checkpoints = {path: path.stat().st_mtime_ns for path in empty.rglob("COMMITTED")}
    again = command("demo", *SETS)
    assert again.code == 0
    assert "is trained already; measuring it again" in again.err
    assert CLOSING.fullmatch(again.out)
    assert {path: path.stat().st_mtime_ns for path in empty.rglob("COMMITTED")} == checkpoints
    error = command("demo", *SETS, "--set", "seed=1").refused()
    assert "runs/demo/recipe.yaml: the recipe has changed since the run began: seed: 0 -> 1." in error


def test_minutes_are_made_into_images_before_training(
    empty: Path, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "MEASURED_SECONDS", 0.2)
    said = command("demo", "--minutes", 0.05, *SETS)
    assert said.code == 0
    told = re.search(
        r"Measured images/s: masked (\d+), dense (\d+)\. 0\.05 minutes make ([\d,]+) images\.", said.err
    )
    assert told, said.err
    images = int(told[3].replace(",", ""))
    recipe = load_recipe(empty / "runs/demo-0.05min/recipe.yaml")
    assert recipe.images == images
    assert [phase.images % 48 for phase in recipe.phases] == [0, 0]
    rates = [int(rate) for rate in told.groups()[:2]]
    seconds = sum(phase.images / rate for phase, rate in zip(recipe.phases, rates, strict=True))
    rounding = sum(24 / rate for rate in rates)  # to whole batches of 48
    assert seconds == pytest.approx(3, abs=rounding + 0.3)
    assert f"{images:,} images seen" in said.out
    again = command("demo", "--minutes", 0.05, *SETS)
    assert again.code == 0
    assert "is trained already" in again.err


def test_a_stopped_demo_goes_on(empty: Path, command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from shoestring.training.loop import Training

    average, stopped = Training._average, []

    def stop(self: Training, phase: Any) -> None:
        average(self, phase)
        if not stopped:
            stopped.append(True)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Training, "_average", stop)
    said = command("demo", *SETS)
    assert said.code == 130
    assert said.err.endswith("Run the same command again to go on with runs/demo.\n")
    again = command("demo", *SETS)
    assert again.code == 0
    assert "Resuming runs/demo after 48 images." in again.err
    assert CLOSING.fullmatch(again.out)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--set", "model.depht=2"), "--set model.depht: unknown key. Did you mean 'depth'?"),
        (
            ("--set", "data.store=photos"),
            "--set data.store: the demo is of scenes. Use shoestring train demo --set ...",
        ),
        (
            ("--system", "koala", "--set", "data.store=photos"),
            "--set data.store: the demo is of scenes. Use shoestring train koala-demo --set ...",
        ),
        (("--device", "tpu"), "device 'tpu': unknown."),
        (("--name", ".."), "--set name: '..' is not allowed"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    words: tuple[str, ...], message: str, empty: Path, command: Any
) -> None:
    assert command("demo", *words).refused().startswith(message)
    assert list(empty.iterdir()) == []


SMALL_CASCADE = (
    *("data.scenes.images=96", "data.scenes.held_out=16"),
    *("evaluation.prompts=4", "evaluation.seeds=1", "evaluation.loss_images=8"),
    *(f"stages.{stage}.phases.{number}.images=64" for stage in "abc" for number in (0, 1)),
    *(f"stages.{stage}.phases.0.warmup=0" for stage in "abc"),
    *("stages.a.objective.adversarial_start=96", "stages.c.sampling.steps=2"),
    *("stages.b.model.c_hidden=[16, 32]", "stages.b.model.nhead=[-1, 2]", "stages.c.model.depth=1"),
)


@pytest.mark.slow
def test_the_cascades_demo_trains_three_stages_and_says_how_good_each_is(empty: Path, command: Any) -> None:
    words = [word for each in SMALL_CASCADE for word in ("--set", each)]
    said = command("demo", "--system", "wuerstchen", *words)
    assert said.code == 0, said.err
    a, b, c = said.out.splitlines()
    for line, ratios in (
        (a, "4:1 along a side, 12:1"),
        (b, "16:1 along a side, 48:1"),
        (c, "16:1 along a side"),
    ):
        assert re.search(r"scene accuracy [01]\.\d{3} on 4 reconstructions of unseen scenes", line), line
        assert re.search(r"PSNR -?\d+\.\d dB, SSIM -?[01]\.\d{3}, compression " + ratios, line), line
    assert c.startswith("scene accuracy")
    assert "pictures of unseen scenes" in c
    assert all("128 images seen" in line for line in (a, b, c))
    again = command("demo", "--system", "wuerstchen", *words)
    assert again.code == 0
    assert again.err.count("is trained already; measuring it again") == 3
