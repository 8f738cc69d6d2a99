"""Real processes killed at random moments, and damaged files: a little of what benchmarks/faults.py does."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from parts.faults_flips import Checkpoints, Stores
from parts.faults_jobs import Encoding, Training, make_jobs
from parts.faults_kills import Job, Unbroken, trial, unbroken
from parts.faults_malformed import World
from parts.faults_mistakes import mistakes
from parts.faults_processes import Server

SHORT = ("phases.0.images=56", "phases.1.images=48")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """Where commands are forked from."""
    with Server() as server:
        yield server


def reference(server: Server, job: Job, folder: Path) -> Unbroken:
    return unbroken(server, job, folder / "whole", random.Random(0))


def killed(
    server: Server, job: Job, folder: Path, *, trials: int, most: int = 4, whole: Unbroken | None = None
) -> int:
    """Kills of so many trials, after each of which everything held."""
    whole = whole or reference(server, job, folder)
    kills = 0
    for number in range(trials):
        tried = trial(server, job, whole, folder / f"{number}", random.Random(number), most)
        assert tried.problems == [], tried.log
        kills += sum(tried.kills.values())
    return kills


def survived(attempt: Callable[[Path, random.Random], Sequence[str]], folder: Path, count: int) -> None:
    folder.mkdir()
    for number in range(count):
        assert attempt(folder / f"{number}", random.Random(number)) == [], number


@pytest.mark.parametrize("background", ["false", "true"])
def test_a_killed_training_ends_bit_for_bit_as_if_never_killed(
    server: Server, tmp_path: Path, background: str
) -> None:
    job = Training("train", (*SHORT, f"train.async_checkpoints={background}"))
    assert killed(server, job, tmp_path, trials=2) >= 2


def test_a_killed_training_on_two_processes_ends_bit_for_bit_as_if_never_killed(
    server: Server, tmp_path: Path
) -> None:
    job = Training("train", (*SHORT, "parallel.kind=fsdp2"), processes=2)
    assert killed(server, job, tmp_path, trials=1, most=1) == 1


def test_a_killed_encoding_ends_byte_for_byte_as_if_never_killed_and_encodes_no_chunk_twice(
    server: Server, tmp_path: Path
) -> None:
    words = ("encode", "scenes", "--images", "32", "--held-out", "8", "--size", "16", "--chunk-rows", "8")
    job = Encoding("encode", (*words, "--out", "store"), workers=2)
    assert killed(server, job, tmp_path, trials=5) >= 5


def test_damage_to_the_newest_checkpoint_is_found_and_the_one_before_leads_to_the_same_end(
    server: Server, tmp_path: Path
) -> None:
    job = Training("train", SHORT)
    damaged = Checkpoints(server, job, reference(server, job, tmp_path), tmp_path / "checkpoints")
    damaged.prepare()
    survived(damaged.found, tmp_path / "found", 80)
    survived(damaged.survived, tmp_path / "survived", 2)


def test_damage_to_any_file_of_a_store_is_named_and_never_read_as_if_nothing_were_wrong(
    server: Server, tmp_path: Path
) -> None:
    damaged = Stores(server, tmp_path / "stores")
    damaged.prepare()
    survived(damaged.found, tmp_path / "found", 20)
    survived(damaged.survived, tmp_path / "survived", 60)


@pytest.mark.slow
@pytest.mark.parametrize("group", [0, 1, 2], ids=["training", "training on 2 processes", "encoding"])
def test_everything_that_is_killed_often_ends_as_if_never_killed(
    server: Server, tmp_path: Path, group: int
) -> None:
    for number, job in enumerate(make_jobs(server, tmp_path / "ready")[group]):
        kills = killed(server, job, tmp_path / f"{number}", trials=3 if group == 1 else 12)
        assert kills > 1, job.name


@pytest.mark.slow
def test_malformed_input_is_refused_in_one_line_and_changes_no_file(server: Server, tmp_path: Path) -> None:
    world = World(server, tmp_path / "world")
    world.prepare()
    for number, mistake in enumerate(mistakes()):
        assert world.mistake(tmp_path / f"{number}", mistake) == [], mistake
    survived(world.junk_key, tmp_path / "keys", 100)
    survived(world.junk_bytes, tmp_path / "bytes", 100)


@pytest.mark.gpu
def test_a_killed_training_on_a_gpu_ends_bit_for_bit_as_if_never_killed(
    server: Server, tmp_path: Path
) -> None:
    assert killed(server, Training("train", device="cuda"), tmp_path, trials=5) >= 5
