"""Files are whole or absent, and their hashes are the standard ones."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest

from shoestring.errors import CheckpointError, OutputError
from shoestring.storage import (
    RunFolder,
    aside_of,
    atomic_path,
    claim,
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


def test_a_place_that_the_file_system_says_is_missing_cannot_be_written(tmp_path: Path) -> None:
    """As /proc says of a folder that is to be made there; what else is missing is another error."""

    def fail(at: str | None) -> None:
        with atomic_path(tmp_path / "x") as aside:
            raise FileNotFoundError(errno.ENOENT, "missing", at or str(aside))

    with pytest.raises(OutputError, match="cannot be written"):
        fail(None)
    with pytest.raises(FileNotFoundError, match="source"):
        fail("source")


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


def test_what_another_machine_writes_stays_until_it_is_a_day_old_or_the_folder_is_claimed(
    tmp_path: Path,
) -> None:
    """Its processes have numbers that mean nothing here."""
    for name in ("new", "old", "busy"):
        (tmp_path / f".{name}.99999999@node-7.partial").mkdir()
        (tmp_path / f".{name}.99999999@node-7.partial" / "content").touch()
    days_ago = time.time() - 2 * 24 * 3600
    for name in ("old", "busy"):
        folder = tmp_path / f".{name}.99999999@node-7.partial"
        os.utime(folder, (days_ago, days_ago))
    os.utime(tmp_path / ".old.99999999@node-7.partial" / "content", (days_ago, days_ago))
    own = aside_of(tmp_path / "own")
    own.touch()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == sorted([own.name, *(f".{n}.99999999@node-7.partial" for n in ("busy", "new"))])
    remove_leftovers(tmp_path, claimed=True)
    assert names(tmp_path) == [own.name]


def test_a_claim_is_held_by_one_process_and_free_when_it_is_killed(tmp_path: Path) -> None:
    code = f"""
import sys, time
from pathlib import Path
from shoestring.storage import claim
with claim(Path({str(tmp_path)!r})):
    print("held", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            refused = (
                rf"^{re.escape(str(tmp_path))}: process {holder.pid} on [\w-]+, "
                r"since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d.*, is training this run\. Wait until .* --name\.$"
            )
            with pytest.raises(CheckpointError, match=refused), claim(tmp_path):
                pass
        finally:
            holder.kill()
    with claim(tmp_path):
        pass


def test_a_claim_is_free_again_after_use_and_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stop"), claim(tmp_path / "run"):
        raise RuntimeError("stop")
    with (
        claim(tmp_path / "run"),
        claim(tmp_path / "another"),
        pytest.raises(CheckpointError, match=f"process {os.getpid()} on .* is training this run"),
        claim(tmp_path / "run"),
    ):
        pass
    with claim(tmp_path / "run"):
        (tmp_path / "run" / "recipe.yaml").touch()
    assert names(tmp_path / "run") == ["recipe.yaml"]


def test_a_folder_made_to_be_claimed_goes_again_where_nothing_came_of_it(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    for name in ("new", "old", "used"):
        with claim(tmp_path / name):
            if name == "used":
                (tmp_path / name / "recipe.yaml").touch()
    assert names(tmp_path) == ["old", "used"]


def test_a_file_system_without_locks_keeps_nobody_from_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with claim(tmp_path):
        pass


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


def test_what_a_library_wrote_for_its_owner_alone_gets_the_usual_mode(tmp_path: Path) -> None:
    """safetensors makes its files 0600, which would shut a team out of a shared run."""
    (tmp_path / "usual").touch()
    with atomic_path(tmp_path / "folder") as aside:
        aside.mkdir()
        (aside / "file").touch(mode=0o600)
    assert (tmp_path / "folder" / "file").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_claim_leaves_no_folder_that_it_made(tmp_path: Path) -> None:
    with claim(tmp_path / "runs" / "new"):
        assert (tmp_path / "runs" / "new").is_dir()
    assert list(tmp_path.iterdir()) == []
    with claim(tmp_path / "runs" / "new"):
        (tmp_path / "runs" / "new" / "recipe.yaml").touch()
    assert [path.name for path in (tmp_path / "runs" / "new").iterdir()] == ["recipe.yaml"]
