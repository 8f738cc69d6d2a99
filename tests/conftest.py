"""What every test shares: no network, one thread a worker, and where fixtures and data sets are."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before anything imports torch or the hub's client.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TERM"] = "dumb"  # plain output from rich
os.environ.pop("SHOESTRING_TRACEBACK", None)
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """Published networks' outputs (SHOESTRING_FIXTURES); the test is skipped where they are absent."""
    return _folder("SHOESTRING_FIXTURES", "../shared/parity")


@pytest.fixture(scope="session")
def data() -> Path:
    """Small real data sets (SHOESTRING_DATA); the test is skipped where they are absent."""
    return _folder("SHOESTRING_DATA", "../shared/data")


@pytest.fixture(scope="session")
def launch() -> Callable[..., list[subprocess.CompletedProcess[str]]]:
    """`launch(processes, script or "-m", ...)`: run Python as torchrun does, without its start-up time.

    Returns how each process ended, by rank; all are killed after `timeout` seconds.
    """

    def run(
        processes: int, *words: Any, cwd: Path, timeout: float = 240.0, **environment: str
    ) -> list[subprocess.CompletedProcess[str]]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, *map(str, words)]
        started = []
        for rank in range(processes):
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
            several = {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in names.items()}}
            started.append(
                subprocess.Popen(
                    command,
                    cwd=cwd,
                    env={
                        **os.environ,
                        "OMP_NUM_THREADS": "1",
                        **(several if processes > 1 else {}),
                        **environment,
                    },
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        try:
            told = [process.communicate(timeout=timeout) for process in started]
        finally:
            for process in started:
                process.kill()
        return [
            subprocess.CompletedProcess(command, process.returncode, out, err)
            for process, (out, err) in zip(started, told, strict=True)
        ]

    return run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is none, without importing torch for the others."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        import torch

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def _folder(variable: str, default: str) -> Path:
    path = ROOT / os.environ.get(variable, default)
    if not path.is_dir():
        pytest.skip(f"no {path}: set {variable}")
    return path
