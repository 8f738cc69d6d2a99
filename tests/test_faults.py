"""Real processes killed at random moments, and damaged files: a little of what benchmarks/faults.py does."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from parts.faults_flips import Checkpoints, Stores
from parts.faults_jobs import Encoding, Training, make_jobs
from parts.faults_kills import Job, Unbroken, trial, unbroken
from parts.faults_malformed import World
from parts.faults_mistakes import mistakes
from parts.faults_processes import Server

SHORT = ("phases.0.images=56", "phases.1.images=48")


@dataclass
class Bench:
    """Where commands are forked from, and what jobs leave that are never killed."""

    server: Server
    folder: Path
    whole: dict[Job, Unbroken] = field(default_factory=dict)

    def unbroken(self, job: Job) -> Unbroken:
        if job not in self.whole:
            self.whole[job] = unbroken(self.server, job, self.folder / f"{len(self.whole)}", random.Random(0))
        return self.whole[job]

    def killed(self, job: Job, folder: Path, *, enough: int, most: int = 4) -> None:
        """Kill a job at least so many times, up to `most` of them on its way to one end; all must hold."""
        kills = 0
        for number in range(5 * enough):  # a job may end before it is killed
            place, chance = folder / f"{number}", random.Random(number)
            tried = trial(self.server, job, self.unbroken(job), place, chance, most)
            assert tried.problems == [], tried.log
            shutil.rmtree(place)
            kills += sum(tried.kills.values())
            if kills >= enough:
                return
        pytest.fail(f"{job.name}: only {kills} kills")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with Server() as server:
        yield Bench(server, tmp_path_factory.mktemp("unbroken"))


def survived(attempt: Callable[[Path, random.Random], Sequence[str]], folder: Path, count: int) -> None:
    folder.mkdir()
    for number in range(count):
        assert attempt(folder / f"{number}", random.Random(number)) == [], number
        shutil.rmtree(folder / f"{number}")


@pytest.mark.parametrize("background", ["false", "true"])
def test_a_killed_training_ends_bit_for_bit_as_if_never_killed(
    bench: Bench, tmp_path: Path, background: str
) -> None:
    job = Training("train", (*SHORT, f"train.async_checkpoints={background}"))
    bench.killed(job, tmp_path, enough=3)


def test_a_killed_training_on_two_processes_ends_bit_for_bit_as_if_never_killed(
    bench: Bench, tmp_path: Path
) -> None:
    job = Training("train", (*SHORT, "parallel.kind=fsdp2"), processes=2)
    bench.killed(job, tmp_path, enough=1, most=1)


def test_a_killed_encoding_ends_byte_for_byte_as_if_never_killed_and_encodes_no_chunk_twice(
    bench: Bench, tmp_path: Path
) -> None:
    words = ("encode", "scenes", "--images", "32", "--held-out", "8", "--size", "16", "--chunk-rows", "8")
    job = Encoding("encode", (*words, "--out", "store"), workers=2)
    bench.killed(job, tmp_path, enough=10)


def test_damage_to_the_newest_checkpoint_is_found_and_the_one_before_leads_to_the_same_end(
    bench: Bench, tmp_path: Path
) -> None:
    job = Training("train", (*SHORT, "train.async_checkpoints=false"))
    damaged = Checkpoints(bench.server, job, bench.unbroken(job), tmp_path / "checkpoints")
    damaged.prepare()
    survived(damaged.found, tmp_path / "found", 80)
    survived(damaged.survived, tmp_path / "survived", 1)


def test_damage_to_any_file_of_a_store_is_named_and_never_read_as_if_nothing_were_wrong(
    bench: Bench, tmp_path: Path
) -> None:
    damaged = Stores(bench.server, tmp_path / "stores")
    damaged.prepare()
    survived(damaged.found, tmp_path / "found", 20)
    survived(damaged.survived, tmp_path / "survived", 60)


@pytest.mark.slow
@pytest.mark.parametrize("group", [0, 1, 2], ids=["training", "training on 2 processes", "encoding"])
def test_everything_that_is_killed_often_ends_as_if_never_killed(
    bench: Bench, tmp_path: Path, group: int
) -> None:
    for number, job in enumerate(make_jobs(bench.server, tmp_path / "ready")[group]):
        bench.killed(job, tmp_path / f"{number}", enough=5 if group == 1 else 20)


@pytest.mark.slow
def test_malformed_input_is_refused_in_one_line_and_changes_no_file(bench: Bench, tmp_path: Path) -> None:
    world = World(bench.server, tmp_path / "world")
    world.prepare()
    for number, mistake in enumerate(mistakes()):
        assert world.mistake(tmp_path / f"{number}", mistake) == [], mistake
        shutil.rmtree(tmp_path / f"{number}")
    survived(world.junk_key, tmp_path / "keys", 100)
    survived(world.junk_bytes, tmp_path / "bytes", 100)


@pytest.mark.gpu
def test_a_killed_training_on_a_gpu_ends_bit_for_bit_as_if_never_killed(bench: Bench, tmp_path: Path) -> None:
    bench.killed(Training("train", device="cuda"), tmp_path, enough=8)
