"""What is killed: training on one process or several, and encoding by one worker or several."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from parts.faults_kills import Moments, Outcome, Start
from parts.faults_processes import Ended, Server
from PIL import Image

from shoestring.storage import sha256

RECIPE = Path(__file__).with_name("faults.yaml")

_CLOCKS = re.compile(
    r"seconds|\w+_seconds|waited|data_wait|images_per_second|memory_bytes|peak_memory_bytes|work"
)
_RESUMED = "resumed from a checkpoint"


def without_clocks(value: Any) -> Any:
    """A JSON value but for what a clock or a memory meter measured."""
    if isinstance(value, dict):
        return {key: without_clocks(each) for key, each in value.items() if not _CLOCKS.fullmatch(key)}
    return [without_clocks(each) for each in value] if isinstance(value, list) else value


def files_of(folder: Path) -> Outcome:
    """Every file below a folder: its hash, or what it says but for clocks; hidden leftovers included."""
    return {
        path.relative_to(folder).as_posix(): _content(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".claim"  # names the last process
    }


def _content(path: Path) -> Any:
    if path.name == "metrics.jsonl":
        records = map(json.loads, path.read_text().splitlines())
        return [without_clocks(record) for record in records if record.get("text") != _RESUMED]
    if path.name in ("ledger.json", "state.json"):
        return without_clocks(json.loads(path.read_text()))
    if path.parent.name == "tensors":
        return _tensors(path.read_bytes())
    if path.name == "manifest.json":
        said = without_clocks(json.loads(path.read_text()))
        if "state.json" in said["files"]:  # of a checkpoint: hashes of what is compared here besides
            return sorted(said["files"])
        return {key: value for key, value in said.items() if key != "sha256"}  # of a store, and of itself
    if path.name in ("COMMITTED", "report.html", "verified.json") or path.parent.name == "work":
        return "there"  # made of clocks' figures, or hashes of such
    return sha256(path)


def _tensors(content: bytes) -> Any:
    """What a safetensors file holds: a header, whose entries come in no fixed order, and all bytes after."""
    start = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:start]), hashlib.sha256(content[start:]).hexdigest()


@dataclass(frozen=True)
class Training:
    """`shoestring train` of a small recipe; several processes as `torchrun` starts them."""

    name: str
    sets: tuple[str, ...] = ()
    processes: int = 1
    device: str = "cpu"

    @property
    def tied(self) -> bool:
        """Processes of one training need each other."""
        return self.processes > 1

    def prepare(self, folder: Path) -> None:
        """Nothing: the recipe's scenes are made in the folder."""

    @contextmanager
    def starts(self, folder: Path) -> Iterator[list[Start]]:
        """The same command each time, with --resume once there is something to resume."""
        resume = ("--resume",) if (_run(folder) / "recipe.yaml").is_file() else ()
        sets = [word for each in self.sets for word in ("--set", each)]
        words = ("train", RECIPE, *sets, "--device", self.device, *resume)
        if self.processes == 1:
            yield [Start(words)]
            return
        from torch.distributed import TCPStore

        # As torchrun does, whose agent keeps the store that the processes meet at and outlives them.
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        shared = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "WORLD_SIZE": str(self.processes),
        }
        yield [
            Start(words, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(self.processes)
        ]

    def at_work(self, said: str) -> bool:
        """The console tells of the run's images when all processes are there."""
        return re.search(r"^ *[\d,]+ images ", said, re.MULTILINE) is not None

    def moments(self, folder: Path) -> Moments:
        """While something is written aside; when a checkpoint, a preview or the next phase has come."""
        run = _run(folder)
        checkpoints, previews = set(_names(run / "checkpoints")), set(_names(run / "previews"))
        places = [run / name for name in ("", "checkpoints", "pipeline", "previews")]
        return {
            "writing a checkpoint": lambda: _is_writing([run / "checkpoints"]),
            "writing": lambda: _is_writing(places),
            "a new checkpoint": lambda: not checkpoints.issuperset(_names(run / "checkpoints")),
            "a new preview": lambda: not previews.issuperset(_names(run / "previews")),
            "between phases": lambda: "phase dense" in _text(run / "metrics.jsonl"),
        }

    def finished(self, folder: Path) -> int:
        """Images of the newest checkpoint that was committed, 0 without one."""
        found = (_run(folder) / "checkpoints").glob("*/COMMITTED")
        return max((int(number) for path in found if (number := _digits(path.parent.name))), default=0)

    def lost(self, finished: int, folder: Path, said: Sequence[Ended]) -> list[str]:
        """The main process must say that it goes on after exactly that checkpoint."""
        told = said[0].err + said[0].out
        after = re.search(r"(?:Resuming \S+ after|is finished:) ([\d,]+) images", told)
        if after:
            images = int(after[1].replace(",", ""))
        elif "no valid checkpoint yet" in told or said[0].code == 0:
            images = 0
        else:  # killed before it said
            return []
        return [] if images == finished else [f"went on after {images} images instead of {finished}: {told}"]

    def outcome(self, folder: Path) -> Outcome:
        """The run and its store."""
        return files_of(folder)


@dataclass(frozen=True)
class Encoding:
    """A command that writes a store in chunks, by one worker or several.

    base  a folder with what it reads, copied at the start
    out   the store's name
    """

    name: str
    words: tuple[str, ...]
    workers: int = 1
    base: Path | None = None
    out: str = "store"
    tied: bool = False

    def prepare(self, folder: Path) -> None:
        """Copy what it reads."""
        if self.base is not None:
            shutil.copytree(self.base, folder, dirs_exist_ok=True)

    @contextmanager
    def starts(self, folder: Path) -> Iterator[list[Start]]:
        """The same command each time, one a worker."""
        if self.workers == 1:
            yield [Start(self.words)]
        else:
            numbers = range(self.workers)
            yield [Start((*self.words, "--worker", f"{number}/{self.workers}")) for number in numbers]

    def at_work(self, said: str) -> bool:
        """Workers know nothing of each other."""
        return True

    def moments(self, folder: Path) -> Moments:
        """While something is written aside; when a chunk is finished."""
        store = folder / self.out
        chunks = {*_chunks(store)}
        return {
            "writing a chunk": lambda: _is_writing([*(store / "columns").glob("*")]),
            "writing": lambda: _is_writing([store, store / "chunks", *(store / "chunks").glob("[!.0-9]*")]),
            "a new chunk": lambda: not chunks.issuperset(_chunks(store)),
        }

    def finished(self, folder: Path) -> dict[str, tuple[int, int]]:
        """Each file of a chunk that has its marker, with its inode and the time of its last change."""
        store, found = folder / self.out, {}
        for marker in _chunks(store):
            for path in (
                marker,
                *(store / entry["path"] for entry in json.loads(marker.read_text())["files"]),
            ):
                if path.exists():  # a copy gets its files in any order
                    found[path.relative_to(store).as_posix()] = (path.stat().st_ino, path.stat().st_mtime_ns)
        return found

    def lost(self, finished: dict[str, tuple[int, int]], folder: Path, said: Sequence[Ended]) -> list[str]:
        """No file of a finished chunk may be written again."""
        now = self.finished(folder)
        return [f"{name} was written again" for name, state in finished.items() if now.get(name) != state]

    def outcome(self, folder: Path) -> Outcome:
        """The store."""
        return files_of(folder / self.out)


def make_jobs(server: Server, folder: Path) -> tuple[list[Training], list[Training], list[Encoding]]:
    """What the benchmark kills: trainings on one process, on two, and whatever writes stores."""
    folder.mkdir(parents=True)
    make_pictures(folder / "pictures", 40)
    shutil.copytree(folder, folder.with_name("encoded"))
    ready = folder.with_name("encoded")
    ended = server.run(("encode", "pictures", "--out", "store", "--size", "16", "--chunk-rows", "8"), ready)
    if ended.code:
        raise RuntimeError(f"a store cannot be made: {ended}")
    scenes = ("--images", "48", "--held-out", "8", "--size", "16", "--size", "32", "--chunk-rows", "8")
    pictures = ("--size", "16", "--held-out", "8", "--text-dtype", "int8", "--flip", "--chunk-rows", "8")
    at_once, aside = ("train.async_checkpoints=false",), ("train.async_checkpoints=true",)
    adamw, sharded = ("optimizer.kind=adamw",), ("parallel.kind=fsdp2",)
    return (
        [
            Training("train", at_once),
            Training("train, adamw, saving in the background", (*adamw, *aside)),
        ],
        [
            Training("train on 2 processes, ddp, saving in the background", aside, 2),
            Training("train on 2 processes, fsdp2", (*sharded, *at_once), 2),
            Training(
                "train on 2 processes, fsdp2, adamw, saving in the background", (*sharded, *adamw, *aside), 2
            ),
        ],
        [
            Encoding("encode scenes", ("encode", "scenes", "--out", "store", *scenes)),
            Encoding(
                "encode pictures, 2 workers", ("encode", "pictures", "--out", "store", *pictures), 2, folder
            ),
            Encoding("store add", ("store", "add", "store", "--size", "8"), base=ready),
            Encoding("store copy", ("store", "copy", "store", "copy"), base=ready, out="copy"),
        ],
    )


def make_pictures(folder: Path, count: int) -> None:
    """Pictures of 24 x 24 of grey noise with a caption each."""
    folder.mkdir()
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (24, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")
        (folder / f"{number:03d}.txt").write_text(f"picture {number} of some grey noise\n")


def _run(folder: Path) -> Path:
    return folder / "runs" / "faults"


def _names(folder: Path) -> list[str]:
    """Names in a folder, if it is there, but for what is written aside."""
    return [path.name for path in folder.glob("[!.]*")]


def _chunks(store: Path) -> list[Path]:
    """Markers of finished chunks, of additions too."""
    return sorted((store / "chunks").rglob("[0-9]*.json"))


def _digits(name: str) -> str:
    """The checkpoint's number in its name, or in its name while it steps aside for another."""
    number = re.fullmatch(r"(\d{12})|\.(\d{12})\.\S+\.old", name)
    return (number[1] or number[2]) if number else ""


def _is_writing(folders: Sequence[Path]) -> bool:
    return any(path.name.endswith(".partial") for folder in folders for path in folder.glob(".*"))


def _text(path: Path) -> str:
    return path.read_text() if path.is_file() else ""
