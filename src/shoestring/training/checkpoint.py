"""Checkpoints: tensors as safetensors, scalars as JSON, hashed, whole or absent; the newest valid one counts.

checkpoints/000000050000/           named by images seen
  tensors/*.safetensors             torch.distributed.checkpoint's safetensors storage; nothing is pickled
  state.json                        counters, ledger, what the resumed run needs besides tensors
  manifest.json                     sha256 of every file above
  COMMITTED                         written last
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

from shoestring.errors import CheckpointError
from shoestring.interfaces import Log
from shoestring.storage import atomic_path, read_json, sha256, write_json

_MARKER = "COMMITTED"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint folder and its scalars."""

    path: Path
    state: dict[str, Any]

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor, on the CPU, by the name it was saved under."""
        reader = HuggingFaceStorageReader(str(self.path / "tensors"))
        tensors = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in reader.read_metadata().state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        with _quiet():
            load_distributed(tensors, storage_reader=reader, no_dist=True)
        return tensors


def save(folder: Path, images: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
    """Write a checkpoint below `folder`; it appears under its name only when complete."""
    path = folder / f"{images:012d}"
    with atomic_path(path) as aside:
        (aside / "tensors").mkdir(parents=True)
        contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        writer = HuggingFaceStorageWriter(str(aside / "tensors"), save_distributed=True)
        try:
            with _quiet():
                save_distributed(contiguous, storage_writer=writer, no_dist=True)
        except CheckpointException as error:  # a BaseException; what went wrong is inside
            raise next(iter(error.failures.values()))[0] from error
        write_json(aside / "state.json", state)
        write_json(aside / "manifest.json", {name: sha256(aside / name) for name in _files(aside)})
        (aside / _MARKER).touch()
    return path


def newest(folder: Path, log: Log) -> Checkpoint | None:
    """The newest checkpoint that is complete and unchanged; says which ones it passes over, and why."""
    for path in sorted(folder.glob("[0-9]" * 12), reverse=True):
        if problem := _problem(path):
            log(f"Checkpoint {path}: {problem}. Trying the one before it.")
        else:
            return Checkpoint(path, read_json(path / "state.json"))
    return None


def drop_newer(folder: Path, images: int) -> None:
    """Remove checkpoints beyond `images`, which a resume passed over: they must not be kept instead."""
    for path in folder.glob("[0-9]" * 12):
        if int(path.name) > images:
            shutil.rmtree(path)


def keep_last(folder: Path, count: int) -> None:
    """Remove all but the `count` newest checkpoints."""
    for path in sorted(folder.glob("[0-9]" * 12))[:-count]:
        shutil.rmtree(path)


def take(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors below `prefix`, without it; raises `CheckpointError` where there are none."""
    found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    if not found:
        raise CheckpointError(f"The checkpoint holds nothing under {prefix!r}: it is of another recipe.")
    return found


def _problem(path: Path) -> str | None:
    if not (path / _MARKER).is_file():
        return "it was never completed"
    try:
        manifest = read_json(path / "manifest.json")
    except (OSError, ValueError):
        return "its manifest cannot be read"
    for name, digest in manifest.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if sha256(file) != digest:
            return f"{name} is damaged (sha256 differs)"
    return None


def _files(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def _quiet() -> warnings.catch_warnings[Any]:
    """Without torch's remark that one process saves alone: it does so on purpose."""
    catcher = warnings.catch_warnings(action="ignore", category=UserWarning)
    return catcher
