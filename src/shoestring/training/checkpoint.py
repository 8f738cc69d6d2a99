"""Checkpoints: tensors as safetensors, scalars as JSON, hashed, whole or absent; the newest valid one counts.

checkpoints/000000050000/           named by images seen
  tensors/*.safetensors             each process's pieces of the tensors (pieces.py); nothing is pickled
  state.json                        counters, ledger, what the resumed run needs besides tensors
  manifest.json                     {"format": 1, "files": {name: sha256}} of every file above
  COMMITTED                         sha256 of manifest.json; written last

All of it is written under another name beside it, flushed to the disk and renamed, so that each byte is
vouched for: the files by the manifest, the manifest by the marker.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from shoestring.errors import CheckpointError, OutputError, ShoestringError
from shoestring.interfaces import Log
from shoestring.processes import ALONE, World
from shoestring.storage import (
    aside_of,
    flush,
    put_in_place,
    read_json,
    remove,
    remove_leftovers,
    sha256,
    writing_to,
)
from shoestring.training import pieces
from shoestring.training.pieces import Piece, Staging

FORMAT = 1
_TENSORS, _STATE, _MANIFEST, _MARKER = "tensors", "state.json", "manifest.json", "COMMITTED"
_DIGITS = 12

T = TypeVar("T")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint folder and its scalars."""

    path: Path
    state: dict[str, Any]

    def sizes(self) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Shape and type of every tensor, by the name it was saved under."""
        return pieces.sizes(self.path / _TENSORS)

    def load(self, tensors: Mapping[str, Tensor], world: World = ALONE) -> None:
        """Fill `tensors` in place, by name; plain ones on any device, or shards of any mesh (DTensor).

        The checkpoint may be of any number of processes; each reads what it needs and holds one piece of one
        tensor at a time besides. Raises `CheckpointError` for the first name that is missing or of another
        shape or type. What the checkpoint holds besides is left alone.
        """
        together(world, partial(self._load, tensors))

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor, whole, on the CPU."""
        found = {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in self.sizes().items()}
        self._load(found)
        return found

    def _load(self, tensors: Mapping[str, Tensor]) -> None:
        saved = self.sizes()
        for name, tensor in tensors.items():
            if name not in saved:
                raise CheckpointError(
                    f"{self.path}: it holds no {name!r}, so it is of another recipe. Resume with the recipe "
                    "it was written by, or start a new run."
                )
            size, dtype = saved[name]
            if (size, dtype) != (tensor.shape, tensor.dtype):
                raise CheckpointError(
                    f"{self.path}: {name!r} is {dtype} {tuple(size)} there and {tensor.dtype} "
                    f"{tuple(tensor.shape)} in this run. Resume with the recipe it was written by."
                )
        pieces.read(self.path / _TENSORS, tensors)


def newest(folder: Path, log: Log, world: World = ALONE) -> Checkpoint | None:
    """The newest checkpoint that is complete and unchanged; says which ones it passes over, and why.

    The processes divide the files to be hashed between them and agree on the outcome; the main one speaks.
    Raises `CheckpointError` for one of a newer format: going on from an earlier one would give it up.
    """
    for name in together(world, partial(_names, folder))[0]:
        path = folder / name
        problem = next(filter(None, together(world, partial(_problem, path, world))), None)
        if problem is None:
            return Checkpoint(path, together(world, partial(_state, path, world))[0])
        if world.is_main:
            log(f"Checkpoint {path}: {problem}. Trying the one before it.")
    return None


def drop_newer(folder: Path, images: int) -> None:
    """Remove checkpoints beyond `images`, which a resume passed over; for the main process to call.

    Else a later one of theirs would be kept, or even resumed from, in place of what is written from now on.
    """
    for name in _names(folder):
        if int(name) > images:
            _drop(folder / name)


