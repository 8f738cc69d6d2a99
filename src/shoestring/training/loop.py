"""The training loop: everything Shoestring trains is trained here.

    phases, in order
      batches of the phase, from where the run stands
        for each turn: rate -> forward, backward (in microbatches) -> clip -> step
        averages -> count -> log -> preview -> checkpoint -> stop if asked

Model, objective, data and what to do at a checkpoint are arguments. Nothing is drawn from a global random
generator, so a run that stops and resumes goes on exactly as if it had not.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from shoestring.errors import TrainingDiverged
from shoestring.interfaces import Batch, Objective
from shoestring.runtime import PeakMemory, autocast
from shoestring.storage import RunFolder
from shoestring.training import checkpoint
from shoestring.training.ema import EMA
from shoestring.training.optimizers import Optimizers
from shoestring.training.tracking import Trackers

_REFERENCE_WINDOWS = 5
_REFERENCE_MOMENTUM = 0.9


@dataclass
class Turn:
    """An objective with its optimisers; taken every `every` steps from `start` images on."""

    name: str
    objective: Objective
    optimizers: Optimizers
    start: int = 0
    every: int = 1


class Cost(Protocol):
    """The ledger's entry of a phase."""

    images: int
    steps: int
    flops: float
    seconds: float
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

    enter      sets resolution, mask and noise levels in the objectives
    batches    the phase's batches from an image on
    lr         the learning rate after so many images
    """

    name: str
    images: int
    enter: Callable[[], None]
    batches: Callable[[int], Generator[Batch, None, None]]
    lr: Callable[[int], float]
    cost: Callable[[], Cost]
    flops_per_image: float = 0.0
    grad_clip: float | None = None
    ema_decays: tuple[float, ...] = ()
    ema_start: int = 0


@dataclass(frozen=True)
class LoopSettings:
    """How the loop runs; counts are of images."""

    device: torch.device
    dtype: torch.dtype = torch.float32
    microbatch: int | None = None
    spike: float | None = 10.0
    log_every: int = 1_000
    checkpoint_every: int = 1_000_000
    keep: int = 2
    preview_every: int | None = None


@dataclass
class Window:
    """Sums since the last log line."""

    loss: float = 0.0
    grad_norm: float = 0.0
    images: int = 0
    steps: int = 0
    seconds: float = 0.0


@dataclass
class Progress:
    """Where a run stands; saved in every checkpoint."""

    phase: int = 0
    phase_images: int = 0
    images: int = 0
    step: int = 0
    reference_loss: float | None = None
    windows: int = 0
    window: Window = field(default_factory=Window)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Progress:
        """What `asdict` gave."""
        return cls(**{**value, "window": Window(**value["window"])})


@dataclass
class Training:
    """A run in memory: what is trained, where it stands, and whom to tell."""

    turns: Sequence[Turn]
    phases: Sequence[PhasePlan]
    run: RunFolder
    trackers: Trackers
    settings: LoopSettings
    ledger: Costs
    on_checkpoint: Callable[[int], None] = lambda images: None
    on_preview: Callable[[int], None] = lambda images: None
    progress: Progress = field(default_factory=Progress)
    emas: dict[str, EMA] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """Whether every phase is done."""
        return self.progress.phase >= len(self.phases)

    def train(self) -> bool:
        """Run to the end; True when finished, False when stopped on request (a checkpoint was saved)."""
        with _stop_on_signal() as stop_asked, closing(self.trackers):
            if self.progress.images and not self.finished:
                self._event("resumed from a checkpoint")
            while not self.finished:
                phase = self.phases[self.progress.phase]
                self._enter(phase)
                if not self._run_phase(phase, stop_asked):
                    return False
                self.progress.phase += 1
                self.progress.phase_images = 0
                self.save()
        return True

    def averaged(self, number: int = 0) -> AbstractContextManager[None]:
        """The first turn's parts hold their averaged weights inside, where there are any."""
        ema = self.emas.get(self.turns[0].name)
        return nullcontext() if ema is None else ema.applied(number)

    # --- one phase -------------------------------------------------------------------------------------

    def _enter(self, phase: PhasePlan) -> None:
        phase.enter()
        for turn in self.turns:
            ema = self.emas.get(turn.name)
            goes_on = ema is not None and ema.decays == phase.ema_decays
            fresh = self.progress.phase_images == 0
            if ema is not None and (not goes_on or (fresh and phase.ema_start)):
                del self.emas[turn.name]
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
                loss, grad_norm = self.step(phase, batch)
                self._average(phase)
                self._count(phase, batch, loss, grad_norm, started, waited)
                cost = phase.cost()
                cost.peak_memory_bytes = max(cost.peak_memory_bytes, memory.bytes())
                self._log_if_due(phase)
                self._preview_if_due(len(batch))
                if stop_asked():
                    self.save()
                    return False
                if progress.phase_images < phase.images and self._due("checkpoint_every", len(batch)):
                    self.save()
        return True

    def step(self, phase: PhasePlan, batch: Batch) -> tuple[float, float]:
        """One optimiser step of every turn whose time it is; the first turn's loss and gradient norm."""
        losses, norms = [], []
        for turn in self.turns:
            if self.progress.images < turn.start or self.progress.step % turn.every:
                continue
            turn.optimizers.set_lr(phase.lr(self.progress.phase_images))
            turn.optimizers.zero_grad()
            losses.append(self._backward(turn.objective, batch))
            limit = math.inf if phase.grad_clip is None else phase.grad_clip
            norms.append(torch.nn.utils.clip_grad_norm_(turn.optimizers.parameters(), limit))
            turn.optimizers.step()
            turn.objective.after_step()
        return float(losses[0]), float(norms[0])

    def _backward(self, objective: Objective, batch: Batch) -> Tensor:
        """Gradients of the mean loss over the batch, in microbatches; the mean loss."""
        settings = self.settings
        total = torch.zeros((), device=settings.device)
        for part in batch.split(settings.microbatch or len(batch)):
            with autocast(settings.device, settings.dtype):
                loss = objective(part).per_sample.float().sum() / len(batch)
            loss.backward()
            total += loss.detach()
        return total

    def _average(self, phase: PhasePlan) -> None:
        for turn in self.turns:
            if turn.name in self.emas:
                self.emas[turn.name].update()
            elif phase.ema_decays and self.progress.phase_images >= phase.ema_start:
                self.emas[turn.name] = EMA(turn.objective.trained, phase.ema_decays)

    def _count(
        self, phase: PhasePlan, batch: Batch, loss: float, grad_norm: float, started: float, waited: float
    ) -> None:
        seconds = time.perf_counter() - started
        progress, window, cost = self.progress, self.progress.window, phase.cost()
        progress.images += len(batch)
        progress.phase_images += len(batch)
        progress.step += 1
        window.loss += loss * len(batch)
        window.grad_norm += grad_norm
        window.images += len(batch)
        window.steps += 1
        window.seconds += seconds
        cost.images += len(batch)
        cost.steps += 1
        cost.flops += phase.flops_per_image * len(batch)
        cost.seconds += seconds
        cost.data_wait_seconds += waited

    # --- what is told and kept -----------------------------------------------------------------------------

    def _due(self, setting: str, last_batch: int) -> bool:
        """Whether the last batch carried the run over a multiple of the setting."""
        every: int | None = getattr(self.settings, setting)
        images = self.progress.images
        return every is not None and images // every > (images - last_batch) // every

    def _log_if_due(self, phase: PhasePlan) -> None:
        progress, window = self.progress, self.progress.window
        mean = window.loss / window.images
        for what, value in (("loss", mean), ("gradient norm", window.grad_norm)):
            if not math.isfinite(value):
                raise TrainingDiverged(self._diverged(f"the {what} is {value}"))
        if window.images < self.settings.log_every and progress.phase_images < phase.images:
            return
        self._check_spike(mean)
        self.trackers.log(
            {
                "kind": "train",
                "images": progress.images,
                "step": progress.step,
                "phase": phase.name,
                "loss": mean,
                "lr": phase.lr(progress.phase_images),
                "grad_norm": window.grad_norm / window.steps,
                "images_per_second": window.images / window.seconds,
                "seconds": self.ledger.seconds,
                "flops": self.ledger.flops,
            }
        )
        progress.window = Window()

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
        kept = checkpoint.newest(self.run.checkpoints, self._event)
        advice = (
            f"The last good checkpoint is kept: {kept.path}. Start from it at a lower rate with "
            f"`--set init={self.run.root} --set phases.{self.progress.phase}.lr=...`."
            if kept
            else "No checkpoint had been written yet. Lower the phase's lr, or set train.grad_clip."
        )
        return f"Training stopped after {self.progress.images:,} images: {what}. {advice}"

    def _preview_if_due(self, last_batch: int) -> None:
        if self._due("preview_every", last_batch):
            started = time.perf_counter()
            with self.averaged():
                self.on_preview(self.progress.images)
            self.ledger.spend("preview_seconds", time.perf_counter() - started)

    def _event(self, text: str) -> None:
        self.trackers.log({"kind": "event", "images": self.progress.images, "text": text})

    # --- checkpoints -------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write what the caller keeps at each checkpoint (the pipeline), then the checkpoint itself.

        In this order a run that a checkpoint calls finished has its pipeline, wherever it was killed.
        """
        started = time.perf_counter()
        with self.averaged():
            self.on_checkpoint(self.progress.images)
        tensors: dict[str, Tensor] = {}
        for turn in self.turns:
            tensors |= _prefixed(f"model/{turn.name}/", turn.objective.trained.state_dict())
            tensors |= _prefixed(f"optimizer/{turn.name}/", turn.optimizers.state())
            if turn.name in self.emas:
                tensors |= _prefixed(f"ema/{turn.name}/", self.emas[turn.name].state())
        state = {
            "progress": asdict(self.progress),
            "ema": {name: ema.decays for name, ema in self.emas.items()},
            "ledger": self.ledger.to_json(),
        }
        checkpoint.save(self.run.checkpoints, self.progress.images, tensors, state)
        checkpoint.keep_last(self.run.checkpoints, self.settings.keep)
        self.ledger.spend("checkpoint_seconds", time.perf_counter() - started)

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Go on from a checkpoint: weights, optimisers, averages and counters, bit for bit."""
        tensors = saved.tensors()
        self.progress = Progress.from_json(saved.state["progress"])
        for turn in self.turns:
            turn.objective.trained.load_state_dict(checkpoint.take(tensors, f"model/{turn.name}/"))
            turn.optimizers.load_state(checkpoint.take(tensors, f"optimizer/{turn.name}/"))
            if decays := saved.state["ema"].get(turn.name):
                self.emas[turn.name] = EMA(turn.objective.trained, decays)
                self.emas[turn.name].load_state(checkpoint.take(tensors, f"ema/{turn.name}/"))


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


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
