"""The ledger: what a run really took, phase by phase, kept through stops and resumes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from shoestring.storage import write_json


@dataclass
class PhaseCost:
    """Cost of one phase. `seconds` is time in steps; saving, previews, evaluation are in `Ledger.extra`."""

    name: str
    size: int
    mask: float
    mask_end: float | None = None  # where it is another than `mask`, with which the phase began
    images: int = 0
    steps: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    process_seconds: float = 0.0  # `seconds` of each process added up: GPU-hours, times 3,600
    data_wait_seconds: float = 0.0
    peak_memory_bytes: int = 0


@dataclass
class Ledger:
    """A run's cost: facts of the machine and the model, one entry a phase, seconds spent outside of steps."""

    hardware: str
    device: str
    threads: int
    dtype: str
    parameters: int
    processes: int = 1
    phases: list[PhaseCost] = field(default_factory=list)
    extra: dict[str, float] = field(default_factory=dict)

    def phase(self, name: str, size: int, mask: float, mask_end: float | None = None) -> PhaseCost:
        """The entry of a phase, made where it is not there yet."""
        for entry in self.phases:
            if entry.name == name:
                return entry
        self.phases.append(PhaseCost(name, size, mask, None if mask_end == mask else mask_end))
        return self.phases[-1]

    def spend(self, what: str, seconds: float) -> None:
        """Add seconds spent outside of training steps, such as `checkpoint_seconds`."""
        self.extra[what] = self.extra.get(what, 0.0) + seconds

    @property
    def flops(self) -> float:
        """Operations of all phases so far."""
        return sum(entry.flops for entry in self.phases)

    @property
    def seconds(self) -> float:
        """Seconds in steps of all phases so far."""
        return sum(entry.seconds for entry in self.phases)

    def to_json(self) -> dict[str, Any]:
        """Everything, with the totals."""
        total = {
            name: sum(getattr(entry, name) for entry in self.phases)
            for name in ("images", "steps", "flops", "seconds", "process_seconds", "data_wait_seconds")
        }
        peak = max((entry.peak_memory_bytes for entry in self.phases), default=0)
        return {**asdict(self), "total": {**total, "peak_memory_bytes": peak}}

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from what `to_json` gave: costs are taken over, facts of the machine stay those of now."""
        names = {f.name for f in fields(PhaseCost)}
        self.phases = [
            PhaseCost(**{name: value for name, value in entry.items() if name in names})
            for entry in saved["phases"]
        ]
        self.extra = dict(saved["extra"])

    def write(self, path: Path) -> None:
        """Replace the ledger file."""
        write_json(path, self.to_json())
