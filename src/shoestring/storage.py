"""Files that are whole or absent: atomic writes, hashes, and the layout of a run folder."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from shoestring.errors import CheckpointError, OutputError

_BLOCK = 1 << 22
_FULL = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG),
    *(errno.EEXIST, errno.ENOTDIR, errno.EISDIR),  # a file where a folder should be, or the reverse
)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path`; on success flush it and rename it to `path`, else remove it.

    Works for a file or a folder that the caller creates at the yielded place. A full or read-only disk
    raises `OutputError`; nothing half-written is left under either name.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    with writing_to(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield aside
            _flush(aside)
            if path.is_dir():  # a folder cannot be replaced in one step: the old one steps aside, then goes
                os.replace(path, old)
            os.replace(aside, path)
        finally:
            _remove(aside)
            _restore(old, path)


@contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals while writing below `path` into one clear `OutputError`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise_output_error(_refusal(error), path)
        raise


def raise_output_error(error: OSError, path: Path) -> None:
    """Raise `OutputError` where `error` says that the disk is full or may not be written; else return."""
    if error.errno in _FULL:
        free = shutil.disk_usage(_existing_parent(Path(path))).free
        raise OutputError(
            f"{path}: the disk is full ({free / 2**20:.0f} MiB free). "
            "Nothing half-written was kept; free some space and run the same command again."
        ) from error
    if error.errno in _REFUSED:
        raise OutputError(
            f"{path}: cannot be written ({error.strerror}). Choose another folder or change its permissions."
        ) from error


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left half-written below `folder`; what a living one writes stays.

    A folder that was being replaced gets its old content back where the new one had not arrived.
    """
    with writing_to(folder):
        for leftover in list(folder.rglob(".*")):
            parts = re.fullmatch(r"\.(.+)\.(\d+)\.(partial|old)", leftover.name)
            if parts is None or _alive(int(parts[2])):
                continue
            if parts[3] == "old":
                _restore(leftover, leftover.with_name(parts[1]))
            else:
                _remove(leftover)


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` (UTF-8), whole or not at all."""
    with atomic_path(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The JSON value in `path`; raises `OSError` or `ValueError` as the standard library does."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


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


def _digest(path: Path, start: Any, update: Callable[[bytes, Any], Any]) -> Any:
    value = start
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            value = update(block, value)
    return value


def _flush(path: Path) -> None:
    """Ask the disk to keep a file, or every file in a folder, before it gets its final name."""
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _refusal(error: OSError | SafetensorError) -> OSError:
    """The operating system's error; safetensors only names its number."""
    if isinstance(error, OSError):
        return error
    number = re.search(r"os error (\d+)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(str(error))


def _restore(old: Path, path: Path) -> None:
    """Put a folder that stepped aside back where nothing has taken its place, else remove it."""
    if old.exists() and not path.exists():
        os.replace(old, path)
    _remove(old)


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
