"""Pieces of tensors: which part of a run's state this process writes, how it lies on disk, and reading it.

    tensors of all processes --own_pieces--> pieces, each element in exactly one --write--> *.safetensors
    *.safetensors, of however many processes --read--> tensors, each process what it holds

The files are those of torch.distributed.checkpoint's safetensors storage: a tensor's piece under the tensor's
name, and where it begins in the whole in the header. Its reader reads them, so that a state saved on any
number of processes loads on any other. Its writer is not used (torch 2.13): it makes each file up in memory
before writing it (2 GiB beside a state of 1 GiB), and plans every save by messages between the processes,
where here each knows from the tensors alone what is its own to write.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from shoestring.processes import World
from shoestring.storage import flush, sha256

FILE_BYTES = 1 << 30
"""Tensors that go into one file, and so the most that is held beside tensors which are not on the CPU."""


@dataclass(frozen=True)
class Piece:
    """A part of the tensor `name` that one process has: `tensor`, which begins at `offset` of the whole."""

    name: str
    offset: tuple[int, ...]
    tensor: Tensor


def own_pieces(tensors: Mapping[str, Tensor], world: World) -> list[Piece]:
    """What this process is to write of tensors that all processes name alike.

    A plain tensor is the same on every process, and one of them writes it: the one with the least to write
    so far. Of a DTensor every process writes its own shard, and of a shard that several hold, one of them.
    The pieces are views of the tensors, not copies.
    """
    pieces, loads = [], [0] * world.size
    for number, (name, tensor) in enumerate(sorted(tensors.items())):
        if isinstance(tensor, DTensor):
            if _writes_shard(tensor, number):
                (chunk,) = tensor.__create_chunk_list__()
                pieces.append(Piece(name, tuple(chunk.offsets), tensor.to_local().detach()))
        else:
            owner = loads.index(min(loads))
            loads[owner] += tensor.nbytes
            if owner == world.rank:
                pieces.append(Piece(name, (0,) * tensor.ndim, tensor.detach()))
    return pieces


def _writes_shard(tensor: DTensor, number: int) -> bool:
    """Whether this process's shard is there, not empty, and its to write: copies go round by the number."""
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return False
    for dim, placement in enumerate(tensor.placements):
        alike = placement.is_replicate() or not tensor.numel()
        if alike and coordinate[dim] != number % tensor.device_mesh.size(dim):
            return False
    return bool(tensor.to_local().numel() or not tensor.numel())


@dataclass
class Staging:
    """Copies of pieces on the CPU, in memory that is kept from one time to the next (pinned for a GPU's)."""

    buffers: dict[str, Tensor] = field(default_factory=dict)

    def copy(self, pieces: Sequence[Piece]) -> list[Piece]:
        """The pieces as they are now; they stay so until the next call."""
        fitting = {piece.name: (piece.tensor.shape, piece.tensor.dtype) for piece in pieces}
        self.buffers = {  # those of other shapes are freed before new ones are made
            name: buffer
            for name, buffer in self.buffers.items()
            if fitting.get(name) == (buffer.shape, buffer.dtype)
        }
        copies = []
        for piece in pieces:
            tensor = piece.tensor
            if piece.name not in self.buffers:
                shape, dtype = tensor.shape, tensor.dtype
                self.buffers[piece.name] = torch.empty(shape, dtype=dtype, pin_memory=tensor.is_cuda)
            copies.append(replace(piece, tensor=self.buffers[piece.name]))
            copies[-1].tensor.copy_(tensor, non_blocking=tensor.is_cuda)
        for device in {piece.tensor.device for piece in pieces if piece.tensor.is_cuda}:
            torch.cuda.synchronize(device)
        return copies


def write(folder: Path, pieces: Sequence[Piece], rank: int) -> dict[str, str]:
    """Write a process's pieces to files of `folder`, and have the disk keep them; their names and SHA-256."""
    digests = {}
    for number, part in enumerate(_files(pieces)):
        file = folder / f"{rank:05d}-{number:05d}.safetensors"
        header = {
            "DCP_SHARDING_INFO": json.dumps({piece.name: {"saved_offsets": piece.offset} for piece in part}),
            "DCP_VERSION": "1.0",
            "format": "pt",
        }
        save_file(_on_cpu(part), file, header)
        flush(file)
        digests[file.name] = sha256(file)
    return digests


def _files(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """The pieces in order, in parts of `FILE_BYTES`; a larger piece has a file of its own."""
    part: list[Piece] = []
    size = 0
    for piece in pieces:
        size += piece.tensor.nbytes
        if part and size > FILE_BYTES:
            yield part
            part, size = [], piece.tensor.nbytes
        part.append(piece)
    if part:
        yield part


def _on_cpu(pieces: Sequence[Piece]) -> dict[str, Tensor]:
    """Tensors as safetensors wants them: contiguous, each in memory of its own. Most are so already."""
    found: dict[str, Tensor] = {}
    taken: set[int] = set()
    for piece in pieces:
        tensor = piece.tensor.cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in taken:
            tensor = tensor.clone()
        taken.add(tensor.untyped_storage().data_ptr())
        found[piece.name] = tensor
    return found


def sizes(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and type of every tensor, whole, whose pieces lie in `folder`; reads headers only."""
    return {
        name: (entry.size, entry.properties.dtype)
        for name, entry in HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def read(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill tensors from the pieces in `folder`, in place; a DTensor's shard from the pieces it overlaps.

    One piece of one tensor at a time is in memory besides. No messages: each process reads for itself, by the
    planner and reader that `torch.distributed.checkpoint.load` would use.
    """
    reader, planner = HuggingFaceStorageReader(str(folder)), DefaultLoadPlanner()
    metadata = reader.read_metadata()
    planner.set_up_planner({name: tensor.detach() for name, tensor in tensors.items()}, metadata)
    reader.set_up_storage_reader(metadata, is_coordinator=False)
    reader.read_data(planner.finish_plan(planner.create_local_plan()), planner).wait()
