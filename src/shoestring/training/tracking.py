"""Where training figures go: metrics.jsonl and the console always, TensorBoard and wandb on request."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from shoestring.errors import RecipeError
from shoestring.storage import fingerprint, write_text, writing_to

Record = Mapping[str, Any]


class Tracker(Protocol):
    """Takes records such as {"kind": "train", "images": 960, "loss": 0.3, ...}."""

    def log(self, record: Record) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """Appends records to a file, one JSON object a line; a resumed run writes none of them twice."""

    def __init__(self, path: Path, images: int = 0) -> None:
        self.path = path
        self.kept: list[str] = []
        if path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines()
            self.kept = [line for line in lines if _images_of(line) <= images]
            write_text(path, "".join(f"{line}\n" for line in self.kept))

    def log(self, record: Record) -> None:
        line = json.dumps(record, ensure_ascii=False)
        if line in self.kept:  # the beginning of a phase, met again
            return
        with writing_to(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(line + "\n")

    def close(self) -> None:
        """Nothing is held open."""


class TensorBoard:
    """Scalars as TensorBoard events, x axis in images."""

    def __init__(self, folder: Path, images: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise RecipeError(
                "train.trackers: tensorboard is not installed. Run pip install 'shoestring[tensorboard]'."
            ) from None
        with writing_to(folder):
            self.writer = SummaryWriter(str(folder), purge_step=images + 1)

    def log(self, record: Record) -> None:
        for name, value in _scalars(record).items():
            self.writer.add_scalar(f"{record['kind']}/{name}", value, record["images"])

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """Scalars to Weights & Biases; set WANDB_MODE=offline to keep them here."""

    def __init__(self, folder: Path, name: str) -> None:
        try:
            import wandb
        except ImportError:
            raise RecipeError(
                "train.trackers: wandb is not installed. Run pip install 'shoestring[wandb]'."
            ) from None
        folder.mkdir(parents=True, exist_ok=True)
        identity = fingerprint([name, str(folder.resolve())])  # a resumed run goes on in the same place
        self.run = wandb.init(project="shoestring", name=name, id=identity, dir=str(folder), resume="allow")

    def log(self, record: Record) -> None:
        scalars = {f"{record['kind']}/{name}": value for name, value in _scalars(record).items()}
        self.run.log({**scalars, "images": record["images"]})

    def close(self) -> None:
        self.run.finish()


class Console:
    """One line that is rewritten on a terminal; elsewhere a new line every `seconds`."""

    def __init__(self, total: int, seconds: float = 15.0) -> None:
        self.total, self.seconds = total, seconds
        self.live = sys.stderr.isatty()
        self.last = 0.0
        self.width = 0

    def log(self, record: Record) -> None:
        if record["kind"] == "event":
            self._print(f"{record['images']:>10,} images  {record['text']}", end="\n")
        elif record["kind"] == "train":
            now = time.monotonic()
            last = record["images"] >= self.total
            if self.live or last or now - self.last >= self.seconds:
                self.last = now
                self._print(self._line(record), end="" if self.live and not last else "\n")

    def close(self) -> None:
        if self.width:  # what is said next begins a line
            self._print("", end="\n")

    def _line(self, record: Record) -> str:
        rate = record["images_per_second"]
        left = (self.total - record["images"]) / rate if rate else 0
        share = record["images"] / self.total
        return (
            f"{record['images']:>10,} images {share:4.0%}  {record['phase']}  loss {record['loss']:.4f}  "
            f"{rate:,.0f} images/s  {clock(left)} left  {flops_text(record['flops'])}"
        )

    def _print(self, text: str, end: str) -> None:
        start = "\r" if self.live else ""
        print(f"{start}{text:<{self.width}}", end=end, file=sys.stderr, flush=True)
        self.width = 0 if end else len(text)


class Trackers:
    """Several trackers as one."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self.trackers = list(trackers)

    def log(self, record: Record) -> None:
        for tracker in self.trackers:
            tracker.log(record)

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.close()


def clock(seconds: float) -> str:
    """Seconds as 0:09, 12:34 or 1:02:03."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def flops_text(flops: float) -> str:
    """Floating-point operations with a prefix: 3.2 PFLOP."""
    for exponent, prefix in ((21, "Z"), (18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M")):
        if flops >= 10**exponent:
            return f"{flops / 10**exponent:.3g} {prefix}FLOP"
    return f"{flops:.3g} FLOP"


def _images_of(line: str) -> int:
    """The images of a record; a line cut short by a crash counts as never."""
    try:
        return int(json.loads(line)["images"])
    except (ValueError, KeyError, TypeError):
        return sys.maxsize


def _scalars(record: Record) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in record.items()
        if isinstance(value, (int, float)) and name != "images"
    }
