"""Where training figures go: metrics.jsonl and the console always, TensorBoard and wandb on request.

metrics.jsonl is the truth: each record is in the file before the next step begins, so that a killed process
loses none. The others show the same figures, x axis in images.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from shoestring.errors import RecipeError
from shoestring.storage import atomic_path, parse_json, write_text, writing_to

Record = Mapping[str, Any]

COLUMNS = 100
SLOW_DATA = 0.1  # of the time: from here on the console says that steps wait for data


class Tracker(Protocol):
    """Takes records such as {"kind": "train", "images": 960, "loss": 0.3, ...}."""

    def log(self, record: Record) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """Appends records to a file, one JSON object a line; a resumed run writes none of them twice."""

    def __init__(self, path: Path, images: int = 0) -> None:
        self.path = path
        self.events: set[str] = set()
        if path.is_file():
            with atomic_path(path) as aside, open(aside, "w", encoding="utf-8") as file:
                file.writelines(self._kept(images))

    def _kept(self, images: int) -> Iterator[str]:
        """The lines of the former file up to a checkpoint."""
        with open(self.path, encoding="utf-8", errors="replace") as former:
            for line in former:
                record = _parsed(line)
                if record is None or record["images"] > images:
                    continue
                line = line.rstrip("\n") + "\n"  # the last may have been cut just before its end
                if record.get("kind") == "event":
                    self.events.add(line)
                yield line

    def records(self) -> Iterator[Record]:
        """The records in the file: of a resumed run, those up to its checkpoint."""
        return read_records(self.path)

    def log(self, record: Record) -> None:
        line = json.dumps(record, ensure_ascii=False) + "\n"
        if line in self.events:  # the beginning of a phase, met again
            return
        with writing_to(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(line)

    def close(self) -> None:
        """Nothing is held open."""


class TensorBoard:
    """Scalars and previews as TensorBoard events below `folder`, which lies in the run's folder.

    A resumed run tells TensorBoard to forget what came after its checkpoint, `images`.
    """

    def __init__(self, folder: Path, images: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise RecipeError(
                "train.trackers: tensorboard is not installed. Run pip install 'shoestring[tensorboard]'."
            ) from None
        self.run = folder.parent
        with writing_to(folder):
            self.writer = SummaryWriter(str(folder), purge_step=images + 1)

    def log(self, record: Record) -> None:
        with writing_to(self.run):
            if picture := _picture(self.run, record):
                self.writer.add_image("preview", _pixels(picture), record["images"], dataformats="HWC")
            for name, value in _scalars(record).items():
                self.writer.add_scalar(f"{record['kind']}/{name}", value, record["images"])
            self.writer.flush()  # left to itself it keeps two minutes, which a killed process would lose

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """Scalars and previews to Weights & Biases; WANDB_MODE=offline keeps them below `folder`.

    A killed process loses what wandb had not written yet. So a resumed run first tells again the records it
    `kept`, from where the server stands; offline, where there is no server to ask, all of them, so that the
    newest of the folders that wandb makes holds the whole run. Nothing is told twice: wandb's step is the
    count of images, and the figures of one count make one row.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        settings: Mapping[str, Any] | None = None,
        kept: Iterable[Record] = (),
    ) -> None:
        try:
            import wandb
        except ImportError:
            raise RecipeError(
                "train.trackers: wandb is not installed. Run pip install 'shoestring[wandb]'."
            ) from None
        self.folder = folder
        with writing_to(folder):
            folder.mkdir(parents=True, exist_ok=True)
        try:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "shoestring"),
                name=name,
                id=self._identity(),
                dir=str(folder),
                config=dict(settings or {}),
                resume="allow",
            )
        except (wandb.errors.Error, ValueError) as error:
            reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            raise RecipeError(
                f"train.trackers: wandb does not start: {reason}. Run wandb login, or set WANDB_MODE=offline "
                f"to keep the figures in {folder}."
            ) from error
        self.run.define_metric("images")
        self.run.define_metric("*", step_metric="images")
        self.start: int = self.run.starting_step
        for record in kept:
            self.log(record)

    def log(self, record: Record) -> None:
        import wandb

        images = record["images"]
        row: dict[str, Any] = {f"{record['kind']}/{name}": value for name, value in _scalars(record).items()}
        if picture := _picture(self.folder.parent, record):
            row["preview"] = wandb.Image(str(picture), caption=f"{images:,} images")
        if row and images >= self.start:
            self.run.log({**row, "images": images}, step=images)

    def close(self) -> None:
        self.run.finish()

    def _identity(self) -> str:
        """wandb's name of this run: drawn once and kept, so that a resumed run goes on in the same place."""
        path = self.folder / "id.txt"
        if not path.is_file():
            write_text(path, uuid4().hex[:8])
        return path.read_text(encoding="utf-8").strip()


