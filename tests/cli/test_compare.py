"""`shoestring compare`: one page and one table of runs that were really trained."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any


def test_two_real_runs_are_compared_on_one_page(here: Path, command: Any, tiny: Path) -> None:
    sets = ("--set", "seed=1", "--set", "phases.1.images=96", "--set", "phases.1.lr=4e-3")
    assert command("train", tiny, *sets, "--name", "other").code == 0
    assert command("evaluate", "runs/tiny").code == 0
    said = command("compare", "runs/tiny", "runs/other", "--out", "pages/both.html")
    assert said.code == 0
    lines = [line.split() for line in said.out.splitlines()]
    for expected in (
        ["A", "tiny", "B", "other"],
        ["seed", "0", "1"],
        ["phases.dense.images", "192", "96"],
        ["phases.dense.lr", "0.002", "0.004"],
        ["progress", "finished", "finished"],
        ["images", "384", "288"],
        ["Curves:", "pages/both.html"],
    ):
        assert expected in lines, said.out
    (score,) = [line for line in lines if line[:4] == ["scene", "accuracy,", "unseen", "scenes"]]
    assert score[-1] == "–", "only one of them was measured"
    page = (here / "pages/both.html").read_text()
    assert not re.search(r"https?:|//[a-z]|@import|<link|<script", page)
    for part in ("<svg", "Loss by computation", "Held-out loss", "log σ -1", "phases.dense.lr"):
        assert part in page, part


def test_what_cannot_be_compared_is_one_line(here: Path, command: Any) -> None:
    shutil.copytree("runs/tiny", "runs/copy")
    for runs, told in {
        ("runs/tiny",): "1 run to compare: give two to 8",
        ("runs/tiny", "runs/copy", "photos"): "photos: not a run folder (no recipe.yaml in it)",
        ("runs/tiny", "./runs/tiny/"): "runs/tiny: the same run as runs/tiny. Give each run once.",
    }.items():
        assert command("compare", *runs).refused().startswith(told)
    told = command("compare", "runs/tiny", "runs/copy", "--out", "runs").refused()
    assert told == "runs: is a folder. Give --out a file, such as runs/compare.html."
    assert not (here / "compare.html").exists()


def test_a_full_disk_keeps_the_former_page(here: Path, command: Any, full_disk: Any) -> None:
    shutil.copytree("runs/tiny", "runs/copy")
    assert command("compare", "runs/tiny", "runs/copy").code == 0
    before = (here / "compare.html").read_bytes()
    with full_disk("compare"):
        assert "compare.html: the disk is full" in command("compare", "runs/tiny", "runs/copy").refused()
    assert (here / "compare.html").read_bytes() == before
    assert not list(here.rglob("*.partial"))
