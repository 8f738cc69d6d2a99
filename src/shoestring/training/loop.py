"""The training loop: everything Shoestring trains is trained here.

    phases, in order
      batches of the phase, from where the run stands
        for each turn: rate -> forward, backward (in microbatches) -> clip -> step
        averages -> count -> log -> preview -> checkpoint -> stop if asked

Model, objective, data and what to do at a checkpoint are arguments. Nothing is drawn from a global random
generator, so a run that stops and resumes goes on exactly as if it had not. With several processes each
takes its slice of every batch, and all take the same decisions from the same figures.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from shoestring.errors import ShoestringError, TrainingDiverged
from shoestring.interfaces import Batch, Loss, Objective
from shoestring.processes import ALONE, World
from shoestring.runtime import PeakMemory, autocast
from shoestring.storage import RunFolder
from shoestring.training import checkpoint
from shoestring.training.checkpoint import Saver
from shoestring.training.ema import EMA
from shoestring.training.optimizers import Optimizers
from shoestring.training.parallel import gathered, passes, set_gradient_sync, whole
from shoestring.training.progress import Progress, Window, step_figures
from shoestring.training.tracking import Trackers

Look = Callable[[int, dict[str, Tensor]], None]
"""Called with the images so far and weights by name."""

Keep = Callable[[int, dict[str, Tensor], dict[str, Any]], None]
"""Called with the images so far, weights by name, and the ledger as JSON."""

_REFERENCE_WINDOWS = 5
_REFERENCE_MOMENTUM = 0.9


@dataclass
class Turn:
    """An objective with its optimisers; taken every `every` steps from `start` images on.

    Its weights are averaged where a phase asks for averages, unless `averaged` says no.
    `caller` is what `parallel.distribute` made of the objective: itself on one process.
    """

    name: str
    objective: Objective
    optimizers: Optimizers
    caller: nn.Module
    start: int = 0
    every: int = 1
    averaged: bool = True


class Cost(Protocol):
    """The ledger's entry of a phase."""

    images: int
    steps: int
    flops: float
    seconds: float
    process_seconds: float
    data_wait_seconds: float
    peak_memory_bytes: int


