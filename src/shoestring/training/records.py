"""What a run folder tells: recipe, records, ledger and scores, each as far as it can be read.

Any file may be missing, cut short by a crash, or still be written by a run in progress: what cannot be read
is empty.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeGuard, cast

import yaml

from shoestring.interfaces import MetricRow
from shoestring.storage import RunFolder, read_json
from shoestring.training.tracking import Record, read_records

Point = tuple[float, float]
X = Callable[[Record], Any]
"""Where a record stands on an axis; anything but a finite number leaves it out."""


@dataclass(frozen=True)
class RunFiles:
    """What could be read of a run folder.

    recipe     text of recipe.yaml, and `settings`, the same as values
    records    metrics.jsonl's lines, in order
    ledger     ledger.json
    rows       evaluation.json's rows, and `measured`, the settings they were measured by
    """

    folder: RunFolder
    recipe: str
    settings: Record
    records: tuple[Record, ...]
    ledger: Record
    rows: tuple[MetricRow, ...]
    measured: Record

    @classmethod
    def read(cls, run: RunFolder) -> RunFiles:
        """Everything in the folder that can be read."""
        recipe = run.recipe.read_text(encoding="utf-8", errors="replace") if run.recipe.is_file() else ""
        try:
            settings = yaml.safe_load(recipe)
        except (yaml.YAMLError, ValueError, RecursionError):
            settings = None
        evaluation = read_or_empty(run.evaluation, dict)
        rows = [row for row in evaluation.get("rows") or [] if isinstance(row, dict)]
        return cls(
            folder=run,
            recipe=recipe,
            settings=settings if isinstance(settings, dict) else {},
            records=tuple(read_records(run.metrics)),
            ledger=read_or_empty(run.ledger, dict),
            rows=tuple(cast(MetricRow, row) for row in rows if MetricRow.__required_keys__ <= set(row)),
            measured=evaluation.get("settings") or {},
        )

    @property
    def name(self) -> str:
        """The recipe's name, or the folder's."""
        return str(self.settings.get("name") or self.folder.root.resolve().name)

    @property
    def phases(self) -> list[Record]:
        """The ledger's entries, a phase each."""
        return [phase for phase in self.ledger.get("phases") or [] if isinstance(phase, dict)]

    def kind(self, kind: str) -> list[Record]:
        """The records of one kind, in order."""
        return of_kind(self.records, kind)

    def total(self, name: str) -> float:
        """A count of the whole run: the ledger's, or a later record's where a run is in progress; 0 without.

        The ledger is written at checkpoints, and so stands behind a run in progress.
        """
        numbers = [(self.ledger.get("total") or {}).get(name)]
        numbers += [record.get(_IN_RECORDS.get(name, name)) for record in self.kind("train")[-1:]]
        return max((number for number in numbers if is_number(number)), default=0)


_IN_RECORDS = {"steps": "step", "peak_memory_bytes": "memory_bytes"}


def read_or_empty(path: Path, kind: type) -> Any:
    """The value in a JSON file, or an empty `kind` where there is none that can be read."""
    try:
        value = read_json(path)
    except (OSError, ValueError):
        return kind()
    return value if isinstance(value, kind) else kind()


def of_kind(records: Sequence[Record], kind: str) -> list[Record]:
    """The records of one kind, in order."""
    return [record for record in records if record.get("kind") == kind]


def images_of(record: Record) -> Any:
    """The usual axis: images seen."""
    return record["images"]


def series(records: Sequence[Record], *keys: str, x: X = images_of) -> list[Point]:
    """(x, value) of the records that have a finite number under `keys`, one inside the other, and at x."""
    points = []
    for record in records:
        at, value = x(record), _under(record, keys)
        if is_number(at) and is_number(value):
            points.append((at, value))
    return points


def keys_under(records: Sequence[Record], *keys: str) -> list[str]:
    """Every key met in the mappings that records have under `keys`, in the order met."""
    found: dict[str, None] = {}
    for record in records:
        inner = _under(record, keys)
        if isinstance(inner, dict):
            found |= dict.fromkeys(inner)
    return list(found)


def phase_ends(train: Sequence[Record], x: X = images_of) -> list[float]:
    """Where on the axis the phases end but for the last."""
    ends = (x(record) for record, after in pairwise(train) if record.get("phase") != after.get("phase"))
    return [end for end in ends if is_number(end)]


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value from a file is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _under(value: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value
