"""Checkpoints of several processes: shards and copies, other numbers of processes, and one that fails.

Run as a script, this file is one of the processes; it writes what it saw as JSON, which the tests look at.
"""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from shoestring.errors import ShoestringError
from shoestring.processes import World, end, join
from shoestring.training import checkpoint
from shoestring.training.checkpoint import Saver

# --- in a process -----------------------------------------------------------------------------------------


def state(mesh: DeviceMesh, seed: int) -> dict[str, Tensor]:
    """A sharded network with AdamW's moments after a step, and plain tensors; the same whole on any mesh.

    Rows that do not divide by the processes, a bias of one element (no shard on most), scalars, columns in
    shards, copies, and nothing at all.
    """
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 1))
    plain = {"ema/first": torch.randn(7, 3), "ema/half": torch.randn(9).bfloat16(), "count": torch.tensor(3)}
    columns, copies = torch.randn(3, 5), torch.randn(4)
    for module in (network[0], network[2], network):
        fully_shard(module, mesh=mesh)
    optimizer = torch.optim.AdamW(network.parameters())
    for number, parameter in enumerate(network.parameters()):
        values = torch.arange(parameter.numel(), dtype=torch.float32).reshape(parameter.shape) + number
        parameter.grad = distribute_tensor(values, mesh, parameter.placements)
    optimizer.step()
    moments = {
        f"optimizer/{name}/{key}": value
        for name, parameter in network.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }
    last = [Replicate()] * (mesh.ndim - 1)
    odd = {
        "columns": distribute_tensor(columns, mesh, [*last, Shard(1)]),
        "copies": distribute_tensor(copies, mesh, [*last, Replicate()]),
        "none": distribute_tensor(torch.zeros(0, 3), mesh, [*last, Shard(0)]),
    }
    return {f"model/{k}": v for k, v in network.state_dict().items()} | moments | plain | odd


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """By torch's own gathering."""
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
        for name, tensor in tensors.items()
    }


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def raised(act: Callable[[], Any]) -> str:
    try:
        act()
    except ShoestringError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@contextmanager
def files_limited(on: bool) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100 if on else soft, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def reload(folder: Path, mesh: DeviceMesh, world: World, expected: dict[str, Tensor]) -> bool:
    """Whether the newest checkpoint fills a state that had other values with those expected."""
    saved = checkpoint.newest(folder, print, world)
    assert saved is not None
    into = state(mesh, seed=99)
    assert not equal(whole(into), expected)
    saved.load(into, world)
    return equal(whole(into), expected)


def at_once(folder: Path, mesh: DeviceMesh, world: World) -> Iterator[tuple[str, Any]]:
    tensors = state(mesh, seed=0)
    expected = whole(tensors)
    if world.is_main:
        save_file(expected, folder / "expected.safetensors")
    saver = Saver(folder / "sync", keep=5, world=world)
    saver.save(100, tensors, {"images": 100, "by": world.rank})
    yield "reloaded", reload(folder / "sync", mesh, world, expected)

    with files_limited(world.rank == 1):
        yield "refused", raised(lambda: saver.save(200, tensors, {}))

    def fail() -> None:
        raise ShoestringError("no pipeline")

    yield "callers part", raised(lambda: saver.save(200, tensors, {}, fail))
    world.barrier()  # the main process cleans up
    yield "left", names(folder / "sync")

    saver.save(300, tensors, {"images": 300})
    if world.is_main:
        file = max((folder / "sync" / f"{300:012d}" / "tensors").iterdir())
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    world.barrier()
    said: list[str] = []
    saved = checkpoint.newest(folder / "sync", said.append, world)
    assert saved is not None
    yield "used", saved.state["images"]
    yield "said", said
    foreign = {"model/other": torch.zeros(1)} if world.rank == 1 else {"count": torch.tensor(0)}
    yield "missing", raised(lambda: saved.load(foreign, world))


def in_background(folder: Path, mesh: DeviceMesh, world: World) -> Iterator[tuple[str, Any]]:
    tensors = state(mesh, seed=0)
    expected = whole(tensors)
    saver = Saver(folder / "background", keep=5, background=True, world=world)
    saver.save(100, tensors, {"images": 100})
    for _ in range(50):  # training goes on, changes what is saved and talks
        for tensor in tensors.values():
            tensor.add_(1)
        world.sum(torch.ones(10))
    saver.wait()
    yield "background reloaded", reload(folder / "background", mesh, world, expected)

    with files_limited(world.rank == 1):
        saver.save(200, tensors, {})
        yield "background refused", raised(saver.wait)
    world.barrier()
    yield "background left", names(folder / "background")
    saver.save(300, tensors, {})
    saver.close()
    yield "background after", names(folder / "background")


def on_four(folder: Path, mesh: DeviceMesh, world: World) -> Iterator[tuple[str, Any]]:
    """What two wrote; then written again by two groups that each hold one copy in two shards."""
    expected = load_file(folder / "expected.safetensors")
    yield "reloaded", reload(folder / "sync", mesh, world, expected)
    groups = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    tensors = state(groups, seed=0)
    Saver(folder / "four", keep=1, world=world).save(100, tensors, {"images": 100})
    yield "groups reloaded", reload(folder / "four", groups, world, expected)


def on_two_again(folder: Path, mesh: DeviceMesh, world: World) -> Iterator[tuple[str, Any]]:
    expected = load_file(folder / "expected.safetensors")
    yield "reloaded", reload(folder / "four", mesh, world, expected)