class Costs(Protocol):
    """The ledger: totals so far, time spent outside of steps, and itself as JSON."""

    @property
    def flops(self) -> float: ...

    @property
    def seconds(self) -> float: ...

    def spend(self, what: str, seconds: float) -> None: ...

    def to_json(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class PhasePlan:
    """One phase, ready to run; every count is of images since the phase began.

    batch            images of a step, on all processes together
    enter            sets resolution and noise levels in the objectives
    advance          sets what changes within the phase (the mask ratio); called before each step
    batches          this process's part of the phase's batches from an image on
    lr               the learning rate after so many images
    mask             the share of patches left out after so many images, for the records
    flops_per_image  operations of an image after so many images
    microbatch       images of one forward pass on a process; None is all of its part
    fresh_optimizer  begin with the optimisers as they are before their first step
    """

    name: str
    images: int
    batch: int
    enter: Callable[[], None]
    batches: Callable[[int], Generator[Batch, None, None]]
    lr: Callable[[int], float]
    cost: Callable[[], Cost]
    advance: Callable[[int], None] = lambda images: None
    mask: Callable[[int], float] = lambda images: 0.0
    flops_per_image: Callable[[int], float] = lambda images: 0.0
    microbatch: int | None = None
    fresh_optimizer: bool = False
    grad_clip: float | None = None
    ema_decays: tuple[float, ...] = ()
    ema_start: int = 0


@dataclass(frozen=True)
class LoopSettings:
    """How the loop runs; counts are of images."""

    device: torch.device
    dtype: torch.dtype = torch.float32
    spike: float | None = 10.0
    log_every: int = 1_000
    checkpoint_every: int = 1_000_000
    preview_every: int | None = None


@dataclass
class Training:
    """A run in memory: what is trained, where it stands, and whom to tell.

    `on_checkpoint` and `on_preview` get the count of images and the weights of all turns (averaged where
    there are averages, whole, on the CPU); they are called on the main process alone.
    `facts` are kept in every checkpoint for the caller.
    """

    turns: Sequence[Turn]
    phases: Sequence[PhasePlan]
    run: RunFolder
    trackers: Trackers
    settings: LoopSettings
    ledger: Costs
    saver: Saver
    world: World = ALONE
    on_checkpoint: Keep = lambda images, weights, ledger: None
    on_preview: Look = lambda images, weights: None
    facts: Mapping[str, Any] = field(default_factory=dict)
    progress: Progress = field(default_factory=Progress)
    emas: dict[str, EMA] = field(default_factory=dict)
    unread: list[tuple[int, Tensor, Tensor]] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """Whether every phase is done."""
        return self.progress.phase >= len(self.phases)

    def train(self) -> bool:
        """Run to the end; True when finished, False when stopped on request (a checkpoint was saved)."""
        with _stop_on_signal() as stop_asked, closing(self.trackers), closing(self.saver):
            if self.progress.images and not self.finished:
                self._event("resumed from a checkpoint")
            while not self.finished:
                phase = self.phases[self.progress.phase]
                self._enter(phase)
                if not self._run_phase(phase, stop_asked):
                    self.saver.wait()
                    return False
                self.progress.phase += 1
                self.progress.phase_images = 0
                self.save()
            self.saver.wait()
        return True

    def weights(self) -> dict[str, Tensor]:
        """The weights of all turns, averaged where there are averages; for `on_checkpoint`, `on_preview`.

        Whole and on the CPU on the main process, empty on the others; all processes must call it.
        """
        tensors: dict[str, Tensor] = {}
        for turn in self.turns:
            ema = self.emas.get(turn.name)
            tensors |= turn.objective.trained.state_dict() | ({} if ema is None else ema.average(0))
        return gathered(tensors, self.world)

    # --- one phase -------------------------------------------------------------------------------------

    def _enter(self, phase: PhasePlan) -> None:
        phase.enter()
        for turn in self.turns:
            ema = self.emas.get(turn.name)
            goes_on = ema is not None and ema.decays == phase.ema_decays
            fresh = self.progress.phase_images == 0
            if ema is not None and (not goes_on or (fresh and phase.ema_start)):
                del self.emas[turn.name]
            if fresh and phase.fresh_optimizer:
                turn.optimizers.prepare(())
        if self.progress.phase_images == 0:
            self._event(f"phase {phase.name}: {phase.images:,} images")

    def _run_phase(self, phase: PhasePlan, stop_asked: Callable[[], bool]) -> bool:
        progress, memory = self.progress, PeakMemory(self.settings.device)
        memory.reset()
        with closing(phase.batches(progress.phase_images)) as batches:
            while progress.phase_images < phase.images:
                started = time.perf_counter()
                batch = next(batches).to(self.settings.device)
                waited = time.perf_counter() - started
                count = min(phase.batch, phase.images - progress.phase_images)
                self.unread.append((count, *self.step(phase, batch)))
                self._average(phase)
                self._count(phase, count, started, waited)
                cost = phase.cost()
                cost.peak_memory_bytes = max(cost.peak_memory_bytes, memory.bytes())
                self._log_if_due(phase)
                if self._preview_if_due(count):
                    memory.reset()
                # All or none: a process that went on alone would wait for the others for ever.
                if self.world.any(stop_asked() or self.saver.failed):
                    self.save()
                    return False
                if progress.phase_images < phase.images and self._due("checkpoint_every", count):
                    self.save()
        return True

    def step(self, phase: PhasePlan, batch: Batch) -> tuple[Tensor, Tensor]:
        """One optimiser step of every turn whose time it is.

        Returns `step_figures` and the gradient norm of the first of them, summed over the processes and not
        yet read, so that a GPU need not be waited for.
        """
        done: list[tuple[Tensor, Tensor]] = []
        phase.advance(self.progress.phase_images)
        for turn in self._due_turns():
            turn.optimizers.set_lr(phase.lr(self.progress.phase_images))
            turn.optimizers.zero_grad()
            figures = self._backward(phase, turn, batch)
            norm = _clip(list(turn.optimizers.parameters()), phase.grad_clip)
            turn.optimizers.step()
            turn.objective.after_step()
            done.append((figures, norm))
        return done[0]

    def _due_turns(self) -> list[Turn]:
        """The turns of this step; there must be one."""
        images, step = self.progress.images, self.progress.step
        due = [turn for turn in self.turns if images >= turn.start and step % turn.every == 0]
        assert due, "every step has a turn"
        return due

    def _backward(self, phase: PhasePlan, turn: Turn, batch: Batch) -> Tensor:
        """Gradients of the mean loss over the global batch, in passes of a microbatch each."""
        settings, world = self.settings, self.world
        count = min(phase.batch, phase.images - self.progress.phase_images)
        number = passes(count, phase.microbatch, world)
        total: Tensor | None = None
        for pass_, part in enumerate(batch.parts(number), start=1):
            if world.size > 1:
                set_gradient_sync(turn.caller, pass_ == number)
            with autocast(settings.device, settings.dtype):
                loss: Loss = turn.caller(part)
            # Processes' gradients are averaged, and the mean is wanted over all images of the batch.
            (loss.per_sample.float().sum() * (world.size / count)).backward()
            figures = step_figures(loss.per_sample, loss.noise_level)
            total = figures if total is None else total + figures
        assert total is not None, "a batch has at least one part"
        return world.sum(total)

    def _average(self, phase: PhasePlan) -> None:
        for turn in self._due_turns():
            if turn.name in self.emas:
                self.emas[turn.name].update()
            elif turn.averaged and phase.ema_decays and self.progress.phase_images >= phase.ema_start:
                self.emas[turn.name] = EMA(turn.objective.trained, phase.ema_decays)

    def _count(self, phase: PhasePlan, count: int, started: float, waited: float) -> None:
        progress, window, cost = self.progress, self.progress.window, phase.cost()
        cost.flops += phase.flops_per_image(progress.phase_images) * count
        progress.images += count
        progress.phase_images += count
        progress.step += 1
        if self._log_due(phase):
            self._read()  # waits for the device, which is part of the step's time
        seconds = time.perf_counter() - started
        window.seconds += seconds
        window.waited += waited
        cost.images += count
        cost.steps += 1
        cost.seconds += seconds
        cost.process_seconds += seconds * self.world.size
        cost.data_wait_seconds += waited

    def _read(self) -> None:
        """Take the figures of steps not read yet into the window, in one transfer from the device."""
        if not self.unread:
            return
        rows = torch.stack([torch.cat([norm.reshape(1).to(sums), sums]) for _, sums, norm in self.unread])
        for (count, _, _), (norm, *figures) in zip(self.unread, rows.tolist(), strict=True):
            self.progress.window.add(figures, norm, count)
        self.unread.clear()

    # --- what is told and kept -----------------------------------------------------------------------------

    def _due(self, setting: str, last_batch: int) -> bool:
        """Whether the last batch carried the run over a multiple of the setting."""
        every: int | None = getattr(self.settings, setting)
        images = self.progress.images
        return every is not None and images // every > (images - last_batch) // every

    def _log_due(self, phase: PhasePlan) -> bool:
        pending = self.progress.window.images + sum(count for count, _, _ in self.unread)
        return pending >= self.settings.log_every or self.progress.phase_images >= phase.images

    def _log_if_due(self, phase: PhasePlan) -> None:
        if not self._log_due(phase):
            return
        progress, window = self.progress, self.progress.window
        self._check_finite()
        mean = window.loss / window.images
        self._check_spike(mean)
        by_noise = window.mean_by_noise()
        self.trackers.log(
            {
                "kind": "train",
                "images": progress.images,
                "step": progress.step,
                "phase": phase.name,
                "loss": mean,
                "lr": phase.lr(progress.phase_images),
                "grad_norm": window.grad_norm / window.steps,
                "mask": phase.mask(progress.phase_images),
                "images_per_second": window.images / window.seconds,
                "data_wait": window.waited / window.seconds,
                "memory_bytes": phase.cost().peak_memory_bytes,
                "seconds": self.ledger.seconds,
                "flops": self.ledger.flops,
                **({"by_noise": by_noise} if by_noise else {}),
            }
        )
        progress.window = Window()

    def _check_finite(self) -> None:
        window = self.progress.window
        for what, value in (("loss", window.loss), ("gradient norm", window.grad_norm)):
            if not math.isfinite(value):
                raise TrainingDiverged(self._diverged(f"the {what} is {value}"))

    def _check_spike(self, mean: float) -> None:
        progress, limit = self.progress, self.settings.spike
        reference = progress.reference_loss
        settled = progress.windows >= _REFERENCE_WINDOWS
        if limit is not None and settled and reference is not None and mean > limit * reference:
            raise TrainingDiverged(
                self._diverged(
                    f"the loss jumped to {mean:.4g}, over {limit:g} times its mean {reference:.4g}"
                )
            )
        momentum = _REFERENCE_MOMENTUM if reference is not None else 0.0
        progress.reference_loss = momentum * (reference or 0.0) + (1 - momentum) * mean
        progress.windows += 1

    def _diverged(self, what: str) -> str:
        with suppress(ShoestringError):
            self.saver.wait()
        kept = checkpoint.newest(self.run.checkpoints, self._event) if self.world.is_main else None
        root = self.run.root
        advice = (
            f"The last good checkpoint is kept: {kept.path}. Start from it at a lower rate with "
            f"`--name {root.name}-2 --set init={root} --set phases.{self.progress.phase}.lr=...`."
            if kept
            else "No checkpoint had been written yet. Lower the phase's lr, or set train.grad_clip."
        )
        return f"Training stopped after {self.progress.images:,} images: {what}. {advice}"

    def _preview_if_due(self, last_batch: int) -> bool:
        if not self._due("preview_every", last_batch):
            return False
        started = time.perf_counter()
        weights = self.weights()
        if self.world.is_main:
            self.on_preview(self.progress.images, weights)
        self.ledger.spend("preview_seconds", time.perf_counter() - started)
        return True

    def _event(self, text: str) -> None:
        self.trackers.log({"kind": "event", "images": self.progress.images, "text": text})

    # --- checkpoints -------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint, and before it counts what the caller keeps at each (the pipeline).

        In this order a run that a checkpoint calls finished has its pipeline, wherever it was killed.
        """
        started = time.perf_counter()
        self._read()
        self._check_finite()
        self.saver.wait()  # so that two gathered copies of the weights are never held
        images, weights = self.progress.images, self.weights()
        state = {
            "progress": asdict(self.progress),
            "ema": {name: ema.decays for name, ema in self.emas.items()},
            "ledger": self.ledger.to_json(),
            "facts": dict(self.facts),
        }
        keep = partial(self.on_checkpoint, images, weights, state["ledger"])
        self.saver.save(images, self._tensors(), state, keep)
        self.ledger.spend("checkpoint_seconds", time.perf_counter() - started)

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Go on from a checkpoint: weights, optimisers, averages and counters, bit for bit."""
        self.progress = Progress.from_json(saved.state["progress"])
        names = list(saved.sizes())
        for turn in self.turns:
            turn.optimizers.prepare(_below(names, f"optimizer/{turn.name}/"))
            if decays := saved.state["ema"].get(turn.name):
                self.emas[turn.name] = EMA(turn.objective.trained, decays)
        saved.load(self._tensors(), self.world)

    def _tensors(self) -> dict[str, Tensor]:
        """Every tensor of the run's state, alive, under its name in a checkpoint."""
        tensors: dict[str, Tensor] = {}
        for turn in self.turns:
            tensors |= _prefixed(f"model/{turn.name}/", turn.objective.trained.state_dict())
            tensors |= _prefixed(f"optimizer/{turn.name}/", turn.optimizers.state())
            if turn.name in self.emas:
                tensors |= _prefixed(f"ema/{turn.name}/", self.emas[turn.name].state())
        return tensors


def _clip(parameters: Sequence[Tensor], limit: float | None) -> Tensor:
    """The norm of all gradients together, which are scaled down to `limit` where they exceed it."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if limit is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return whole(norm)


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _below(names: Sequence[str], prefix: str) -> list[str]:
    return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]


@contextmanager
def _stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Ctrl-C or SIGTERM asks the loop to stop after the step; a second Ctrl-C interrupts at once."""
    asked: list[int] = []

    def ask(number: int, frame: object) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)

    try:
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals are somebody else's
        yield lambda: False
        return
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
