"""Commands run in an empty folder, on one tiny trained run and a few small stores that all tests share."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shoestring.cli import main as cli

TINY = Path(__file__).parent / "tiny.yaml"


@dataclass(frozen=True)
class Said:
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str

    def refused(self) -> str:
        """The one line on stderr of a command that the user has to mend; stdout is empty."""
        assert self.code == 2, (self.code, self.err)
        assert self.out == ""
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert lines == self.err.splitlines()[-1:], self.err
        return lines[0].removeprefix("error: ")


Command = Callable[..., Said]


def run(*words: object) -> int:
    """The exit code of a command line in this process."""
    with pytest.raises(SystemExit) as ended:
        cli.main([str(word) for word in words])
    return int(ended.value.code or 0)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """`command("train", "demo", ...)`: run it here and see what it says."""

    def call(*words: object) -> Said:
        capsys.readouterr()
        code = run(*words)
        told = capsys.readouterr()
        return Said(code, told.out, told.err)

    return call


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The recipe file that the tests train by."""
    return TINY


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained run (runs/tiny), its scenes, and stores of pictures; not to be changed."""
    folder = tmp_path_factory.mktemp("world")
    with contextlib.chdir(folder):
        assert run("train", TINY) == 0
        photos(folder / "photos", 24)
        sizes = ("--size", 16, "--size", 32)
        assert run("encode", "photos", "--out", "plain", *sizes) == 0
        assert run("encode", "photos", "--out", "parted", "--held-out", 8, *sizes, "--chunk-rows", 8) == 0
    return folder


@pytest.fixture
def here(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder to work in, as the current one."""
    shutil.copytree(world, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    return tmp_path / "empty"


@pytest.fixture
def captioned() -> Callable[[Path, int], None]:
    """`captioned(folder, count)`: make a folder of captioned pictures."""
    return photos


@pytest.fixture
def tree() -> Callable[[Path], dict[str, bytes]]:
    """Every file below a folder with its content."""
    return files


@pytest.fixture
def metrics() -> Callable[[Path], list[dict[str, Any]]]:
    """`metrics(run)`: what training wrote down but for clock times and that it resumed."""

    def read(folder: Path) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        clocks = ("seconds", "images_per_second", "data_wait", "memory_bytes")
        told = [line for line in lines if line.get("text") != "resumed from a checkpoint"]
        return [{name: value for name, value in line.items() if name not in clocks} for line in told]

    return read


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Within `full_disk("ledger")`, no file with that word in its path reaches the disk."""
    fsync = os.fsync

    @contextlib.contextmanager
    def refuse(word: str) -> Iterator[None]:
        met = []

        def refusing(descriptor: int) -> None:
            number = os.fstat(descriptor).st_ino
            met.extend(p for p in Path().rglob("*") if word in str(p) and p.stat().st_ino == number)
            if met:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(descriptor)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", refusing)
            yield
        assert met, "the disk was never full"

    return refuse


def photos(folder: Path, count: int) -> None:
    """Pictures of 40 x 40 with one caption each."""
    folder.mkdir()
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")
        (folder / f"{number:03d}.txt").write_text(f"picture {number} of some grey noise\n")


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