def work(folder: Path, tasks: list[str]) -> None:
    with join("cpu") as (world, _):
        mesh = init_device_mesh("cpu", (world.size,))
        seen: dict[str, Any] = {}
        for task in tasks:
            seen |= dict(globals()[task](folder, mesh, world))
        (folder / f"seen.{world.size}.{world.rank}.json").write_text(json.dumps(seen))
    end(0)


# --- the tests --------------------------------------------------------------------------------------------


def launch(size: int, folder: Path, *tasks: str) -> list[dict[str, Any]]:
    """Run tasks on `size` processes; what each saw."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder), *tasks],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        said = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * size, "\n".join(said)
    return [json.loads((folder / f"seen.{size}.{rank}.json").read_text()) for rank in range(size)]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A folder in which two processes saved, and what they saw."""
    folder = tmp_path_factory.mktemp("two")
    return folder, launch(2, folder, "at_once", "in_background")


Two = tuple[Path, list[dict[str, Any]]]


def test_what_two_processes_save_two_load(two: Two) -> None:
    """Sharded and plain tensors, at once and in the background while training goes on and talks."""
    for seen in two[1]:
        assert seen["reloaded"] is True
        assert seen["background reloaded"] is True


@pytest.mark.parametrize("kind", ["sync", "background"])
def test_what_two_processes_save_one_loads(two: Two, kind: str) -> None:
    path = two[0] / kind / f"{100:012d}"
    saved = checkpoint.Checkpoint(path, {})
    expected = load_file(two[0] / "expected.safetensors")
    assert {name: size for name, (size, _) in saved.sizes().items()} == {
        name: tensor.shape for name, tensor in expected.items()
    }
    assert equal(saved.tensors(), expected)
    into = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    saved.load(into)
    assert equal(into, expected)


def written(path: Path) -> tuple[Counter[str], int, list[int]]:
    """How often each name is in the files, elements in all, and bytes by file."""
    files = sorted((path / "tensors").iterdir())
    elements, times = 0, Counter[str]()
    for file in files:
        with safe_open(file, "pt") as content:
            for name in content.keys():  # noqa: SIM118  (it is no mapping)
                times[name] += 1
                elements += content.get_tensor(name).numel()
    return times, elements, [file.stat().st_size for file in files]


def test_every_element_is_written_once_and_by_both_processes(two: Two) -> None:
    times, elements, _ = written(two[0] / "sync" / f"{100:012d}")
    expected = load_file(two[0] / "expected.safetensors")
    assert elements == sum(tensor.numel() for tensor in expected.values())
    assert times["model/0.weight"] == 2, "a shard of each"
    assert times["model/2.bias"] == 1, "one element has one shard"
    assert {times[name] for name in ("ema/first", "count", "copies", "none")} == {1}
    assert times["optimizer/0.weight/step"] == 1
    assert len(list((two[0] / "sync" / f"{100:012d}" / "tensors").iterdir())) == 2


def test_the_main_processs_counts_are_the_checkpoints(two: Two) -> None:
    state = json.loads((two[0] / "sync" / f"{100:012d}" / "state.json").read_text())
    assert state == {"images": 100, "by": 0}


@pytest.mark.parametrize("kind", ["", "background "])
def test_where_one_process_cannot_write_all_say_so_and_the_last_checkpoint_stays(two: Two, kind: str) -> None:
    main, other = (seen[f"{kind}refused"] for seen in two[1])
    assert other.startswith("OutputError: ")
    assert "000200: cannot be written (File too large)" in other
    assert main == other.replace("OutputError: ", "OutputError: process 1: ")
    assert {tuple(seen[f"{kind}left"]) for seen in two[1]} == {(f"{100:012d}",)}


def test_a_background_save_that_failed_does_not_hinder_the_next(two: Two) -> None:
    assert all(seen["background after"] == [f"{100:012d}", f"{300:012d}"] for seen in two[1])


def test_where_the_callers_part_fails_on_the_main_process_all_say_so(two: Two) -> None:
    assert [seen["callers part"] for seen in two[1]] == [
        "ShoestringError: no pipeline",
        "ShoestringError: process 0: no pipeline",
    ]


def test_damage_found_by_one_process_is_known_to_all_and_said_once(two: Two) -> None:
    main, other = two[1]
    assert main["used"] == other["used"] == 100
    assert len(main["said"]) == 1
    assert "000300: tensors/00001-00000.safetensors is damaged" in main["said"][0]
    assert other["said"] == []


def test_what_one_process_misses_stops_all(two: Two) -> None:
    main, other = (seen["missing"] for seen in two[1])
    assert other.startswith("CheckpointError: ")
    assert "it holds no 'model/other'" in other
    assert main == other.replace("CheckpointError: ", "CheckpointError: process 1: ")


@pytest.mark.slow
def test_what_two_save_four_load_and_what_four_save_in_groups_two_and_one_load(two: Two) -> None:
    """Four processes are two copies of two shards, written once; most have no shard of the smallest."""
    folder, _ = two
    for seen in launch(4, folder, "on_four"):
        assert seen == {"reloaded": True, "groups reloaded": True}
    path = folder / "four" / f"{100:012d}"
    expected = load_file(folder / "expected.safetensors")
    times, elements, _ = written(path)
    assert elements == sum(tensor.numel() for tensor in expected.values())
    assert times["model/0.weight"] == 2
    assert len(list((path / "tensors").iterdir())) == 4, "the copies share the work"
    assert equal(checkpoint.Checkpoint(path, {}).tensors(), expected)
    assert launch(2, folder, "on_two_again") == [{"reloaded": True}] * 2


if __name__ == "__main__":
    work(Path(sys.argv[1]), sys.argv[2:])
