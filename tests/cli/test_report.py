"""`shoestring report`: one file that needs no other and no network."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any


def test_a_real_runs_report_is_self_contained(here: Path, command: Any) -> None:
    assert command("evaluate", "runs/tiny").code == 0
    (here / "runs/tiny/report.html").unlink()
    said = command("report", "runs/tiny")
    assert (said.code, said.out) == (0, "report: runs/tiny/report.html\n")
    page = (here / "runs/tiny/report.html").read_text()
    assert not re.search(r"https?:|//[a-z]|@import|<link|<script[^>]+src", re.sub(r"base64,[^\"]+", "", page))
    for part in ("unseen scenes", "unseen pairs", "masked", "dense", "<svg", "data:image/", "images/s"):
        assert part in page, part


def test_a_run_that_has_only_begun_has_a_report_too(here: Path, command: Any) -> None:
    for path in (here / "runs/tiny").iterdir():
        if path.name != "recipe.yaml":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert command("report", "runs/tiny").code == 0
    assert "hidden_size: 32" in (here / "runs/tiny/report.html").read_text()


def test_a_folder_that_is_no_run_is_refused(here: Path, command: Any) -> None:
    assert command("report", "photos").refused().startswith("photos: not a run folder (no recipe.yaml in it)")
    assert not (here / "photos/report.html").exists()


def test_a_full_disk_keeps_the_former_report(here: Path, command: Any, full_disk: Any) -> None:
    before = (here / "runs/tiny/report.html").read_bytes()
    with full_disk("report"):
        assert "runs/tiny/report.html: the disk is full" in command("report", "runs/tiny").refused()
    assert (here / "runs/tiny/report.html").read_bytes() == before
    assert not list(here.rglob("*.partial"))
