"""Files are whole or absent, and their hashes are the standard ones."""

from __future__ import annotations

import errno
import hashlib
import os
import zlib
from pathlib import Path

import pytest

from shoestring.errors import CheckpointError, OutputError
from shoestring.storage import (
    RunFolder,
    atomic_path,
    crc32,
    fingerprint,
    read_json,
    remove_leftovers,
    sha256,
    write_json,
    write_text,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})

    def fail() -> None:
        with atomic_path(path) as aside:
            aside.write_text("half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert read_json(path) == {"old": 1}
    assert names(tmp_path) == ["a.json"]


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    for content in ("one", "two"):
        with atomic_path(path) as aside:
            aside.mkdir()
            (aside / content).write_text(content)
    assert names(path) == ["two"]
    assert names(tmp_path) == ["folder"]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EACCES, "cannot be written"),
        (errno.EROFS, "cannot be written"),
    ],
)
def test_a_full_or_read_only_disk_is_said_in_one_line(tmp_path: Path, code: int, message: str) -> None:
    def fail() -> None:
        with atomic_path(tmp_path / "x"):
            raise OSError(code, "refused")

    with pytest.raises(OutputError, match=message):
        fail()
    assert names(tmp_path) == []


def test_other_errors_pass_unchanged(tmp_path: Path) -> None:
    def fail() -> None:
        with atomic_path(tmp_path / "x"):
            raise OSError(errno.EIO, "broken disk")

    with pytest.raises(OSError, match="broken disk"):
        fail()


def test_hashes_are_the_standard_ones(tmp_path: Path) -> None:
    path = tmp_path / "data"
    content = bytes(range(256)) * 20_000  # over one block
    path.write_bytes(content)
    assert crc32(path) == zlib.crc32(content)
    assert sha256(path) == hashlib.sha256(content).hexdigest()


def test_a_fingerprint_ignores_the_order_of_keys_and_nothing_else() -> None:
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})


def test_a_run_folder_needs_a_recipe(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a run folder"):
        RunFolder.open(tmp_path)
    write_text(tmp_path / "recipe.yaml", "name: x\n")
    assert RunFolder.open(tmp_path).metrics == tmp_path / "metrics.jsonl"


def test_a_kill_between_the_two_renames_of_a_folder_loses_nothing(tmp_path: Path) -> None:
    """What stepped aside comes back; what was half-written goes; what a living process writes stays."""
    dead, alive = 99_999_999, os.getpid()
    for name in (f".run.{dead}.old", f".run.{dead}.partial", f".other.{alive}.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "content").write_text(name)
    remove_leftovers(tmp_path)
    assert names(tmp_path) == [f".other.{alive}.partial", "run"]
    assert (tmp_path / "run" / "content").read_text() == f".run.{dead}.old"


def test_an_error_between_the_two_renames_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").touch()
    replace, calls = os.replace, []

    def second_fails(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == 2:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", second_fails)

    def write() -> None:
        with atomic_path(path) as aside:
            aside.mkdir()

    with pytest.raises(KeyboardInterrupt):
        write()
    assert names(tmp_path) == ["folder"]
    assert names(path) == ["old"]
