"""What every test shares: no network, one thread a worker, and where fixtures and data sets are."""

from __future__ import annotations

import os
from pathlib import Path

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