def superfluous(images: Iterable[int], keep: int, every: int | None = None) -> list[int]:
    """Of checkpoints after so many images, those to remove.

    What stays: the newest `keep`, and for good the first of every stretch of `every` images, from `every` on
    (the first at or beyond each multiple). The answer follows from the arguments alone, and removing what it
    names does not change what else stays; so stopping and resuming does not, either.
    """
    ordered = sorted(images)
    stay = set(ordered[-keep:])
    if every is not None:
        first = {number // every: number for number in reversed(ordered)}
        stay |= {number for stretch, number in first.items() if stretch > 0}
    return [number for number in ordered if number not in stay]


class Saver:
    """Writes a run's checkpoints, at once or in the background, with all its processes.

    keep        the newest so many stay
    keep_every  and the first at or beyond each multiple of so many images, for good
    background  `save` copies the tensors and returns; a thread writes them while training goes on. The copies
                take as much memory as what the process writes, once, for as long as the saver lives

    To be made, and told to save, by every process of `world` at the same images, on a file system that all of
    them share; the run's `claim` is held, since what others left half-written in `folder` is removed.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        keep_every: int | None = None,
        background: bool = False,
        world: World = ALONE,
    ) -> None:
        self._folder, self._keep, self._keep_every = folder, keep, keep_every
        self._world = world.apart() if background else world  # training talks while the thread does
        self._thread = ThreadPoolExecutor(1, "shoestring-checkpoint") if background else None
        self._staging = Staging()
        self._writing: Future[None] | None = None
        if world.is_main:
            remove_leftovers(folder, claimed=True)

    def save(
        self,
        images: int,
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        before_commit: Callable[[], None] = lambda: None,
    ) -> None:
        """Write the checkpoint after `images`; waits for the one before, and raises what went wrong there.

        tensors        live: weights, moments, averages; plain (the same on every process) or DTensors
        state          JSON data; the main process's counts
        before_commit  called on the main process when all tensors are on the disk and the checkpoint does not
                       count yet; in the background in the thread, so it must not read what training changes

        Raises `OutputError` where the disk is full or may not be written. Where one process fails, all raise,
        nothing half-written stays, and the checkpoints that were there remain.
        """
        self.wait()
        text = json.dumps(state, indent=1, ensure_ascii=False) + "\n"  # now: the loop goes on counting
        own = pieces.own_pieces(tensors, self._world)
        if self._thread is None:
            self._write(images, own, text, before_commit)
        else:
            copies = self._staging.copy(own)
            self._writing = self._thread.submit(self._write, images, copies, text, before_commit)

    def wait(self) -> None:
        """Until nothing is being written; raises what went wrong there."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    @property
    def failed(self) -> bool:
        """Whether the save in the background has failed already; `wait` raises with what."""
        writing = self._writing
        return writing is not None and writing.done() and writing.exception() is not None

    def close(self) -> None:
        """Finish what is being written and free the copies. Raises nothing: `wait` does, and goes before."""
        with suppress(Exception):
            self.wait()
        if self._thread is not None:
            self._thread.shutdown()
        self._staging.buffers.clear()

    def _write(self, images: int, own: list[Piece], state: str, before_commit: Callable[[], None]) -> None:
        world, path = self._world, self._folder / f"{images:0{_DIGITS}d}"
        aside = Path(world.broadcast(str(aside_of(path))))
        try:
            together(world, partial(self._begin, aside, path))
            written = together(world, partial(self._write_pieces, aside, own, path))
            files = {f"{_TENSORS}/{name}": digest for part in written for name, digest in part.items()}
            together(world, partial(self._finish, aside, path, files, state, before_commit))
        finally:
            if world.is_main:
                remove(aside)

    def _begin(self, aside: Path, path: Path) -> None:
        if self._world.is_main:
            with writing_to(path):
                (aside / _TENSORS).mkdir(parents=True)

    def _write_pieces(self, aside: Path, own: list[Piece], path: Path) -> dict[str, str]:
        if not (aside / _TENSORS).is_dir():
            raise OutputError(
                f"{aside}: made by the main process and not seen by process {self._world.rank}. Put the run "
                "on a file system that all machines share."
            )
        with writing_to(path):
            return pieces.write(aside / _TENSORS, own, self._world.rank)

    def _finish(
        self, aside: Path, path: Path, files: dict[str, str], state: str, before_commit: Callable[[], None]
    ) -> None:
        """What is done once: the caller's part, then state, manifest and marker, then the name."""
        if not self._world.is_main:
            return
        if lost := sorted(files.keys() - _files(aside)):
            raise OutputError(
                f"{aside / lost[0]}: written by another process and not seen by the main one. Put the run "
                "on a file system that all machines share."
            )
        before_commit()
        with writing_to(path):
            files[_STATE] = _put(aside / _STATE, state)
            manifest = {"format": FORMAT, "files": dict(sorted(files.items()))}
            digest = _put(aside / _MANIFEST, json.dumps(manifest, indent=1) + "\n")
            _put(aside / _MARKER, _seal(digest))
            flush(aside)
            put_in_place(aside, path)
            self.prune(int(path.name))

    def prune(self, newest: int) -> None:
        """Remove checkpoints that are not to be kept; for the main process, also as it resumes at `newest`.

        None beyond it is counted: those are damaged, and must not stand for it.
        """
        there = [int(name) for name in _names(self._folder)]
        upto = [images for images in there if images <= newest]
        for images in superfluous(upto, self._keep, self._keep_every):
            _drop(self._folder / f"{images:0{_DIGITS}d}")


def together(world: World, act: Callable[[], T]) -> list[T]:
    """What `act` gives on every process, by rank; where it fails on one, all raise and none waits for it.

    The process that failed raises its own error, the others one of the same kind that names it.
    """
    failure: Exception | None = None
    outcome: Any = None
    try:
        outcome = act()
    except Exception as error:
        failure = error
    if world.size == 1:
        told = [(outcome, None)]
    else:
        told = world.gather((outcome, None if failure is None else _told(failure)))
    if failure is not None:
        raise failure
    for rank, (_, trouble) in enumerate(told):
        if trouble is not None:
            kind, text = trouble
            raise kind(f"process {rank}: {text}")
    return [each for each, _ in told]


def _told(error: Exception) -> tuple[type[ShoestringError], str]:
    if isinstance(error, ShoestringError):
        return type(error), str(error)
    return ShoestringError, f"{type(error).__name__}: {error}"


class _Unusable(Exception):
    """Why a checkpoint cannot be used."""


def _problem(path: Path, world: World) -> str | None:
    """What is wrong with a checkpoint, as far as this process looks: it hashes its share of the files."""
    try:
        files = _listed(path)
        there = _files(path)
        for name in sorted(files.keys() ^ there):
            raise _Unusable(f"{name} is {'not in its manifest' if name in there else 'missing'}")
        for name in sorted(files)[world.rank :: world.size]:
            if sha256(path / name) != files[name]:
                raise _Unusable(f"{name} is damaged (sha256 differs)")
    except _Unusable as reason:
        return str(reason)
    except FileNotFoundError as error:
        return f"{error.filename} is missing"
    except OSError as error:  # it may be read again in a minute, so it must not count as damaged and go
        raise CheckpointError(
            f"{error.filename or path}: cannot be read ({error.strerror}). Try again, or move {path} away to "
            "go on from the checkpoint before."
        ) from error
    return None


def _listed(path: Path) -> Mapping[str, str]:
    """The manifest's names and hashes; raises `_Unusable` where it is not what was committed."""
    if not (path / _MARKER).is_file():
        raise _Unusable("it was never completed")
    if not (path / _MANIFEST).is_file():
        raise _Unusable(f"{_MANIFEST} is missing")
    content, seal = (path / _MANIFEST).read_bytes(), (path / _MARKER).read_bytes()
    try:
        manifest = json.loads(content)
    except (ValueError, RecursionError):
        raise _Unusable(f"{_MANIFEST} is damaged (not JSON)") from None
    if not isinstance(manifest, dict):
        raise _Unusable(f"{_MANIFEST} is not a checkpoint's")
    if seal == b"" and "format" not in manifest:  # as version 0.1 wrote them: names and hashes alone
        files: Any = manifest
    elif seal != _seal(hashlib.sha256(content).hexdigest()).encode():
        raise _Unusable(f"{_MANIFEST} or {_MARKER} is damaged (sha256 differs)")
    elif manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: written by another version of Shoestring (format {manifest.get('format')}, this one "
            f"reads {FORMAT}). Resume with that one, or move the folder away to go on from the one before."
        )
    else:
        files = manifest.get("files")
    if not isinstance(files, dict) or _STATE not in files:
        raise _Unusable(f"{_MANIFEST} is not a checkpoint's")
    return files


def _state(path: Path, world: World) -> Any:
    return read_json(path / _STATE) if world.is_main else None


def _names(folder: Path) -> list[str]:
    """The checkpoints' names, newest first."""
    return sorted((path.name for path in folder.glob("[0-9]" * _DIGITS)), reverse=True)


def _files(path: Path) -> set[str]:
    """What a manifest must name; hidden files are the system's (.DS_Store, .nfs) unless they hold tensors."""
    found = {file.relative_to(path).as_posix(): file for file in path.rglob("*") if file.is_file()}
    return {
        name
        for name, file in found.items()
        if name not in (_MANIFEST, _MARKER) and (file.name[0] != "." or file.suffix == ".safetensors")
    }


def _seal(digest: str) -> str:
    return digest + "\n"


def _put(path: Path, text: str) -> str:
    """Write a small file; the SHA-256 of what is in it."""
    content = text.encode()
    path.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def _drop(path: Path) -> None:
    """Remove a checkpoint; its name goes first, so that a kill leaves none that is half there."""
    with writing_to(path):
        aside = aside_of(path)
        path.replace(aside)
        remove(aside)
