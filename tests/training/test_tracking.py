"""Where figures go: a file that no stop can spoil, TensorBoard, wandb, and one line for people."""

from __future__ import annotations

import errno
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shoestring.errors import OutputError, RecipeError
from shoestring.training import tracking
from shoestring.training.tracking import Console, JsonLines, TensorBoard, Trackers, Wandb, clock, flops_text


def train(images: int, loss: float = 0.5, **more: Any) -> dict[str, Any]:
    rate = {"images_per_second": 100.0, "flops": 2e12, "phase": "dense"}
    return {"kind": "train", "images": images, "loss": loss, **rate, **more}


def event(images: int, text: str) -> dict[str, Any]:
    return {"kind": "event", "images": images, "text": text}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_each_record_is_a_line(tmp_path: Path) -> None:
    tracker = JsonLines(tmp_path / "run" / "metrics.jsonl")
    records = [event(0, "phase größer"), train(48), train(96)]
    for record in records:
        tracker.log(record)
    assert lines(tmp_path / "run/metrics.jsonl") == records


def test_a_resumed_run_writes_nothing_twice_and_drops_what_it_does_again(tmp_path: Path) -> None:
    """Stopped after the checkpoint at 96: its own lines stay, later ones and a half-written one go."""
    path = tmp_path / "metrics.jsonl"
    first = JsonLines(path)
    for record in (event(0, "phase one"), train(48), train(96), event(96, "phase two"), train(144)):
        first.log(record)
    with open(path, "a") as file:
        file.write('{"kind": "train", "ima')
    resumed = JsonLines(path, images=96)
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


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **named: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    tracker = JsonLines(tmp_path / "metrics.jsonl")
    monkeypatch.setattr("builtins.open", full)
    with pytest.raises(OutputError, match=r"metrics\.jsonl: the disk is full"):
        tracker.log(train(48))


def test_tensorboard_gets_every_number_by_images(tmp_path: Path) -> None:
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tracker = Trackers([TensorBoard(tmp_path / "tb")])
    tracker.log(event(0, "a text is no number"))
    tracker.log(train(48, loss=0.5))
    tracker.log(train(96, loss=0.25))
    tracker.close()
    read = loader.EventAccumulator(str(tmp_path / "tb"))
    read.Reload()
    assert [(e.step, e.value) for e in read.Scalars("train/loss")] == [(48, 0.5), (96, 0.25)]
    assert set(read.Tags()["scalars"]) == {"train/loss", "train/images_per_second", "train/flops"}


def test_wandb_gets_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    run = SimpleNamespace(log=told.append, finish=lambda: told.append("finished"))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **named: told.append(named) or run))
    tracker = Wandb(tmp_path, "demo")
    tracker.log(train(48))
    tracker.close()
    assert told[0]["name"] == "demo"
    rate = {"train/images_per_second": 100.0, "train/flops": 2e12}
    assert told[1:] == [{"train/loss": 0.5, **rate, "images": 48}, "finished"]


@pytest.mark.parametrize(("tracker", "extra"), [(TensorBoard, "tensorboard"), (Wandb, "wandb")])
def test_one_that_is_not_installed_says_how_to_install_it(
    tracker: Any, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(RecipeError, match=rf"pip install 'shoestring\[{extra}\]'"):
        tracker(tmp_path, "name")


def test_the_console_shows_what_people_want_to_know(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    console = Console(total=10_000)
    console.log(event(0, "phase dense: 10,000 images"))
    console.log(train(4_000))
    console.log(train(4_100))  # too soon for a second line
    console.log(train(10_000))
    told = capsys.readouterr().err.splitlines()
    assert told == [
        "         0 images  phase dense: 10,000 images",
        "     4,000 images  40%  dense  loss 0.5000  100 images/s  1:00 left  2 TFLOP",
        "    10,000 images 100%  dense  loss 0.5000  100 images/s  0:00 left  2 TFLOP",
    ]


def test_on_a_terminal_the_line_is_rewritten_and_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

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
