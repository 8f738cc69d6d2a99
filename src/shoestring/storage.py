"""Files that are whole or absent: atomic writes, hashes, who may write, and the layout of a run folder."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from shoestring.errors import CheckpointError, OutputError

try:
    import fcntl
except ImportError:  # a system without such locks
    fcntl = None  # type: ignore[assignment]

_BLOCK = 1 << 22
_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
_REFUSED = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG, errno.ENAMETOOLONG),
    *(errno.EEXIST, errno.ENOTDIR, errno.EISDIR),  # a file where a folder should be, or the reverse
)
_CLAIM = ".claim"
_UMASK = os.umask(0o077)
os.umask(_UMASK)
_ABANDONED = 24 * 3600
"""Seconds without a change after which another machine's half-written files are taken for left behind."""


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path`; on success flush it and rename it to `path`, else remove it.

    Works for a file or a folder that the caller creates at the yielded place. A full or read-only disk
    raises `OutputError`; nothing half-written is left under either name.
    """
    path = Path(path)
    aside = aside_of(path)
    with writing_to(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield aside
            flush(aside)
            put_in_place(aside, path)
        finally:
            remove(aside)


def aside_of(path: Path, kind: str = "partial") -> Path:
    """Where this process writes what will be `path`, beside it; `remove_leftovers` knows such names."""
    return path.with_name(f".{path.name}.{os.getpid()}@{_machine()}.{kind}")


def put_in_place(aside: Path, path: Path) -> None:
    """Rename `aside` to `path`, instead of what was there, and have the disk keep the new name."""
    old = aside_of(path, "old")
    try:
        if path.is_dir():  # a folder cannot be replaced in one step: the old one steps aside, then goes
            os.replace(path, old)
        os.replace(aside, path)
        _sync(path.parent)
    finally:
        _restore(old, path)


def flush(path: Path) -> None:
    """Ask the disk to keep a file, or a folder with everything in it, readable to whom the umask allows."""
    for each in [*path.rglob("*"), path] if path.is_dir() else [path]:
        if each.is_file():  # safetensors writes files that their owner alone may read
            each.chmod(0o666 & ~_UMASK)
        _sync(each)


def remove(path: Path) -> None:
    """Remove a file or folder, or nothing where there is none."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()


@contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals while writing below `path` into one clear `OutputError`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise_output_error(_refusal(error, path), path)
        raise


def raise_output_error(error: OSError, path: Path) -> None:
    """Raise `OutputError` where `error` says that the disk is full or may not be written; else return."""
    if error.errno in _FULL:
        free = shutil.disk_usage(_existing_parent(Path(path))).free
        raise OutputError(
            f"{path}: the disk is full ({free / 2**20:.0f} MiB free). "
            "Nothing half-written was kept; free some space and run the same command again."
        ) from error
    if error.errno in _REFUSED or _cannot_be_made(error, path):
        raise OutputError(
            f"{path}: cannot be written ({error.strerror}). Choose another folder or change its permissions."
        ) from error


def remove_leftovers(folder: Path, *, claimed: bool = False) -> None:
    """Remove what killed processes left half-written below `folder`; what a living one writes stays.

    Whether a process of another machine lives cannot be asked: what it left goes a day after its last
    change. With `claimed` nobody but this process writes below `folder`, and what others left goes at once.
    A folder that was being replaced gets its old content back where the new one had not arrived.
    """
    with writing_to(folder):
        for leftover in list(folder.rglob(".*")):
            # names of version 0.1 have no machine in them
            parts = re.fullmatch(r"\.(.+)\.(\d+)(?:@([\w-]+))?\.(partial|old)", leftover.name)
            if parts is None or _in_use(leftover, int(parts[2]), parts[3] or _machine(), claimed):
                continue
            if parts[4] == "old":
                _restore(leftover, leftover.with_name(parts[1]))
            else:
                remove(leftover)


@contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process alone, so that no two train the same run at once.

    Raises `CheckpointError` where another process holds it. The operating system keeps the lock (`flock` on
    `.claim`) and frees it when its holder ends, however it ends; a `.claim` that a killed process left means
    nothing by itself. Between machines the lock holds where their shared file system passes it on: NFS on
    Linux does unless mounted with `nolock` or `local_lock`, Lustre does with `flock`. Where there are no
    locks, nothing is kept apart. Folders made for this go again where nothing else was written there.
    """
    path = folder / _CLAIM
    new = [each for each in (folder, *folder.parents) if not each.exists()]
    with writing_to(path):
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with writing_to(path):
            _lock(lock, path)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            with suppress(OSError):  # one is not empty
                for each in new:
                    each.rmdir()
    finally:
        os.close(lock)


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` (UTF-8), whole or not at all."""
    with atomic_path(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The JSON value in `path`; raises `OSError` or `ValueError` as the standard library does."""
    return parse_json(Path(path).read_text(encoding="utf-8"))


