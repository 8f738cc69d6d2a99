"""`shoestring train` on several processes: exact resume, other numbers of processes, one voice in failure."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shoestring import load

SETS = (
    "parallel.kind=fsdp2",
    "train.preview_every=192",
    "model.num_experts=4",
    "model.depth=2",
    "optimizer.kind=muon",
)
Launch = Callable[..., list[subprocess.CompletedProcess[str]]]


def words(tiny: Path, *more: str, sets: tuple[str, ...] = SETS) -> list[str]:
    return ["-m", "shoestring", "train", str(tiny), *(w for s in sets for w in ("--set", s)), *more]


def ended(done: list[subprocess.CompletedProcess[str]]) -> list[int]:
    return [each.returncode for each in done]


def outcome(run: Path, metrics: Callable[[Path], Any]) -> tuple[Any, dict[str, str]]:
    """What a run came to: its records without clocks, and hashes of its pictures and weights."""
    weights = [*(run / "pipeline" / "transformer").glob("*.safetensors"), *(run / "previews").glob("*.png")]
    return metrics(run), {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in weights}


def uncommit_after(run: Path, images: int) -> None:
    """As if the run had been killed after so many images."""
    for path in (run / "checkpoints").glob("[0-9]*"):
        if int(path.name) > images:
            (path / "COMMITTED").unlink()


@pytest.fixture(scope="module")
def whole(launch: Launch, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an unbroken sharded run of two processes; every checkpoint is kept."""
    folder = tmp_path_factory.mktemp("whole")
    done = launch(2, *words(tiny, "--set", "train.keep=9"), cwd=folder)
    assert ended(done) == [0, 0], done[0].stderr
    assert "Pipeline in" in done[0].stdout
    assert done[1].stdout + done[1].stderr == "", "the main process alone speaks"
    return folder


@pytest.fixture
def broken(whole: Path, tmp_path: Path) -> Path:
    """A copy of it, as it was after 96 images of its first phase."""
    shutil.copytree(whole, tmp_path / "broken")
    uncommit_after(tmp_path / "broken" / "runs" / "tiny", 96)
    return tmp_path / "broken"


def test_a_sharded_run_exports_one_pipeline_and_resumes_exactly(
    whole: Path, broken: Path, launch: Launch, tiny: Path, metrics: Callable[[Path], Any]
) -> None:
    """Muon, experts, averages: all in shards; records, previews and weights equal an unbroken run's."""
    again = launch(2, *words(tiny, "--set", "train.keep=9", "--resume"), cwd=broken)
    assert ended(again) == [0, 0], again[0].stderr
    assert "Resuming runs/tiny after 96 images" in again[0].stderr
    assert outcome(whole / "runs" / "tiny", metrics) == outcome(broken / "runs" / "tiny", metrics)
    picture = load(whole / "runs" / "tiny")("a red circle", num_inference_steps=2).images[0]
    assert picture.size == (32, 32)
    ledger = json.loads((whole / "runs" / "tiny" / "ledger.json").read_text())
    assert ledger["processes"] == 2
    assert ledger["total"]["images"] == 384


