"""Files of checkpoints and stores damaged one at a time, and whether that is found, named and survived."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from parts.faults_jobs import Training, make_pictures
from parts.faults_kills import Unbroken, differences
from parts.faults_processes import Server, wait_for

from shoestring.data.store import Store
from shoestring.errors import StoreError
from shoestring.training import checkpoint

STORE = ("encode", "pictures", "--out", "store", "--size", "8", "--size", "16", "--held-out", "8")


def damage(file: Path, other: Path, chance: random.Random) -> str:
    """Change a file in one of six ways; how. `other` is a file to put in its place."""
    content = bytearray(file.read_bytes())
    kind = chance.choice(("bit", "bit", "bit", "bit", "cut", "emptied", "deleted", "grown", "exchanged"))
    if kind == "exchanged" and other.read_bytes() == content:
        kind = "bit"
    if kind == "deleted" or not content:
        file.unlink()
        return "deleted"
    if kind == "bit":
        place = chance.randrange(8 * len(content))
        content[place // 8] ^= 1 << place % 8
    elif kind == "grown":
        content += chance.randbytes(chance.randint(1, 64))
    elif kind == "exchanged":
        content = bytearray(other.read_bytes())
    else:
        del content[0 if kind == "emptied" else chance.randrange(len(content)) :]
    file.write_bytes(content)
    return f"bit {place} of {8 * len(content)}" if kind == "bit" else kind


@dataclass
class Checkpoints:
    """A run that was killed with two checkpoints, of which the newer gets damaged."""

    server: Server
    job: Training
    whole: Unbroken
    folder: Path

    def prepare(self) -> None:
        """Kill a run when it has its third checkpoint."""
        self.halfway = self.folder / "halfway"
        self.halfway.mkdir(parents=True)
        checkpoints = self.halfway / "runs" / "faults" / "checkpoints"
        with self.job.starts(self.halfway) as starts:
            command = self.server.start(starts[0].words, self.halfway)
            wait_for(lambda: len([*checkpoints.glob("[0-9]*/COMMITTED")]) == 2, [command])
            command.kill()
            command.wait()
        self.before, self.newest = sorted(path.parent for path in checkpoints.glob("[0-9]*/COMMITTED"))

    def found(self, folder: Path, chance: random.Random) -> list[str]:
        """Damage the newest checkpoint of a copy: the one before must be taken, and the damage said."""
        shutil.copytree(self.newest.parent, folder)
        what = self._damage(folder, chance)
        said: list[str] = []
        taken = checkpoint.newest(folder, said.append)
        if taken is None or taken.path.name != self.before.name:
            return [f"{what}: {taken and taken.path.name} is taken for the newest, {said}"]
        return [] if len(said) == 1 and self.newest.name in said[0] else [f"{what}: says {said}"]

    def survived(self, folder: Path, chance: random.Random) -> list[str]:
        """Damage the newest checkpoint of a copy of the run, and resume it to its end."""
        shutil.copytree(self.halfway, folder)
        what = self._damage(folder / self.newest.parent.relative_to(self.halfway), chance)
        with self.job.starts(folder) as starts:
            ended = self.server.run(starts[0].words, folder)
        if ended.code:
            return [f"{what}: {ended}"]
        problems = differences(self.whole.outcome, self.job.outcome(folder))
        if f"after {int(self.before.name)} images" not in ended.err or self.newest.name not in ended.err:
            problems.append(f"says {ended.err}")
        return [f"{what}: {problem}" for problem in problems]

    def _damage(self, checkpoints: Path, chance: random.Random) -> str:
        newest, before = checkpoints / self.newest.name, checkpoints / self.before.name
        names = [path.relative_to(newest) for path in sorted(newest.rglob("*")) if path.is_file()]
        name = chance.choice(names)
        return f"{name}: {damage(newest / name, before / name, chance)}"


@dataclass
class Stores:
    """A store of a few chunks, of which any file gets damaged."""

    server: Server
    folder: Path

    def prepare(self) -> None:
        """Encode some pictures, and read them."""
        self.folder.mkdir(parents=True)
        make_pictures(self.folder / "pictures", 40)
        ended = self.server.run((*STORE, "--chunk-rows", "16"), self.folder)
        if ended.code:
            raise RuntimeError(f"the store cannot be made: {ended}")
        self.whole = self.folder / "store"
        self.content = _content(Store.open(self.whole))

    def found(self, folder: Path, chance: random.Random) -> list[str]:
        """Damage a file of a copy: `store verify` must name it, in its one line."""
        name, what = self._damage(folder, chance)
        ended = self.server.run(("store", "verify", "store"), folder)
        problems = [] if ended.code == 2 else [f"exit code {ended.code}"]
        if [line.startswith("error: ") for line in ended.err.splitlines()].count(True) != 1:
            problems.append("not one line of error")
        if not _named(name, ended.err):
            problems.append("the file is not named")
        return [f"{what}: {problem}: {ended}" for problem in problems]

    def survived(self, folder: Path, chance: random.Random) -> list[str]:
        """Damage a file of a copy and read everything: the same data, or refused with the file's name."""
        name, what = self._damage(folder, chance)
        try:
            content = _content(Store.open(folder / "store"))
        except StoreError as error:
            return [] if _named(name, str(error)) else [f"{what}: the file is not named: {error}"]
        except Exception as error:
            return [f"{what}: {error!r}"]
        return [] if content == self.content else [f"{what}: read as if nothing were wrong"]

    def _damage(self, folder: Path, chance: random.Random) -> tuple[str, str]:
        store = folder / "store"
        shutil.copytree(self.whole, store)
        files = [path for path in sorted(store.rglob("*")) if path.is_file() and _counts(path)]
        file = chance.choice(files)
        other = chance.choice([path for path in files if path.suffix == file.suffix])
        name = file.relative_to(store).as_posix()
        return name, f"{name}: {damage(file, other, chance)}"


def _named(name: str, said: str) -> bool:
    """Whether a message names a file; a store without a manifest is called unfinished."""
    return name in said or (name == "manifest.json" and "unfinished" in said)


def _counts(path: Path) -> bool:
    """Whether a file is part of the store, and not a note of how long it took or what was verified."""
    return path.parent.name != "work" and path.name != "verified.json"


def _content(store: Store) -> list[Any]:
    """Everything that training and evaluation read of a store."""
    rows = np.arange(len(store))
    found: list[Any] = [store.records(rows), store.chosen_captions(rows)]
    tensors = [*store.text(rows), *store.padded_text(rows)]
    for size in store.sizes:
        tensors += [store.latents(size, rows), store.size_crop(rows, size)]
    return found + [tensor.numpy().tobytes() for tensor in tensors]


Trial = Callable[[Path, random.Random], Sequence[str]]
"""Damages something in a folder that is not there yet; what did not hold."""
