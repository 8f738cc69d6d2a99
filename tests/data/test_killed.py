"""SIGKILL at random moments: nothing finished is done again, nothing is lost, and the bytes are the same."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shoestring.data.store import Store
from shoestring.storage import sha256

SCENES = ["encode", "scenes", "--images", "800", "--held-out", "30", "--chunk-rows", "40"]
LIMIT = 120  # seconds


def hashes(store: Path) -> dict[str, str]:
    """Of shards, markers and settings: all but the manifest and the time spent."""
    folders = ("columns", "chunks", "added", "begun.json", "skipped.jsonl")
    files = [
        path for name in folders for path in [store / name, *(store / name).rglob("*")] if path.is_file()
    ]
    return {path.relative_to(store).as_posix(): sha256(path) for path in files}


def finished(store: Path) -> dict[Path, int]:
    """Each finished chunk's files, by their time of change."""
    markers = [path for path in store.glob("chunks/**/*.json") if not path.name.startswith(".")]
    return {path: path.stat().st_mtime_ns for path in markers}


def killed_until_done(words: list[str], store: Path, kills: int) -> int:
    """Start a command again and again, killing it a random time after it began to work; how often it was."""
    moments, count = random.Random(kills), 0
    while True:
        before = finished(store)
        process = subprocess.Popen([sys.executable, "-m", "shoestring", *words], stdout=subprocess.DEVNULL)
        limit = time.monotonic() + LIMIT
        while process.poll() is None and count < kills and time.monotonic() < limit:
            if len(finished(store)) > len(before):  # it works
                time.sleep(moments.uniform(0, 0.15))
                process.send_signal(signal.SIGKILL)
                count += process.wait() == -signal.SIGKILL
        assert process.wait(LIMIT) in (0, -signal.SIGKILL)
        after = finished(store)
        assert before.items() <= after.items(), "a finished chunk was written again"
        if process.returncode == 0:
            return count


@pytest.mark.slow
def test_encoding_and_adding_killed_at_random_moments_give_the_same_bytes(tmp_path: Path) -> None:
    """The real commands: int8 text, then a size added; compared with both left alone."""
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    kills = 0
    for store, count in ((broken, 3), (whole, 0)):
        encode = [*SCENES, "--text-dtype", "int8", "--out", str(store)]
        kills += killed_until_done(encode, store, count)
        kills += killed_until_done(["store", "add", str(store), "--size", "48"], store, count)
    assert kills >= 2, "this machine is too quick: take more scenes"
    assert hashes(broken) == hashes(whole)
    assert not list(broken.rglob(".*.partial"))
    for store in (broken, whole):
        assert Store.open(store).verify().damaged == {}
    one, other = (Store.open(store).manifest for store in (broken, whole))
    assert sum(each["rows"] for each in other["work"]) == len(Store.open(whole))
    for manifest in (one, other):
        timed = [manifest, *manifest["added"].values()]
        assert all(each.pop("work") for each in timed)
        manifest.pop("sha256")
    assert one == other


@pytest.mark.slow
def test_two_workers_of_one_number_at_the_same_time_do_no_harm(tmp_path: Path) -> None:
    """Both encode the same chunks; each file is whole, and the same, whoever wrote it last."""
    both, one = tmp_path / "both", tmp_path / "one"
    twice = [
        subprocess.Popen([sys.executable, "-m", "shoestring", *SCENES, "--out", str(both)]) for _ in range(2)
    ]
    assert [process.wait(LIMIT) for process in twice] == [0, 0]
    subprocess.run([sys.executable, "-m", "shoestring", *SCENES, "--out", str(one)], check=True)
    assert hashes(both) == hashes(one)
    assert Store.open(both).verify().damaged == {}
    assert not list(both.rglob(".*.partial"))