@pytest.mark.parametrize("processes", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_run_of_two_processes_goes_on_with_another_number(
    whole: Path, broken: Path, launch: Launch, tiny: Path, metrics: Callable[[Path], Any], processes: int
) -> None:
    """The same images in the same order; losses equal to rounding, of which experts and Muon make more."""
    done = launch(processes, *words(tiny, "--set", "train.keep=9", "--resume"), cwd=broken)
    assert ended(done) == [0] * processes, done[0].stderr
    ours, theirs = metrics(broken / "runs" / "tiny"), metrics(whole / "runs" / "tiny")
    assert [record["images"] for record in ours] == [record["images"] for record in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one.get("loss", 0.0) == pytest.approx(other.get("loss", 0.0), rel=0.02), one["images"]


def test_ddp_in_the_background_resumes_exactly(
    launch: Launch, tiny: Path, tmp_path: Path, metrics: Callable[[Path], Any]
) -> None:
    sets = ("train.async_checkpoints=true", "train.keep=9")
    outcomes = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        done = launch(2, *words(tiny, sets=sets), cwd=tmp_path / name)
        assert ended(done) == [0, 0], done[0].stderr
        if name == "two":
            uncommit_after(tmp_path / name / "runs" / "tiny", 192)  # between the phases
            done = launch(2, *words(tiny, "--resume", sets=sets), cwd=tmp_path / name)
            assert ended(done) == [0, 0], done[0].stderr
        outcomes.append(outcome(tmp_path / name / "runs" / "tiny", metrics))
    assert outcomes[0] == outcomes[1]


def test_a_mistake_is_said_once(launch: Launch, tiny: Path, tmp_path: Path) -> None:
    done = launch(2, *words(tiny, "--set", "phases.0.batch=1", sets=()), cwd=tmp_path)
    assert ended(done) == [2, 2]
    said = [line for each in done for line in each.stderr.splitlines() if line.startswith("error:")]
    assert len(said) == 1
    assert "cannot be shared among 2 processes" in said[0]
    assert "Traceback" not in done[0].stderr + done[1].stderr


def test_one_process_that_fails_ends_all_and_alone_says_why(
    launch: Launch, tiny: Path, tmp_path: Path
) -> None:
    """Process 1 finds a damaged shard; process 0, which waits for it, ends without a word."""
    script = tmp_path / "job.py"
    script.write_text(
        "import os, sys\n"
        "from shoestring.cli.main import main\n"
        "from shoestring.data.loader import Loader\n"
        "from shoestring.errors import CorruptStoreError\n"
        "batch = Loader.batch\n"
        "def broken(self, start, stop):\n"
        "    if self.rank == 1 and start >= 96 and not self.captions:\n"
        "        raise CorruptStoreError('columns/text/00000.safetensors is damaged.')\n"
        "    return batch(self, start, stop)\n"
        "Loader.batch = broken\n"
        "main(sys.argv[1:])\n"
    )
    done = launch(2, script, *words(tiny, sets=())[2:], cwd=tmp_path)
    assert all(code not in (0, None) for code in ended(done))
    assert done[1].returncode == 2
    said = [line for each in done for line in each.stderr.splitlines() if line.startswith("error:")]
    assert said == ["error: process 1: columns/text/00000.safetensors is damaged."]
    assert "Traceback" not in done[0].stderr + done[1].stderr


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_process_that_is_killed_is_missed_in_one_line(
    launch: Launch, tiny: Path, tmp_path: Path, victim: int
) -> None:
    """Also where the first one goes, which the others would ask who failed first."""
    script = tmp_path / "job.py"
    script.write_text(
        "import os, signal, sys\n"
        "from shoestring.cli.main import main\n"
        "from shoestring.training.loop import Training\n"
        "step = Training.step\n"
        "def dying(self, phase, batch):\n"
        f"    if self.world.rank == {victim} and self.progress.images >= 120:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return step(self, phase, batch)\n"
        "Training.step = dying\n"
        "main(sys.argv[1:])\n"
    )
    done = launch(2, script, *words(tiny, "--set", "train.async_checkpoints=true", sets=())[2:], cwd=tmp_path)
    assert done[victim].returncode == -signal.SIGKILL
    other = done[1 - victim]
    said = [line for line in other.stderr.splitlines() if line.startswith("error:")]
    assert other.returncode == 1
    assert len(said) == 1
    assert "Traceback" not in other.stderr
    assert f"process {1 - victim} of 2 lost another one, which was killed" in said[0]


@pytest.mark.slow
def test_torchrun_trains_stops_on_a_signal_and_goes_on(
    tiny: Path, tmp_path: Path, metrics: Callable[[Path], Any]
) -> None:
    """The command of docs/cluster.md; SIGTERM to torchrun reaches all, and all stop after the same step."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, *words(tiny, "--set", "phases.0.images=4800")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    log = tmp_path / "log"
    with open(log, "w") as file:
        running = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=file, stdout=file)
        checkpoints = tmp_path / "runs" / "tiny" / "checkpoints"
        deadline = time.monotonic() + 120
        while not list(checkpoints.glob("[0-9]*")):
            assert running.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        running.send_signal(signal.SIGTERM)
        assert running.wait(timeout=60) != 0
    assert "a checkpoint is saved" in log.read_text()
    done = subprocess.run(
        [*torchrun, *words(tiny, "--set", "phases.0.images=4800", "--resume")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert metrics(tmp_path / "runs" / "tiny")[-1]["images"] == 4992
