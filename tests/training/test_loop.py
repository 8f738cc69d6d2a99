"""The loop: an unbroken run against stopped ones, accumulation, averages, and what ends a run."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shoestring.cost.ledger import Ledger
from shoestring.errors import TrainingDiverged
from shoestring.interfaces import Batch, Loss, Objective
from shoestring.runtime import keyed_normal
from shoestring.storage import RunFolder
from shoestring.training import checkpoint
from shoestring.training.checkpoint import Saver
from shoestring.training.loop import LoopSettings, PhasePlan, Training, Turn
from shoestring.training.optimizers import OptimizerSettings, make_optimizers
from shoestring.training.tracking import JsonLines, Trackers


class Regression(Objective):
    """Learn a fixed linear map from keyed inputs."""

    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            super().__init__({"net": nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 2))})
        self.steps = 0
        self.poison: int | None = None

    def forward(self, batch: Batch) -> Loss:
        x = keyed_normal(0, "x", batch.index, (6,))
        error = (self.trained["net"](x) - x[:, :2]) ** 2
        if self.poison is not None and int(batch.index[0]) >= self.poison:
            error = error * math.nan
        return Loss(error.mean(dim=1))

    def after_step(self) -> None:
        self.steps += 1


def batches(offset: int, size: int, total: int) -> Any:
    def from_image(start: int) -> Iterator[Batch]:
        for first in range(start, total, size):
            index = torch.arange(offset + first, offset + min(first + size, total))
            rows = len(index)
            yield Batch(index, torch.zeros(rows, 1, 1, 1), torch.zeros(rows, 1, 1), None)

    return from_image


def make(
    run: Path, *, microbatch: int | None = None, kind: str = "adamw", **settings: Any
) -> tuple[Training, Regression]:
    """A run of two phases, 40 and 40 images in batches of 8, with averages in the second from image 16 on."""
    objective = Regression()
    ledger = Ledger("test", "cpu", 1, "float32", 0)
    folder = RunFolder(run)
    start = settings.pop("start_metrics_at", 0)

    def plan(name: str, offset: int, **more: Any) -> PhasePlan:
        return PhasePlan(
            name=name,
            images=40,
            batch=8,
            microbatch=microbatch,
            enter=lambda: None,
            batches=batches(offset, 8, 40),
            lr=lambda images: 1e-2 * (1 - images / 80),
            cost=lambda: ledger.phase(name, 1, 0.0),
            flops_per_image=lambda images: 10.0,
            **more,
        )

    optimizers = make_optimizers(objective.trained, OptimizerSettings(kind=kind))
    keep, keep_every = settings.pop("keep", 2), settings.pop("keep_every", None)
    background = settings.pop("background", False)
    training = Training(
        turns=[Turn("net", objective, optimizers, objective)],
        phases=[
            plan("first", 0, grad_clip=0.5),
            plan("second", 40, ema_decays=(0.9, 0.5), ema_start=16),
        ],
        run=folder,
        trackers=Trackers([JsonLines(folder.metrics, start)]),
        settings=LoopSettings(torch.device("cpu"), **{"log_every": 8, "checkpoint_every": 16, **settings}),
        ledger=ledger,
        saver=Saver(folder.checkpoints, keep=keep, keep_every=keep_every, background=background),
    )
    return training, objective


def weights(training: Training) -> dict[str, Tensor]:
    parts = {f"w/{k}": v.clone() for k, v in training.turns[0].objective.trained.state_dict().items()}
    for ema in training.emas.values():
        parts |= {f"e/{k}": v.clone() for k, v in ema.state().items()}
    return parts


def losses(run: Path) -> list[tuple[int, float, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(r["images"], r["loss"], r["lr"]) for r in lines if r["kind"] == "train"]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("stop", [8, 24, 40, 48, 64, 72])
def test_a_run_stopped_anywhere_goes_on_exactly(tmp_path: Path, stop: int, kind: str) -> None:
    """Weights, averages, losses and rates equal an unbroken run's bit for bit."""
    whole, _ = make(tmp_path / "whole", kind=kind)
    assert whole.train()

    first, objective = make(tmp_path / "broken", kind=kind)
    forward = objective.forward

    def stop_here(batch: Batch) -> Loss:
        if int(batch.index[-1]) + 1 == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(batch)

    objective.forward = stop_here  # type: ignore[method-assign]
    stopped = first.train()
    assert first.progress.images == stop
    assert stopped is False
    saved = checkpoint.newest(first.run.checkpoints, print)
    assert saved is not None
    second, _ = make(tmp_path / "broken", kind=kind, start_metrics_at=stop)
    second.restore(saved)
    assert second.train()
    assert same(weights(whole), weights(second))
    assert losses(tmp_path / "whole") == losses(tmp_path / "broken")
    assert second.progress == whole.progress