def parse_json(text: str | bytes) -> Any:
    """The JSON value in `text`; raises `ValueError` for anything else, endless brackets included."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def crc32(path: Path) -> int:
    """CRC-32 of a file: quick, finds accidents."""
    return _digest(path, 0, lambda block, value: zlib.crc32(block, value))


def sha256(path: Path) -> str:
    """SHA-256 of a file as hex: slower, finds any change."""
    digest = hashlib.sha256()
    _digest(path, None, lambda block, _: digest.update(block))
    return digest.hexdigest()


def fingerprint(value: Any) -> str:
    """A short stable hash of a JSON value, equal for equal values whatever their key order."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class RunFolder:
    """Names of everything a training leaves in its folder (DESIGN, "Run folder")."""

    root: Path

    @property
    def recipe(self) -> Path:
        return self.root / "recipe.yaml"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def ledger(self) -> Path:
        return self.root / "ledger.json"

    @property
    def previews(self) -> Path:
        return self.root / "previews"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def pipeline(self) -> Path:
        return self.root / "pipeline"

    @property
    def samples(self) -> Path:
        return self.root / "samples"

    @property
    def evaluation(self) -> Path:
        return self.root / "evaluation.json"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """The run at `path`; raises `CheckpointError` where there is none."""
        run = cls(Path(path))
        if not run.recipe.is_file():
            raise CheckpointError(
                f"{path}: not a run folder (no recipe.yaml in it). "
                "Give the folder that `shoestring train` printed, such as runs/demo."
            )
        return run


def exported(path: str | Path) -> Path:
    """The folder of a run's newest export, or `path` where it is no run; raises `CheckpointError`."""
    run = RunFolder(Path(path))
    if not run.recipe.is_file():
        return run.root
    if not run.pipeline.is_dir():
        raise CheckpointError(
            f"{path}: this run has no pipeline yet; it is written at the first checkpoint. "
            "Let `shoestring train --resume` reach one."
        )
    return run.pipeline


def _digest(path: Path, start: Any, update: Callable[[bytes, Any], Any]) -> Any:
    value = start
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            value = update(block, value)
    return value


def _lock(lock: int, path: Path) -> None:
    """Lock an open claim and name this process in it, for the message that others get."""
    try:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(lock), os.stat(path)):
            raise BlockingIOError  # its holder has just removed it, and somebody else made a new one
    except (BlockingIOError, FileNotFoundError) as error:
        raise CheckpointError(
            f"{path.parent}: {_holder(path)} is training this run. Wait until it ends or stop it, then run "
            "the same command again; or start a run of your own with another --name."
        ) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    os.ftruncate(lock, 0)
    os.pwrite(lock, json.dumps({"process": os.getpid(), "machine": _machine(), "since": since}).encode(), 0)


def _holder(path: Path) -> str:
    try:
        held = read_json(path)
        return f"process {held['process']} on {held['machine']}, since {held['since']},"
    except (OSError, ValueError, LookupError, TypeError):  # it is writing its name just now
        return "another process"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some file systems sync files alone
            raise
    finally:
        os.close(descriptor)


def _refusal(error: OSError | SafetensorError, path: Path) -> OSError:
    """The operating system's error; safetensors, here as it writes, only names its number."""
    if isinstance(error, OSError):
        return error
    number = re.search(r"os error (\d+)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1])), path) if number else OSError(str(error))


def _cannot_be_made(error: OSError, path: Path) -> bool:
    """Whether what is missing is the place itself: some file systems, such as /proc, say so of all names."""
    own = {path := Path(path), aside_of(path), *path.parents}
    return error.errno == errno.ENOENT and error.filename is not None and Path(error.filename) in own


def _restore(old: Path, path: Path) -> None:
    """Put a folder that stepped aside back where nothing has taken its place, else remove it."""
    if old.exists() and not path.exists():
        os.replace(old, path)
    remove(old)


def _in_use(leftover: Path, process: int, machine: str, claimed: bool) -> bool:
    """Whether somebody may still be writing what `process` of `machine` began."""
    own = machine == _machine()
    if claimed:
        return own and process == os.getpid()
    return _alive(process) if own else time.time() - _last_change(leftover) < _ABANDONED


def _last_change(path: Path) -> float:
    newest = 0.0
    for each in [path, *path.rglob("*")]:
        with suppress(FileNotFoundError):  # still being written, then: a temporary file that is gone by now
            newest = max(newest, each.stat().st_mtime)
    return newest


def _machine() -> str:
    """This machine's name, as it may stand in a file's."""
    return re.sub(r"[^\w-]", "-", socket.gethostname()) or "unnamed"


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _existing_parent(path: Path) -> Path:
    while not path.exists() and path != path.parent:
        path = path.parent
    return path
