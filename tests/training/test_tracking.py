"""Where figures go: a file that no stop can spoil, TensorBoard, wandb, and one line for people."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shoestring.errors import OutputError, RecipeError
from shoestring.training import tracking
from shoestring.training.tracking import Console, JsonLines, TensorBoard, Trackers, Wandb, clock, flops_text


def train(images: int, loss: float = 0.5, **more: Any) -> dict[str, Any]:
    rate = {"images_per_second": 100.0, "flops": 2e12, "phase": "dense"}
    return {"kind": "train", "images": images, "loss": loss, **rate, **more}


def event(images: int, text: str) -> dict[str, Any]:
    return {"kind": "event", "images": images, "text": text}


def held_out(images: int) -> dict[str, Any]:
    figures = {"loss": 0.25, "by_noise": {"-3.0": 0.125, "1.0": 0.375}}
    return {"kind": "held_out", "images": images, **figures, "experts": {"patch_mixer.1": {"unused": 0.5}}}


def preview(run: Path, images: int) -> dict[str, Any]:
    """A record of a picture, which is drawn too: red of this many images' brightness."""
    file = f"previews/{images:09d}.png"
    (run / "previews").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), (images, 0, 0)).save(run / file)
    return {"kind": "preview", "images": images, "file": file}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def killed(code: str) -> None:
    """Run code that kills its own process the hard way."""
    variables = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables)
    assert done.returncode == -signal.SIGKILL, done.stderr


# --- metrics.jsonl ---------------------------------------------------------------------------------------


def test_each_record_is_a_line(tmp_path: Path) -> None:
    tracker = JsonLines(tmp_path / "run" / "metrics.jsonl")
    records = [event(0, "phase größer"), train(48), held_out(48), train(96)]
    for record in records:
        tracker.log(record)
    assert lines(tmp_path / "run/metrics.jsonl") == records == list(tracker.records())


def test_a_resumed_run_writes_nothing_twice_and_drops_what_it_does_again(tmp_path: Path) -> None:
    """Stopped after the checkpoint at 96: its own lines stay, later ones and a half-written one go."""
    path = tmp_path / "metrics.jsonl"
    first = JsonLines(path)
    for record in (event(0, "phase one"), train(48), train(96), event(96, "phase two"), train(144)):
        first.log(record)
    with open(path, "a") as file:
        file.write('{"kind": "train", "ima')
    resumed = JsonLines(path, images=96)
    assert [record["images"] for record in resumed.records()] == [0, 48, 96, 96]
    for record in (event(96, "phase two"), train(144, loss=0.25)):
        resumed.log(record)
    assert [(record["kind"], record["images"]) for record in lines(path)] == [
        ("event", 0),
        ("train", 48),
        ("train", 96),
        ("event", 96),
        ("train", 144),
    ]
    assert lines(path)[-1]["loss"] == 0.25


def test_a_figure_that_is_met_again_later_is_a_figure_of_its_own(tmp_path: Path) -> None:
    """Only events are passed over when they are met again: their text says nothing new."""
    tracker = JsonLines(tmp_path / "metrics.jsonl")
    tracker.log(train(48))
    resumed = JsonLines(tmp_path / "metrics.jsonl", images=48)
    resumed.log(train(48))
    assert lines(tmp_path / "metrics.jsonl") == [train(48), train(48)]


def test_a_file_cut_at_any_byte_is_read_up_to_there(tmp_path: Path) -> None:
    """Within a character of several bytes too, and right before the end of a line."""
    path = tmp_path / "metrics.jsonl"
    first, last = (event(48, f"größer \N{LINE SEPARATOR} \N{GRINNING FACE} {text}") for text in "ab")
    JsonLines(path).log(first)
    start = path.stat().st_size
    JsonLines(path, images=48).log(last)
    whole = path.read_bytes()
    for end in range(start, len(whole)):
        path.write_bytes(whole[:end])
        resumed = JsonLines(path, images=48)
        assert list(resumed.records()) == [first, last][: 1 + (end == len(whole) - 1)]
        resumed.log(last)
        assert path.read_bytes() == whole