class Console:
    """One line that is rewritten on a terminal; elsewhere a new line every `seconds`.

    It is no longer than the terminal is wide, nor than 100 columns: what matters less is left out first.
    """

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
        line = f"{record['images']:>10,} images {share:4.0%}  {record['phase']}  loss {record['loss']:.4f}"
        wait, memory = record.get("data_wait") or 0, record.get("memory_bytes") or 0
        further = [
            f"{rate:,.0f} images/s",
            f"{clock(left)} left",
            f"data wait {wait:.0%}" if wait >= SLOW_DATA else "",
            flops_text(record["flops"]),
            f"{memory / 2**30:.1f} GiB" if memory else "",
        ]
        columns = shutil.get_terminal_size((COLUMNS + 1, 24)).columns - 1 if self.live else COLUMNS
        for part in filter(None, further):
            if len(line) + 2 + len(part) > min(columns, COLUMNS):
                break
            line += f"  {part}"
        return line

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


def read_records(path: Path) -> Iterator[Record]:
    """The lines of a metrics.jsonl that are records; lines cut short are passed over."""
    if path.is_file():
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                if (record := _parsed(line)) is not None:
                    yield record


def clock(seconds: float) -> str:
    """Seconds as 0:09, 12:34 or 1:02:03."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def threads_text(threads: int | None) -> str:
    """1 thread, 2 threads; empty where nobody counted."""
    return f"{threads} thread{'s' if threads != 1 else ''}" if threads else ""


def flops_text(flops: float) -> str:
    """Floating-point operations with a prefix: 3.2 PFLOP."""
    unit, name = flops_unit(flops)
    return f"{flops / unit:.3g} {name}"


def flops_unit(flops: float) -> tuple[float, str]:
    """(operations a unit, its name) in which so many operations are a short number: (1e15, "PFLOP")."""
    for exponent, prefix in ((21, "Z"), (18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M")):
        if flops >= 10**exponent:
            return 10.0**exponent, f"{prefix}FLOP"
    return 1.0, "FLOP"


def _parsed(line: str) -> Record | None:
    """A line's record with its count of images; None for a line that a crash cut short."""
    try:
        record = parse_json(line)
    except ValueError:
        return None
    good = isinstance(record, dict) and isinstance(record.get("images"), int)
    return record if good else None


def _scalars(record: Record, prefix: str = "") -> dict[str, float]:
    """Every number of a record but its images, nested ones as by_noise/-2 or experts/patch_mixer.1/unused."""
    scalars: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            scalars |= _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and (prefix or name != "images"):
            scalars[prefix + name] = float(value)
    return scalars


def _picture(run: Path, record: Record) -> Path | None:
    """The picture that a record of a preview names, such as previews/000000960.png; None where it is gone."""
    path = run / str(record.get("file", ""))
    return path if record["kind"] == "preview" and path.is_file() else None


def _pixels(path: Path) -> Any:
    """A picture as uint8 (H, W, 3)."""
    import numpy as np
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))
