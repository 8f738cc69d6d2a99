"""One objective on many processes: replicated (DDP) or sharded (FSDP2), and its weights whole again.

    ddp     every process holds all weights; gradients are averaged
    fsdp2   each block's weights, gradients and optimiser state lie in shards, gathered when the block runs;
            with `shard` S < processes, in process groups of S that each hold one copy (a 2-D mesh)

The objective and its parts stay the modules they were (FSDP2 swaps their parameters for sharded ones in
place), so optimisers, averages and checkpoints see them under the same names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from shoestring.errors import RecipeError
from shoestring.interfaces import Objective
from shoestring.processes import World


@dataclass(frozen=True)
class ParallelSettings:
    """How an objective is spread over processes.

    kind                   "ddp" or "fsdp2"
    shard                  processes that share one copy of the weights; None is all of them
    gather_dtype           type in which sharded weights are gathered and computed with
    reduce_dtype           type in which sharded gradients are summed
    reshard_after_forward  free a block's gathered weights after its forward pass
    """

    kind: str = "ddp"
    shard: int | None = None
    gather_dtype: torch.dtype = torch.float32
    reduce_dtype: torch.dtype = torch.float32
    reshard_after_forward: bool = True


def distribute(
    objective: Objective, settings: ParallelSettings, world: World, device: torch.device
) -> nn.Module:
    """Spread an objective over the processes of `world`; the module to call in its place.

    To be called before optimisers are made, since FSDP2 replaces the parameters. Raises `RecipeError` where
    the processes do not divide into groups of `shard`.
    """
    if world.size == 1:
        return objective.to(device)
    if settings.kind == "ddp":
        objective.to(device)
        # Frozen parts are read from the same files everywhere, and 8-bit weights cannot be broadcast.
        frozen = [f"frozen.{name}" for name, _ in objective.frozen.named_parameters()]
        frozen += [f"frozen.{name}" for name, _ in objective.frozen.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(objective, frozen)
        # Unused parameters are looked for only because DDP then keeps its buckets as they are: it otherwise
        # reorders them after the first step, and a resumed run's first step would sum in another order.
        return DistributedDataParallel(objective, find_unused_parameters=True, gradient_as_bucket_view=True)
    mesh = _mesh(settings, world, device)
    policy = MixedPrecisionPolicy(
        param_dtype=None if settings.gather_dtype == torch.float32 else settings.gather_dtype,
        reduce_dtype=settings.reduce_dtype,
        cast_forward_inputs=False,  # time steps need float32; autocast casts what may be cast
    )
    for part in objective.trained.values():
        for module in (*blocks(part), part):
            fully_shard(
                module,
                mesh=mesh,
                mp_policy=policy,
                reshard_after_forward=settings.reshard_after_forward,
            )
    return objective.to(device)


def blocks(part: nn.Module) -> Iterator[nn.Module]:
    """The repeated blocks of a network: what its outermost module lists hold."""
    for child in part.children():
        if isinstance(child, nn.ModuleList):
            yield from (block for block in child if any(True for _ in block.parameters()))
        else:
            yield from blocks(child)


def set_gradient_sync(caller: nn.Module, on: bool) -> None:
    """Whether the next backward pass sums gradients over the processes: only a step's last one need do so.

    FSDP2 sums in every pass, or each process would hold whole gradients from pass to pass.
    """
    if isinstance(caller, DistributedDataParallel):
        caller.require_backward_grad_sync = on


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its shards, on every process; a plain tensor is whole already."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(tensors: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """Copies on the CPU, whole, on the main process; empty on the others. All processes must call it."""
    found = {}
    for name, tensor in tensors.items():
        full = whole(tensor.detach())
        if world.is_main:
            found[name] = full.to("cpu", copy=True)
    return found


def check_batches(name: str, counts: Iterable[int], microbatch: int | None, world: World) -> None:
    """Raise `RecipeError` where a batch of so many images leaves a process with nothing to do in a pass."""
    for count in counts:
        if count // world.size < passes(count, microbatch, world):
            raise RecipeError(
                f"{name}: a batch of {count} images cannot be shared among {world.size} processes"
                f"{f' in passes of {microbatch}' if microbatch else ''}. Use fewer processes, or a batch "
                f"(and a last batch: images modulo batch) that is a multiple of {world.size}."
            )


def passes(count: int, microbatch: int | None, world: World) -> int:
    """Forward passes of a step over `count` images: as many on every process, of `microbatch` at most."""
    most = -(-count // world.size)
    return -(-most // (microbatch or most))


def _mesh(settings: ParallelSettings, world: World, device: torch.device) -> DeviceMesh:
    shard = settings.shard or world.size
    if world.size % shard:
        raise RecipeError(
            f"parallel.shard: {world.size} processes do not divide into groups of {shard}. "
            "Use a divisor, or null for one group of all."
        )
    if shard == world.size:
        return init_device_mesh(device.type, (shard,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (world.size // shard, shard), mesh_dim_names=("replicate", "shard"))