def test_killed_while_the_file_is_rewritten_nothing_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for images in range(0, 9600, 48):
        JsonLines(path, images=images).log(train(images))
    before = path.read_bytes()
    killed(f"""
import os, signal
from pathlib import Path
from shoestring.training.tracking import JsonLines
os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)
JsonLines(Path({str(path)!r}), images=4800)
""")
    assert path.read_bytes() == before
    assert len(list(JsonLines(path, images=4800).records())) == 101


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **named: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    tracker = JsonLines(tmp_path / "metrics.jsonl")
    monkeypatch.setattr("builtins.open", full)
    with pytest.raises(OutputError, match=r"metrics\.jsonl: the disk is full"):
        tracker.log(train(48))


# --- TensorBoard -----------------------------------------------------------------------------------------


def events_in(folder: Path) -> Any:
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    read = loader.EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    read.Reload()
    return read


def test_tensorboard_gets_every_number_by_images_and_the_previews(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    tracker = Trackers([TensorBoard(tmp_path / "tensorboard")])
    tracker.log(event(0, "a text is no number"))
    tracker.log(train(48, loss=0.5, by_noise={"-2": 0.75}))
    tracker.log(train(96, loss=0.25))
    tracker.log(preview(tmp_path, 96))
    tracker.log(held_out(96))
    tracker.close()
    read = events_in(tmp_path / "tensorboard")
    assert [(e.step, e.value) for e in read.Scalars("train/loss")] == [(48, 0.5), (96, 0.25)]
    assert [(e.step, e.value) for e in read.Scalars("train/by_noise/-2")] == [(48, 0.75)]
    assert [(e.step, e.value) for e in read.Scalars("held_out/experts/patch_mixer.1/unused")] == [(96, 0.5)]
    assert set(read.Tags()["scalars"]) == {
        *("train/loss", "train/images_per_second", "train/flops", "train/by_noise/-2"),
        *("held_out/loss", "held_out/by_noise/-3.0", "held_out/by_noise/1.0"),
        "held_out/experts/patch_mixer.1/unused",
    }
    (picture,) = read.Images("preview")
    pixels = np.asarray(Image.open(io.BytesIO(picture.encoded_image_string)))
    assert picture.step == 96
    assert pixels.shape == (4, 6, 3)
    assert (pixels == (96, 0, 0)).all()


def test_tensorboard_loses_nothing_when_killed_and_shows_nothing_twice_when_resumed(tmp_path: Path) -> None:
    """Killed after 192 images, resumed from a checkpoint at 96 with other figures from there on."""
    pytest.importorskip("tensorboard")
    folder = tmp_path / "tensorboard"
    killed(f"""
import os, signal
from pathlib import Path
from shoestring.training.tracking import TensorBoard
tracker = TensorBoard(Path({str(folder)!r}))
for images in (48, 96, 144, 192):
    tracker.log({{"kind": "train", "images": images, "loss": images}})
os.kill(os.getpid(), signal.SIGKILL)
""")
    assert [e.step for e in events_in(folder).Scalars("train/loss")] == [48, 96, 144, 192]
    (first,) = folder.iterdir()
    first.rename(first.with_name(re.sub(r"\d{10}", "1700000000", first.name)))  # begun before this second
    resumed = TensorBoard(folder, images=96)
    for images in (144, 240):
        resumed.log({"kind": "train", "images": images, "loss": -images})
    resumed.close()
    shown = [(e.step, e.value) for e in events_in(folder).Scalars("train/loss")]
    assert shown == [(48, 48), (96, 96), (144, -144), (240, -240)]


# --- wandb -----------------------------------------------------------------------------------------------


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A run folder, with wandb set to keep to this machine."""
    wandb = pytest.importorskip("wandb")
    for name, value in {"MODE": "offline", "SILENT": "true", "CONSOLE": "off", "DISABLE_GIT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    yield tmp_path / "run"
    wandb.teardown()  # or it would keep to these settings


def rows_in(folder: Path) -> list[dict[str, Any]]:
    """The rows of history in the one .wandb file below a folder: LevelDB's log of protobuf records."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.resolve().glob("*.wandb")
    data, at, record, rows = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            history = Record.FromString(record).history.item
            record = b""
            if history:
                rows.append(
                    {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in history}
                )
    return [
        {key: value for key, value in row.items() if key not in ("_timestamp", "_runtime")} for row in rows
    ]


def arrived(folder: Path, count: int) -> list[dict[str, Any]]:
    """The rows, once so many are there: wandb's own process may write the last ones a moment later."""
    deadline = time.monotonic() + 60
    while len(rows := rows_in(folder)) < count and time.monotonic() < deadline:
        time.sleep(0.2)
    return rows


def latest(run: Path) -> Path:
    return run / "wandb/wandb/latest-run"


def test_wandb_gets_every_number_by_images_and_the_previews(offline: Path) -> None:
    tracker = Wandb(offline / "wandb", "demo", {"seed": 3})
    tracker.log(event(0, "a text is no number"))
    tracker.log(train(48, loss=0.5, by_noise={"-2": 0.75}))
    tracker.log(train(96, loss=0.25))
    tracker.log(preview(offline, 96))
    tracker.log(held_out(96))
    assert tracker.run.config["seed"] == 3
    tracker.close()
    first, second = arrived(latest(offline), 2)
    rate = {"train/images_per_second": 100.0, "train/flops": 2e12}
    assert first == {"_step": 48, "images": 48, "train/loss": 0.5, "train/by_noise/-2": 0.75, **rate}
    assert Image.open(latest(offline) / "files" / second["preview/path"]).size == (6, 4)
    second = {key: value for key, value in second.items() if not key.startswith("preview/")}
    levels = {"held_out/by_noise/-3.0": 0.125, "held_out/by_noise/1.0": 0.375}
    losses = {"train/loss": 0.25, "held_out/loss": 0.25, "held_out/experts/patch_mixer.1/unused": 0.5}
    assert second == {"_step": 96, "images": 96, **losses, **levels, **rate}


def test_a_resumed_wandb_run_is_the_same_one_and_its_newest_folder_holds_it_whole(offline: Path) -> None:
    """Killed after 192 images, so that wandb lost some; resumed from a checkpoint at 96."""
    path = offline / "metrics.jsonl"
    killed(f"""
import os, signal
from pathlib import Path
from shoestring.training.tracking import JsonLines, Trackers, Wandb
trackers = Trackers([JsonLines(Path({str(path)!r})), Wandb(Path({str(offline / "wandb")!r}), "demo")])
for images in (48, 96, 144, 192):
    trackers.log({{"kind": "train", "images": images, "loss": images}})
os.kill(os.getpid(), signal.SIGKILL)
""")
    first = latest(offline).resolve()
    kept = JsonLines(path, images=96)
    resumed = Wandb(offline / "wandb", "demo", kept=kept.records())
    for images in (144, 240):
        resumed.log({"kind": "train", "images": images, "loss": -images})
    resumed.close()
    assert latest(offline).resolve() != first
    assert first.name.split("-")[-1] == resumed.run.id == (offline / "wandb/id.txt").read_text()
    rows = [(row["_step"], row["train/loss"]) for row in arrived(latest(offline), 4)]
    assert rows == [(48, 48), (96, 96), (144, -144), (240, -240)]


def test_a_resumed_wandb_run_tells_the_server_only_what_it_has_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the run up to 48 images: what was lost on the way, up to the checkpoint at 144, is told."""
    told: list[Any] = []

    def log(row: dict[str, Any], step: int) -> None:
        told.append((step, row))

    run = SimpleNamespace(log=log, starting_step=49, define_metric=lambda *names, **more: None)
    fake = SimpleNamespace(init=lambda **named: told.append(named) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    kept = [{"kind": "train", "images": images, "loss": 0.5} for images in (48, 96, 144)]
    tracker = Wandb(tmp_path, "demo", kept=kept)
    tracker.log({"kind": "train", "images": 192, "loss": 0.5})
    asked = told[0]
    assert (asked["project"], asked["name"], asked["resume"]) == ("mine", "demo", "allow")
    assert told[1:] == [(images, {"train/loss": 0.5, "images": images}) for images in (96, 144, 192)]


def test_wandb_without_a_login_is_one_clear_line(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    with pytest.raises(
        RecipeError, match=r"wandb does not start: .*\. Run wandb login, or set WANDB_MODE=off"
    ):
        Wandb(offline / "wandb", "demo")


@pytest.mark.parametrize(("tracker", "extra"), [(TensorBoard, "tensorboard"), (Wandb, "wandb")])
def test_one_that_is_not_installed_says_how_to_install_it(
    tracker: Any, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(RecipeError, match=rf"pip install 'shoestring\[{extra}\]'"):
        tracker(tmp_path, "name")


# --- console ---------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self) -> bool:
        return True


def test_the_console_shows_what_people_want_to_know(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    console = Console(total=10_000)
    console.log(event(0, "phase dense: 10,000 images"))
    console.log(train(4_000))
    console.log(train(4_100))  # too soon for a second line
    console.log(train(10_000, memory_bytes=3 * 2**29, data_wait=0.04))
    told = capsys.readouterr().err.splitlines()
    assert told == [
        "         0 images  phase dense: 10,000 images",
        "     4,000 images  40%  dense  loss 0.5000  100 images/s  1:00 left  2 TFLOP",
        "    10,000 images 100%  dense  loss 0.5000  100 images/s  0:00 left  2 TFLOP  1.5 GiB",
    ]


def test_steps_that_wait_for_data_are_told_and_the_line_stays_short(
    capsys: pytest.CaptureFixture[str],
) -> None:
    console = Console(total=500_000_000, seconds=0)
    console.log(train(499_990_000, data_wait=0.23))
    slow = {"data_wait": 0.4, "memory_bytes": 2**37, "images_per_second": 12_345.0, "flops": 2.34e20}
    console.log(train(450_000_000, phase="masked-256", **slow))
    short, long = capsys.readouterr().err.splitlines()
    assert short.endswith("1:40 left  data wait 23%  2 TFLOP")
    assert long.endswith("12,345 images/s  1:07:30 left  data wait 40%")
    assert len(long) <= 100


def test_on_a_terminal_the_line_is_rewritten_and_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(tracking.sys, "stderr", terminal)
    console = Console(total=100)
    console.log(train(48, loss=123.0))
    console.log(train(96))
    console.close()
    first, second, cleared = terminal.getvalue().split("\r")[1:]
    assert "\n" not in first + second
    assert len(second) == len(first), "nothing of the longer line is left"
    assert cleared.isspace()
    assert cleared.endswith("\n")
    console.log(train(100))
    before = terminal.getvalue()
    console.close()
    assert terminal.getvalue() == before, "the last line was ended already"


def test_on_a_narrow_terminal_the_line_does_not_wrap(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(tracking.sys, "stderr", terminal)
    monkeypatch.setattr(tracking.shutil, "get_terminal_size", lambda fallback: os.terminal_size((72, 24)))
    Console(total=100).log(train(48))
    assert terminal.getvalue() == "\r        48 images  48%  dense  loss 0.5000  100 images/s  0:01 left"


@pytest.mark.parametrize(
    ("seconds", "text"), [(8.6, "0:09"), (754, "12:34"), (3723, "1:02:03"), (59.7, "1:00")]
)
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


@pytest.mark.parametrize(
    ("flops", "text"), [(3.2e15, "3.2 PFLOP"), (12.0, "12 FLOP"), (4.56e9, "4.56 GFLOP")]
)
def test_flops_text(flops: float, text: str) -> None:
    assert flops_text(flops) == text
