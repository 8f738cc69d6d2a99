"""The loop on a GPU: bfloat16, compiled, exact resume, and NCCL with one process."""

from __future__ import annotations

import copy
import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from shoestring.cli.main import main
from shoestring.storage import read_json

TINY = Path(__file__).resolve().parents[1] / "cli" / "tiny.yaml"
CLOCKS = {"seconds", "images_per_second", "data_wait", "memory_bytes"}


def train(*words: str) -> None:
    with pytest.raises(SystemExit) as done:
        main(["train", str(TINY), "--device", "cuda", "--set", "train.keep=9", *words])
    assert done.value.code in (0, None)


def records(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    told = [line for line in lines if line.get("text") != "resumed from a checkpoint"]
    return [{name: value for name, value in line.items() if name not in CLOCKS} for line in told]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_run_on_a_gpu_resumes_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str, dtype: str
) -> None:
    """Fused optimisers and checkpoints in the background included."""
    sets = ["--dtype", dtype, "--set", f"optimizer.kind={optimizer}", "--set", "train.async_checkpoints=true"]
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        train(*sets)
    run = tmp_path / "broken" / "runs" / "tiny"
    for path in (run / "checkpoints").glob("[0-9]*"):
        if int(path.name) > 96:
            (path / "COMMITTED").unlink()
    train(*sets, "--resume")
    assert records(run) == records(tmp_path / "whole" / "runs" / "tiny")
    assert read_json(run / "ledger.json")["dtype"] == dtype


@pytest.mark.gpu
def test_a_compiled_run_on_a_gpu_learns_as_an_eager_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    train("--name", "eager")
    train("--name", "compiled", "--set", "train.compile=true")
    eager, compiled = records(tmp_path / "runs" / "eager"), records(tmp_path / "runs" / "compiled")
    pairs = zip(eager, compiled, strict=True)
    assert all(a.get("loss", 0) == pytest.approx(b.get("loss", 0), rel=0.02) for a, b in pairs)


@pytest.mark.gpu
def test_a_network_sharded_over_one_gpu_by_nccl_is_the_same_network() -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from shoestring.training.parallel import whole

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=address, rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        plain = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU(), torch.nn.Linear(8, 4)).cuda()
        sharded = copy.deepcopy(plain)
        mesh = init_device_mesh("cuda", (1,))
        fully_shard(sharded[0], mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        x = torch.randn(4, 8, device="cuda")
        for network in (plain, sharded):
            network(x).square().sum().backward()
        for one, other in zip(plain.parameters(), sharded.parameters(), strict=True):
            assert one.grad is not None
            assert other.grad is not None
            torch.testing.assert_close(whole(other.grad), one.grad)
    finally:
        dist.destroy_process_group()