def test_a_killed_run_goes_on_from_its_newest_checkpoint(tmp_path: Path) -> None:
    """What an abrupt end leaves is the last checkpoint; the lines written after it are written again once."""
    whole, _ = make(tmp_path / "whole")
    whole.train()
    first, objective = make(tmp_path / "broken")
    forward = objective.forward

    def crash(batch: Batch) -> Loss:
        if int(batch.index[0]) == 56:
            raise MemoryError
        return forward(batch)

    objective.forward = crash  # type: ignore[method-assign]
    with pytest.raises(MemoryError):
        first.train()
    saved = checkpoint.newest(first.run.checkpoints, print)
    assert saved is not None
    assert saved.path.name == f"{48:012d}"
    second, _ = make(tmp_path / "broken", start_metrics_at=48)
    second.restore(saved)
    second.train()
    assert same(weights(whole), weights(second))
    assert losses(tmp_path / "whole") == losses(tmp_path / "broken")


def test_microbatches_add_up_to_the_batch(tmp_path: Path) -> None:
    whole, _ = make(tmp_path / "a")
    parts, objective = make(tmp_path / "b", microbatch=3)
    whole.train()
    parts.train()
    pairs = zip(weights(whole).values(), weights(parts).values(), strict=True)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in pairs)
    assert objective.steps == 10, "after_step follows optimiser steps, not microbatches"


def test_averages_begin_where_the_phase_says(tmp_path: Path) -> None:
    training, _ = make(tmp_path)
    training.train()
    assert training.emas["net"].decays == (0.9, 0.5)
    own = weights(training)
    shown = training.weights()
    assert torch.equal(shown["net.0.weight"], own["e/0.9/net.0.weight"])
    assert not torch.equal(shown["net.0.weight"], own["w/net.0.weight"])
    assert same(own, weights(training)), "looking changes nothing"


def test_the_ledger_counts_every_image_once(tmp_path: Path) -> None:
    training, _ = make(tmp_path)
    training.train()
    ledger = training.ledger.to_json()
    assert [(p["name"], p["images"], p["steps"]) for p in ledger["phases"]] == [
        ("first", 40, 5),
        ("second", 40, 5),
    ]
    assert ledger["total"]["flops"] == 800.0
    assert ledger["total"]["seconds"] > 0
    assert ledger["extra"]["checkpoint_seconds"] > 0


def test_a_loss_that_is_no_number_stops_with_the_last_good_checkpoint(tmp_path: Path) -> None:
    training, objective = make(tmp_path)
    objective.poison = 56
    with pytest.raises(
        TrainingDiverged, match=r"the loss is nan.*last good checkpoint is kept.*000000000048"
    ):
        training.train()
    saved = checkpoint.newest(training.run.checkpoints, print)
    assert saved is not None
    assert all(tensor.isfinite().all() for tensor in saved.tensors().values())


def test_a_loss_spike_stops_and_an_ordinary_rise_does_not(tmp_path: Path) -> None:
    training, objective = make(tmp_path, spike=10.0)
    forward = objective.forward
    factor = {"at": 1.0}

    def spiking(batch: Batch) -> Loss:
        return Loss(forward(batch).per_sample * (factor["at"] if int(batch.index[0]) >= 64 else 1.0))

    objective.forward = spiking  # type: ignore[method-assign]
    factor["at"] = 3.0
    assert training.train()
    training, objective = make(tmp_path / "spike", spike=10.0)
    forward = objective.forward
    objective.forward = spiking  # type: ignore[method-assign]
    factor["at"] = 1000.0
    with pytest.raises(TrainingDiverged, match=r"the loss jumped to .* over 10 times its mean"):
        training.train()


def test_only_the_last_checkpoints_are_kept_and_callbacks_see_averages(tmp_path: Path) -> None:
    training, _ = make(tmp_path, keep=2, preview_every=40)
    seen: list[tuple[str, int, Tensor]] = []

    def note(what: str) -> Any:
        return lambda images, weights, *ledger: seen.append((what, images, weights["net.0.weight"]))

    training.on_checkpoint, training.on_preview = note("checkpoint"), note("preview")
    training.train()
    assert sorted(p.name for p in training.run.checkpoints.iterdir()) == [f"{64:012d}", f"{80:012d}"]
    assert [(what, images) for what, images, _ in seen] == [
        ("checkpoint", 16),
        ("checkpoint", 32),
        ("preview", 40),
        ("checkpoint", 40),
        ("checkpoint", 48),
        ("checkpoint", 64),
        ("preview", 80),
        ("checkpoint", 80),
    ]
    assert torch.equal(seen[-1][2], training.emas["net"].averages[0][0])
