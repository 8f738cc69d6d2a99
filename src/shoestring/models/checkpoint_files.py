"""Checkpoint files that others wrote, read as tensors and nothing else.

    .pt, .pth, .ckpt, .bin --torch.load(weights_only), mapped--> dicts of dicts --networks_in--> state dicts
    .safetensors           --mapped----------------------------> one dict       -->

A pickle is a program. PyTorch's restricted reader makes containers, numbers and tensors of one and stops at
everything else, so nothing in a file is ever run. Tensors stay on disk until they are used.
"""

from __future__ import annotations

import datetime
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from shoestring.errors import CheckpointError
from shoestring.models.network_files import damaged
from shoestring.storage import atomic_path

SAFETENSORS = ".safetensors"
SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", SAFETENSORS)

# Beside weights, training checkpoints hold clocks and the state of numpy's generator: plain data.
_INERT: list[Any] = [
    datetime.timedelta,
    np.ndarray,
    np.dtype,
    *(type(np.dtype(name)) for name in ("uint32", "int64", "float64")),
    *((np.empty(0).__reduce__()[0], f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
]

_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Parts of names that torch.compile, FSDP and activation checkpointing put in."""


def read_checkpoint(path: Path) -> Any:
    """What `path` holds: a dict of tensors, or containers with such dicts somewhere in them.

    Raises `CheckpointError` for a file that is missing, damaged, no checkpoint, or holds more than data.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file. Give a checkpoint ({', '.join(SUFFIXES)}).")
    if path.suffix == SAFETENSORS:
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise damaged(path, error) from error
    with open(path, "rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"  # else as torch 1.5 and before wrote: cannot be mapped
    try:
        if zipped:
            _check_archive(path)
        with torch.serialization.safe_globals(_INERT):
            return torch.load(path, map_location="cpu", mmap=zipped, weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged archive or pickle can raise anything
        raise CheckpointError(f"{path}: {_reason(error)}") from error


def networks_in(tree: Any, anchor: str) -> dict[str, dict[str, Any]]:
    """Every state dict in `tree` that has a tensor called `anchor`, as {place: {name: value}}.

    A place is where in the tree it lies and the prefix its names have there, such as `state.model.dit`; it
    is empty for a plain state dict. Names come without that prefix and without what wrappers put in.
    """
    found: dict[str, dict[str, Any]] = {}
    seen: set[int] = set()  # a pickle may contain itself
    waiting: list[tuple[str, Any]] = [("", tree)]
    while waiting:
        place, node = waiting.pop()
        if isinstance(node, (list, tuple)):
            node = {str(number): value for number, value in enumerate(node)}
        elif not isinstance(node, Mapping) or id(node) in seen:
            continue
        seen.add(id(node))
        named = {_unwrapped(str(name)): value for name, value in node.items()}
        for name, value in named.items():
            if isinstance(value, Tensor) and (name == anchor or name.endswith(f".{anchor}")):
                prefix = name.removesuffix(anchor)
                inside = {n.removeprefix(prefix): v for n, v in named.items() if n.startswith(prefix)}
                found[_join(place, prefix.removesuffix("."))] = inside
        waiting += [(_join(place, name), value) for name, value in named.items()]
    return dict(sorted(found.items()))


def write_checkpoint(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a plain dict of tensors, whole or not at all: safetensors by its suffix, else `torch.save`."""
    compact = {name: _compact(tensor.detach()) for name, tensor in tensors.items()}
    with atomic_path(path) as aside:
        if path.suffix == SAFETENSORS:
            save_file(compact, aside, metadata={"format": "pt"})
        else:
            with open(aside, "wb") as file:  # given a path, torch writes its name into the file
                torch.save(compact, file)


def _compact(tensor: Tensor) -> Tensor:
    """The tensor in memory of its own size and order: `torch.save` would write all that it is a view of."""
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole and tensor.is_contiguous() else tensor.clone(memory_format=torch.contiguous_format)


def _check_archive(path: Path) -> None:
    """Compare every record with its CRC-32: a mapped file is not checked when it is loaded."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.filename.endswith("/constants.pkl") for entry in entries):
            raise CheckpointError(f"{path}: a TorchScript program. Save the network's state dict instead.")
        summed = any(entry.CRC for entry in entries)  # torch can be told to write no sums
        damaged = archive.testzip() if summed else None
    if damaged is not None:
        raise CheckpointError(f"{path}: damaged: {damaged} does not match its checksum. Download it again.")


def _reason(error: Exception) -> str:
    """Why a file was not loaded and what to do, from one of torch's long messages."""
    message = str(error)
    if message.startswith("Weights only load failed") and "Unsupported operand" not in message:
        found = re.search(r"GLOBAL `?([\w.]+)", message)
        return (
            f"refused: it holds more than tensors: its pickle asks for {found[1] if found else 'a program'}. "
            "Nothing of it was run. Save the network's state dict alone, best as safetensors, with the code "
            "that the file is from."
        )
    first = message.strip().split("\n")[0].split(". ")[0]
    return f"not a whole PyTorch checkpoint ({first or type(error).__name__}). Download or save it again."


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _join(place: str, name: str) -> str:
    return f"{place}.{name}" if place and name else place or name
