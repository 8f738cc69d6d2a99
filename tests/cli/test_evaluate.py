"""`shoestring evaluate`: rows of one form, exact on scenes, honest about what cannot be measured."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from shoestring.evaluation.run import wilson
from shoestring.interfaces import MetricRow

KEYS = {"metric", "split", "facet", "value", "low", "high", "n", "status"}
FACETS = {"shape", "colour", "place", "count", "background", "all"}


def rows(run: Path) -> list[MetricRow]:
    found: list[MetricRow] = json.loads((run / "evaluation.json").read_text())["rows"]
    return found


def test_scenes_are_scored_by_facet_with_ceiling_chance_and_loss(here: Path, command: Any) -> None:
    said = command("evaluate", "runs/tiny")
    assert said.code == 0
    run = here / "runs/tiny"
    assert all(row.keys() == KEYS for row in rows(run))
    for split in ("unseen_scenes", "unseen_pairs"):
        for metric in ("scene_accuracy", "parser_ceiling", "scene_accuracy_shuffled"):
            found = [row for row in rows(run) if (row["metric"], row["split"]) == (metric, split)]
            assert {row["facet"] for row in found} == FACETS
            assert all((row["n"], row["status"]) == (4, "exact") for row in found)
            for row in found:
                share = row["value"]
                assert share is not None
                assert (row["low"], row["high"]) == pytest.approx(wilson(round(share * 4), 4))
                assert metric != "parser_ceiling" or share == 1.0
        loss = [row for row in rows(run) if (row["metric"], row["split"]) == ("held_out_loss", split)]
        assert [row["facet"] for row in loss] == ["log_sigma=-1.0", "log_sigma=1.0", "all"]
        values = [row["value"] or 0.0 for row in loss]
        assert values[2] == pytest.approx((values[0] + values[1]) / 2)
        assert all(row["n"] == 8 for row in loss)
    settings = json.loads((run / "evaluation.json").read_text())["settings"]
    assert settings == {"prompts": 4, "seeds": 1, "steps": 2, "guidance": 3}
    assert len(said.out.splitlines()) == len(rows(run)) + 1


def test_what_was_drawn_is_kept_with_prompt_and_verdict(here: Path, command: Any) -> None:
    assert command("evaluate", "runs/tiny", "--prompts", 2, "--seeds", 2, "--steps", 1).code == 0
    folder = here / "runs/tiny/samples/unseen_pairs"
    index = json.loads((folder / "index.json").read_text())
    assert len(index) == 4
    assert [entry["prompt"] for entry in index[:2]] == [entry["prompt"] for entry in index[2:]]
    assert len({entry["seed"] for entry in index}) == 4
    for entry in index:
        assert entry["facets"].keys() == FACETS
        picture = Image.open(folder / entry["file"])
        assert picture.text["prompt"] == entry["prompt"]
    seconds = json.loads((here / "runs/tiny/ledger.json").read_text())["extra"]["evaluate_seconds"]
    assert seconds > 0
    assert str(entry["prompt"]) in (here / "runs/tiny/report.html").read_text()


def test_the_figures_are_the_same_each_time(here: Path, command: Any) -> None:
    shutil.copytree("runs/tiny", "runs/other")
    for name in ("tiny", "other"):
        assert command("evaluate", f"runs/{name}", "--prompts", 2).code == 0
    assert rows(here / "runs/tiny") == rows(here / "runs/other")


@pytest.mark.parametrize(("store", "held_out"), [("parted", True), ("plain", False)])
def test_pictures_that_are_no_scenes_have_a_held_out_loss_or_a_reason_why_not(
    store: str, held_out: bool, here: Path, tiny: Path, command: Any
) -> None:
    phase = "{name: one, size: 16, images: 24, batch: 24, lr: 1.0e-3}"
    sets = ("--set", f"data.store={store}", "--set", f"phases=[{phase}]")
    assert command("train", tiny, "--name", "new", *sets).code == 0
    assert command("evaluate", "runs/new").code == 0
    found = rows(here / "runs/new")
    assert all(row.keys() == KEYS for row in found)
    if held_out:
        assert [row["facet"] for row in found] == ["log_sigma=-1.0", "log_sigma=1.0", "all"]
        assert all((row["split"], row["n"], row["status"]) == ("held_out", 8, "exact") for row in found)
        assert all((row["low"] or 9) < (row["value"] or 0) < (row["high"] or 0) for row in found)
    else:
        (row,) = found
        assert row["status"].startswith("unavailable: the store has no held-out images; encode with --held-")
        assert (row["value"], row["low"], row["high"], row["n"]) == (None, None, None, 0)
        assert "unavailable: the store has no held-out" in (here / "runs/new/report.html").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("runs/none",), "runs/none: not a run folder (no recipe.yaml in it)."),
        (("photos",), "photos: not a run folder"),
        (("runs/tiny", "--steps", 0), "--steps 0: must be at least 1."),
        (("runs/tiny", "--guidance", -1), "--guidance -1.0: must be a number from 0"),
        (("runs/tiny", "--device", "tpu"), "device 'tpu': unknown."),
    ],
)
def test_a_mistake_is_one_line_and_leaves_everything_as_it_was(
    words: tuple[object, ...], message: str, here: Path, command: Any, tree: Any
) -> None:
    before = tree(here)
    assert command("evaluate", *words).refused().startswith(message)
    assert tree(here) == before


def test_a_run_without_a_checkpoint_says_what_to_do(here: Path, command: Any) -> None:
    shutil.rmtree("runs/tiny/pipeline")
    error = command("evaluate", "runs/tiny").refused()
    assert error.startswith("runs/tiny: no pipeline yet, so nothing to measure.")
    assert error.endswith("shoestring train runs/tiny --resume")


def test_a_store_that_is_gone_is_named(here: Path, tiny: Path, command: Any) -> None:
    phase = "{name: one, size: 16, images: 24, batch: 24, lr: 1.0e-3}"
    sets = ("--set", "data.store=parted", "--set", f"phases=[{phase}]")
    assert command("train", tiny, "--name", "new", *sets).code == 0
    shutil.rmtree("parted")
    assert command("evaluate", "runs/new").refused().startswith("parted: no such store.")
    assert not Path("runs/new/evaluation.json").exists()


def test_a_full_disk_keeps_the_former_evaluation(here: Path, command: Any, full_disk: Any) -> None:
    assert command("evaluate", "runs/tiny", "--prompts", 1).code == 0
    before = (here / "runs/tiny/evaluation.json").read_bytes()
    for word in ("unseen_pairs", "evaluation"):
        with full_disk(word):
            error = command("evaluate", "runs/tiny", "--prompts", 2).refused()
        assert f"{word}" in error
        assert "the disk is full" in error
        assert (here / "runs/tiny/evaluation.json").read_bytes() == before
        assert not list(here.rglob("*.partial"))
