"""The processes of a run: which one this is, what they tell each other, and one voice when something fails.

`torchrun` starts the processes and names them in the environment; without it a run has one process, and every
function here still works. Values travel between the processes of one run only, never to or from a file.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shoestring.errors import RecipeError, ShoestringError

PATIENCE = timedelta(minutes=30)  # how long one process waits for another: previews and saving included
_FIRST_FAILURE = "shoestring/first_failure"


@dataclass(frozen=True)
class World:
    """All processes of a run, as seen from one of them. `group` None is the default process group."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    group: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes what is written once: pipeline, metrics, ledger, console."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            self.sum(torch.zeros(1))

    @contextmanager
    def first_on_machine(self) -> Iterator[None]:
        """Inside, the first process of each machine comes before its others: they find made what it made."""
        if self.local_rank:
            self.barrier()
        yield
        if not self.local_rank:
            self.barrier()

    def broadcast(self, value: Any) -> Any:
        """The main process's `value`, on every process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every process's `value`, by rank, on every process."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def sum(self, tensor: Tensor) -> Tensor:
        """`tensor` summed over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on some process."""
        return flag if self.size == 1 else bool(self.sum(torch.tensor([int(flag)])).item())

    def apart(self) -> World:
        """The same processes with lines of their own, for a thread that talks while training does."""
        return self if self.size == 1 else replace(self, group=dist.new_group(backend="gloo"))


ALONE = World()


def own_device(device: str) -> str:
    """The device of this process: of several on a machine, each takes the GPU of its number.

    Raises `RecipeError` where there are more processes than GPUs, or where one GPU is named for all.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device
    if device != "auto" and not device.startswith("cuda"):
        return device
    if not torch.cuda.is_available():
        return "cpu" if device == "auto" else device
    local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if device not in ("auto", "cuda"):
        raise RecipeError(f"device {device!r}: each process takes its own. Use --device cuda.")
    if local >= count:
        raise RecipeError(
            f"process {local} of this machine has no GPU: there are {count}. "
            f"Use torchrun --nproc-per-node {count}."
        )
    return f"cuda:{local}"


@contextmanager
def join(device: str) -> Iterator[tuple[World, str]]:
    """Join the processes that `torchrun` started, if it did; yields them and this process's device.

    On GPUs `auto` and `cuda` mean the one of this process's local rank; tensors on the CPU travel by gloo.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE, device
        return
    on_gpu = torch.cuda.is_available() and device != "cpu"
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=PATIENCE)
    _first_failure.expected = True
    try:
        device = own_device(device)
        if on_gpu:
            torch.cuda.set_device(torch.device(device))
        yield World(int(os.environ["RANK"]), size, int(os.environ.get("LOCAL_RANK", "0"))), device
    except BaseException:
        _claim_failure()  # while this process can still be heard
        if not on_gpu:  # NCCL would wait for the others' part in what has failed; leaving closes it too
            _leave()
        raise
    _leave()


def _leave() -> None:
    with suppress(Exception):  # peers may be gone already
        dist.destroy_process_group()


def end(code: int) -> None:
    """End this process at once if it has joined others; nothing else is left to do or to close.

    A thread of gloo's may still let go of a tensor of the last exchange. Asking a Python that is being taken
    apart for its lock, it would abort the process, whose work is done and saved.
    """
    if _first_failure.expected:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def explained(error: BaseException) -> str | None:
    """What this process has to say of an error that ends it; None where another process says the cause.

    When a process fails, its peers fail after it for want of it: the first alone speaks, and says who it is.
    """
    text = " ".join(str(error).split())
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return text
    rank = os.environ.get("RANK", "0")
    if _first_failure.expected and _first_failure.rank not in (None, rank):
        return None
    if isinstance(error, ShoestringError):
        return text if rank == "0" else f"process {rank}: {text}"
    if lost_another(error):
        return (
            f"process {rank} of {size} lost another one, which was killed or ran out of memory: see its "
            "machine's log. Go on from the last checkpoint with --resume."
        )
    return f"process {rank} of {size}: {type(error).__name__}: {text}"


_LOST = re.compile(r"connection (closed|reset|refused)|broken pipe|remote process", re.I)


def lost_another(error: BaseException) -> bool:
    """Whether an error says that another process went away, of which this one's traceback tells nothing."""
    return not isinstance(error, ShoestringError) and _LOST.search(str(error)) is not None


@dataclass
class _FirstFailure:
    """Which process failed first, None where that cannot be asked. Workers of `encode` never join."""

    expected: bool = False
    rank: str | None = None


_first_failure = _FirstFailure()


def _claim_failure() -> None:
    """Learn which process failed first, or tell the others that it is this one."""
    with suppress(Exception):
        store = dist.distributed_c10d._get_default_store()
        store.set_timeout(timedelta(seconds=20))  # its machine may be the one that is gone
        _first_failure.rank = store.compare_set(_FIRST_FAILURE, "", str(dist.get_rank())).decode()
